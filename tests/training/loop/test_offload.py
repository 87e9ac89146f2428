"""Activations in host memory: every layout, with and without checkpointing, to the same bits."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.integrations.model import patch_model
from fastdpo.training.loop import offload
from fastdpo.training.loop.offload import offloaded_activations
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference.sources import disable_dropout
from fastdpo.training.settings.config import PreferenceConfig
from tests.integrations.tiny import make_model
from tests.training.batches.layout_cases import ROW_CASES, make_batch, make_pairs, run_step
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]
CASES = [("padded", "auto"), *ROW_CASES]
CHECKPOINTING: list[dict[str, Any] | None] = [None, {"use_reentrant": False}, {"use_reentrant": True}]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hooks made of every tensor that was saved."""
    made: list[Any] = []
    pack = offload._Forward.pack

    def noted(self: Any, tensor: torch.Tensor) -> Any:
        made.append(pack(self, tensor))
        return made[-1]

    monkeypatch.setattr(offload._Forward, "pack", noted)
    return made


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        *(("llama", given) for given in CHECKPOINTING),
        *zip(("qwen2", "gemma2", "gpt2"), CHECKPOINTING, strict=True),
    ],
    ids=["plain", "checkpointed", "reentrant", "qwen2", "gemma2-checkpointed", "gpt2-reentrant"],
)
def test_the_same_bits_in_every_layout(family: str, checkpointing: dict[str, Any] | None, packed: list[Any]):
    model = patch_model(make_model(family)).train()
    disable_dropout(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    for case in CASES:
        batch = make_batch(*case)
        plain = run_step(model, batch)
        packed.clear()
        with offloaded_activations(model):
            offloaded = run_step(model, batch)
        moved = [item for item in packed if item.device is not None]
        assert moved
        assert torch.equal(plain.loss, offloaded.loss)
        assert plain.grads.keys() == offloaded.grads.keys()
        for name, gradient in plain.grads.items():
            assert torch.equal(offloaded.grads[name], gradient), (case, name)


def test_weights_stay_and_a_tensor_saved_twice_is_copied_once(packed: list[Any]):
    model = patch_model(make_model("llama")).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with offloaded_activations(model):
        run_step(model, make_batch("padded"))
    kept = [item for item in packed if item.device is None]
    moved = [item for item in packed if item.device is not None]
    assert kept and all(item.tensor.untyped_storage().data_ptr() in weights for item in kept)
    assert not any(item.tensor.untyped_storage().data_ptr() in weights for item in moved)
    assert len({id(item) for item in moved}) < len(moved)


def test_a_storage_used_again_is_copied_again():
    """Another tensor at the same address, and the same one changed in place, are not what was copied."""
    forward = offload._Forward(torch.nn.Identity())
    first = torch.ones(8)
    before = forward.pack(first)
    assert forward.pack(first) is before
    first.mul_(2)
    changed = forward.pack(first)
    assert changed.tensor.tolist() == [2.0] * 8 and before.tensor.tolist() == [1.0] * 8
    del first
    for value in range(3, 100):  # each in the memory, and as the storage object, of the one before
        again = torch.full((8,), float(value))
        assert forward.pack(again).tensor.tolist() == [float(value)] * 8
        del again


def test_nothing_is_left_after_the_step_and_the_context(packed: list[Any]):
    model = patch_model(make_model("llama")).train()
    with offloaded_activations(model):
        run_step(model, make_batch("padded"))
        with pytest.raises(IndexError):  # an error in the forward pass leaves the hooks in order
            model(input_ids=torch.tensor([[10**6]]), labels=torch.tensor([[1]]), return_logps=True)
        run_step(model, make_batch("packed", "separate"))
    copies = [weakref.ref(item.tensor) for item in packed if item.device is not None]
    packed.clear()
    gc.collect()
    assert copies and not any(copy() is not None for copy in copies)
    run_step(model, make_batch("padded"))
    assert packed == []


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
def test_a_run_is_the_same(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, layout: str, packed: list[Any]
):
    """With everything that a run may have beside it; an adapter's reference saves nothing."""
    logs = []
    adapter = None
    if layout == "padded":
        adapter = pytest.importorskip("peft").LoraConfig(r=4, target_modules="all-linear")
    for is_on in (False, True):
        args = make_args(
            output_dir=str(tmp_path / str(is_on)), batch_layout=layout, max_tokens_per_batch=260, max_steps=2,
            gradient_accumulation_steps=2, gradient_checkpointing=True, longest_batch_first=True,
            bf16=layout == "packed", offload_activations=is_on,
        )  # fmt: skip
        trainer = PreferenceTrainer(
            tiny_llama(), args, train_dataset=make_rows(12), processing_class=tokenizer,
            peft_config=adapter,
        )  # fmt: skip
        trainer.train()
        assert bool(packed) == is_on
        logs.append(read_metrics(args.output_dir))
    assert logs[0] == logs[1]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_gpu_holds_less_of_a_step(case: tuple[str, str]):
    """Eight layers' activations of some 5000 tokens; weights and head are small beside them."""
    device = torch.device("cuda")
    model = patch_model(make_model("llama", num_hidden_layers=8)).train().to(device)
    # A call a sequence takes a dry run minutes: fewer of them, and as many tokens.
    sizes = [(80, 80, 80)] * 16 if "separate" in case else [(20, 20, 20)] * 64
    batch = make_batch(*case, make_pairs(sizes)).to(device)
    run_step(model, batch)
    steps, peaks = [], []
    for context in (contextlib.nullcontext(), offloaded_activations(model)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        with context:
            steps.append(run_step(model, batch))
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert peaks[1] < 0.6 * peaks[0], peaks
    assert torch.equal(steps[0].loss, steps[1].loss)
    for name, gradient in steps[0].grads.items():
        torch.testing.assert_close(
            steps[1].grads[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item()
        )


def test_compiled_models_are_refused(make_args: MakeArgs):
    with pytest.raises(ValueError, match="offload_activations: got True with torch_compile"):
        make_args(offload_activations=True, torch_compile=True)
