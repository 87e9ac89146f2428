"""The hook inside what people wrap models in: accelerate, DDP, checkpointing, torch.compile."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastdpo import LMHead
from fastdpo.integrations.model import (
    FusedLMOutput,
    is_patched,
    patch_model,
    require_fused_output,
    unpatch_model,
)
from fastdpo.testing import assert_logps_close
from tests.integrations.tiny import (
    BATCH,
    Step,
    assert_step_close,
    expected_step,
    fused_logps,
    make_model,
    plain_logps,
    run_step,
)

# Checkpointing and compilation


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(use_reentrant: bool) -> None:
    model = patch_model(make_model()).train()
    plain = run_step(model, BATCH, fused_logps)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    checkpointed = run_step(model, BATCH, fused_logps)
    assert torch.equal(plain.logps, checkpointed.logps) and plain.grads.keys() == checkpointed.grads.keys()
    assert all(torch.equal(grad, checkpointed.grads[name]) for name, grad in plain.grads.items())


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_compiled_models(stance: str) -> None:
    """The module around the model alone, and what is traced and made of it."""
    model = make_model("gemma2", num_hidden_layers=1)
    expected = expected_step(model, BATCH)
    compiled = torch.compile(patch_model(model), backend="aot_eager")
    try:
        with torch.compiler.set_stance(stance):
            ours = run_step(compiled, BATCH, fused_logps)
    finally:
        torch.compiler.reset()
    assert_step_close(ours, expected, renamed=lambda name: f"_orig_mod.{name}")


def test_a_compiled_model_is_patched_inside() -> None:
    compiled = torch.compile(make_model(), backend="eager")
    assert patch_model(compiled) is compiled and is_patched(compiled._orig_mod)
    assert LMHead.from_model(compiled).weight is compiled._orig_mod.lm_head.weight
    assert type(unpatch_model(compiled)._orig_mod) is transformers.LlamaForCausalLM


# accelerate


@pytest.fixture
def make_accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield lambda precision: accelerate.Accelerator(cpu=True, mixed_precision=precision)
    reset()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_and_unwraps(make_accelerator: Any, precision: str, tmp_path: Path) -> None:
    accelerator = make_accelerator(precision)
    model = patch_model(make_model())
    exact = fused_logps(model, BATCH)
    prepared = accelerator.prepare(model)
    out = require_fused_output(prepared(**BATCH.inputs, labels=BATCH.labels, return_logps=True))
    assert out.logps.dtype == torch.float32 and out.logps_mask.dtype == torch.bool
    assert torch.equal(out.logps, exact) == (precision == "no")
    accelerator.backward(-out.logps.sum())

    kept = accelerator.unwrap_model(prepared)
    assert torch.equal(fused_logps(kept, BATCH), out.logps)
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert bare is model and isinstance(
        bare(**BATCH.inputs, labels=BATCH.labels, return_logps=True), FusedLMOutput
    )
    assert torch.equal(fused_logps(bare, BATCH), exact)
    twin = copy.deepcopy(bare)
    twin.lm_head.weight.data.zero_()
    assert torch.equal(fused_logps(bare, BATCH), exact) and not torch.equal(fused_logps(twin, BATCH), exact)
    bare.save_pretrained(tmp_path)
    unpatch_model(bare)
    assert type(bare) is transformers.LlamaForCausalLM and "forward" not in vars(bare)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**BATCH.inputs).logits, bare(**BATCH.inputs).logits)


def test_a_prepared_model_is_refused_where_the_patch_would_not_be_reached(make_accelerator: Any) -> None:
    accelerator = make_accelerator("bf16")
    model = accelerator.prepare(make_model())
    with pytest.raises(ValueError, match="`forward` was replaced on the instance.*keep_fp32_wrapper=False"):
        patch_model(model)
    assert not is_patched(model)
    patched = accelerator.prepare(patch_model(make_model()))
    with pytest.raises(ValueError, match="`forward` was replaced on the instance"):
        unpatch_model(patched)
    assert patch_model(patched) is patched


def test_dispatched_models_keep_their_hooks() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    exact = plain_logps(model, BATCH)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    own = model.forward
    patch_model(model, logits="real")
    assert_logps_close(fused_logps(model, BATCH), exact.double(), torch.float32)
    assert torch.equal(plain_logps(model, BATCH), exact) and model.forward is own
    unpatch_model(model)
    assert type(model(**BATCH.inputs, labels=BATCH.labels, return_logps=True)) is not FusedLMOutput


def test_a_device_map_with_layers_on_disk_and_in_memory(tmp_path: Path) -> None:
    """The stand-in for two devices: weights that lie elsewhere until a layer's hook fetches them."""
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    exact = plain_logps(model, BATCH)
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    patch_model(model)
    with torch.no_grad():
        assert_logps_close(fused_logps(model, BATCH), exact.double(), torch.float32)
        assert torch.equal(plain_logps(model, BATCH), exact)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    unpatch_model(model)
    with torch.no_grad():
        assert torch.equal(plain_logps(model, BATCH), exact)


def test_an_offloaded_head_is_refused_at_the_call() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = patch_model(make_model())
    accelerate.cpu_offload(model.lm_head, execution_device="cpu")
    with pytest.raises(ValueError, match="head whose weight is offloaded"):
        fused_logps(model, BATCH)


# DDP


@contextmanager
def _process_group(store: str, *, rank: int = 0, world: int = 1) -> Iterator[None]:
    """A gloo group, for models that are gone when it ends.

    A DDP model that outlives its group destroys it while holding the interpreter's lock, and gloo's
    thread may be waiting for that lock: the process then hangs, one time in ten.
    """
    files = torch.distributed.FileStore(store, world)
    torch.distributed.init_process_group("gloo", store=files, rank=rank, world_size=world)
    yield
    gc.collect()
    torch.distributed.destroy_process_group()


def _ddp_step(model: nn.Module, rank: int, world: int) -> Step:
    """Each process has every ``world``-th sequence."""
    part = type(BATCH)(*(tensor[rank::world] for tensor in BATCH))
    return run_step(nn.parallel.DistributedDataParallel(model), part, fused_logps)


def _process(rank: int, world: int, store: str, model: nn.Module, results: str) -> None:
    torch.set_num_threads(1)
    with _process_group(store, rank=rank, world=world):
        torch.save(tuple(_ddp_step(model, rank, world)), f"{results}{rank}")


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ddp_averages_the_gradients_of_its_processes(world: int, tmp_path: Path) -> None:
    model = make_model()
    expected = expected_step(model, BATCH)
    patch_model(model)
    results = os.fspath(tmp_path / "step")
    arguments = (world, os.fspath(tmp_path / "store"), model, results)
    if world == 1:
        _process(0, *arguments)
    else:
        # Spawned, so that the patched model goes through pickle, as in any launcher.
        torch.multiprocessing.spawn(_process, arguments, nprocs=world)
    steps = [Step(*torch.load(f"{results}{rank}")) for rank in range(world)]
    logps = torch.zeros_like(BATCH.upstream)
    for rank, step in enumerate(steps):
        logps[rank::world] = step.logps
    # DDP divides by the number of processes; every process has the same result.
    whole = Step(logps, {name: grad * world for name, grad in steps[-1].grads.items()})
    assert_step_close(whole, expected, renamed=lambda name: f"module.{name}")


def _patch_inside_ddp() -> None:
    wrapped = nn.parallel.DistributedDataParallel(make_model())
    assert patch_model(wrapped) is wrapped and is_patched(wrapped) and is_patched(wrapped.module)
    assert torch.equal(fused_logps(wrapped, BATCH), fused_logps(patch_model(make_model()), BATCH))
    assert LMHead.from_model(wrapped).weight is wrapped.module.lm_head.weight
    unpatch_model(wrapped)
    assert type(wrapped.module) is transformers.LlamaForCausalLM


@pytest.mark.distributed
def test_a_model_in_ddp_is_patched_inside(tmp_path: Path) -> None:
    with _process_group(os.fspath(tmp_path / "store")):
        _patch_inside_ddp()
