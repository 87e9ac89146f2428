"""The hook inside PEFT: every kind of adapter against the model's own logits, or refused with the reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo import Execution, LMHead, PreferenceTrainer
from fastdpo.integrations.model import is_patched, patch_model, unpatch_model
from fastdpo.testing import assert_logps_close
from tests.integrations.peft_cases import CASES, HEAD, fill_adapters, with_lora
from tests.integrations.tiny import (
    BATCH,
    HIDDEN,
    VOCAB,
    Expected,
    assert_step_close,
    expected_step,
    fused_logps,
    make_model,
    plain_logps,
    run_step,
)
from tests.training.conftest import (  # noqa: F401  (fixtures)
    make_args,
    make_rows,
    make_tokenizer,
    no_curves,
    tiny_llama,
    tokenizer,
    trained_bpe,
)

pytest.importorskip("peft")

COMPUTED = [name for name, case in CASES.items() if case.refused is None]
REFUSED = [name for name, case in CASES.items() if case.refused is not None]


@pytest.mark.promise(48)
@pytest.mark.parametrize("name", COMPUTED)
def test_adapters_equal_the_logits_path(name: str) -> None:
    model = CASES[name].make()
    expected = expected_step(model, BATCH)
    ours = run_step(patch_model(model), BATCH, fused_logps)
    assert_step_close(ours, expected)
    assert ours.grads


@pytest.mark.promise(48)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str) -> None:
    model = CASES[name].make()
    with pytest.raises(ValueError, match=CASES[name].refused):
        patch_model(model)


@pytest.mark.parametrize("name", ["lora", "dora", "modules_to_save", "head", "head, several"])
def test_a_switched_off_adapter_is_the_reference(name: str) -> None:
    model = patch_model(CASES[name].make())
    reference = fused_logps(patch_model(make_model()), BATCH)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(fused_logps(model, BATCH), reference)
        assert LMHead.from_model(model).adapter is None
    assert not torch.equal(fused_logps(model, BATCH), reference)


def test_a_frozen_adapter_is_the_reference() -> None:
    """TRL's way to go on training an adapter: a second one, ``ref``, holds where it began."""
    peft = pytest.importorskip("peft")
    model = with_lora(make_model(), target_modules=HEAD)
    model.add_adapter("ref", peft.LoraConfig(r=4, target_modules=HEAD, task_type="CAUSAL_LM"))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in weights.items():
            if ".ref." in name:
                parameter.copy_(weights[name.replace(".ref.", ".default.")])
    patch_model(model)
    policy = fused_logps(model, BATCH)
    model.set_adapter("ref")
    with torch.no_grad():
        assert torch.equal(fused_logps(model, BATCH), policy)
    model.set_adapter("default")
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.mul_(2)
    assert not torch.equal(fused_logps(model, BATCH), policy)


@pytest.mark.parametrize("target", [None, HEAD])
def test_a_fresh_adapter_has_the_bits_of_its_reference(target: list[str] | None) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=target or HEAD[:2], task_type="CAUSAL_LM")
    model = patch_model(peft.get_peft_model(make_model(), config))
    policy = fused_logps(model, BATCH)
    assert policy.requires_grad
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(policy, fused_logps(model, BATCH))


def test_an_adapter_is_added_saved_loaded_and_merged_around_the_hook(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = with_lora(make_model(), target_modules=HEAD)
    expected = expected_step(plain, BATCH)
    model = with_lora(patch_model(make_model(), logits="real"), target_modules=HEAD)
    assert patch_model(model, logits="real") is model and is_patched(model)
    assert_step_close(run_step(model, BATCH, fused_logps), expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(patch_model(make_model()), tmp_path).eval()
    assert torch.equal(fused_logps(loaded, BATCH), fused_logps(model, BATCH))
    assert torch.equal(plain_logps(model, BATCH), plain_logps(plain, BATCH))
    merged = model.merge_and_unload()
    assert is_patched(merged)
    assert_logps_close(fused_logps(merged, BATCH), expected.truth.logps.double(), torch.float32)
    assert type(unpatch_model(merged)) is transformers.LlamaForCausalLM


def test_dropout_of_a_head_adapter_is_honoured() -> None:
    """The same random numbers in the same order as PEFT's own layer draws, so that values can be compared."""
    model = with_lora(make_model(), target_modules=["lm_head"], lora_dropout=0.4)
    patched = patch_model(copy.deepcopy(model))
    results = []
    for each, logps_of in ((model, plain_logps), (patched, fused_logps)):
        torch.manual_seed(3)
        results.append(run_step(each.train(), BATCH, logps_of))
    plain, ours = results
    exact = run_step(patched.eval(), BATCH, fused_logps)
    assert torch.allclose(ours.logps, plain.logps, rtol=0, atol=2e-5)  # 1e-5 nats of fp32 for each of the two
    assert not torch.allclose(ours.logps, exact.logps, rtol=0, atol=1e-2)
    assert ours.grads.keys() == plain.grads.keys()
    for name, grad in plain.grads.items():
        assert (ours.grads[name] - grad).norm() <= 2**-13 * grad.norm(), name
    with torch.no_grad():  # as transformers scores a training model: PEFT's layer drops out then, too
        torch.manual_seed(3)
        assert torch.equal(fused_logps(patched.train(), BATCH), ours.logps)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_tied_like_the_weights(target: str) -> None:
    """PEFT's ``ensure_weight_tying``: the head's A and B are the embedding's, transposed."""
    options = {"target_modules": ["q_proj", target], "ensure_weight_tying": True}
    model = with_lora(make_model("llama-tied"), **options)
    wide = with_lora(make_model("llama-tied").double(), **options)  # not a copy: PEFT ties views
    wide.load_state_dict(model.state_dict())
    expected = Expected(run_step(wide, BATCH, plain_logps), run_step(model, BATCH, plain_logps))
    assert LMHead.from_model(model).adapter is not None
    assert_step_close(run_step(patch_model(model), BATCH, fused_logps), expected)


def test_a_trained_weight_beside_its_adapter() -> None:
    model = with_lora(make_model(), target_modules=HEAD)
    model.get_output_embeddings().base_layer.weight.requires_grad_(True)
    expected = expected_step(model, BATCH)
    ours = run_step(patch_model(model), BATCH, fused_logps)
    assert_step_close(ours, expected)
    assert any("base_layer" in name for name in ours.grads)


@pytest.mark.parametrize("mode", ["stash", "pairs", "lean"])
def test_modes_without_a_head_adapter_say_so(mode: str) -> None:
    model = patch_model(with_lora(make_model(), target_modules=HEAD), execution=Execution(mode=mode))
    with pytest.raises(ValueError, match="execution.mode.*with an adapter on the head"):
        fused_logps(model, BATCH)


class _MergedWeights(TorchDispatchMode):
    """Counts results of a merged weight's shape, or of the logits of all positions, outside fastdpo's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.namespace != "fastdpo":
            views = ("detach", "t.", "transpose", "alias", "view")
            made = not any(name in str(func) for name in views)
            self.count += sum(
                made and (tuple(t.shape) in {(VOCAB, HIDDEN), (HIDDEN, VOCAB)} or t.shape[-1:] == (VOCAB,))
                for t in tensors
            )
        return result


def test_neither_a_merged_weight_nor_logits_are_made() -> None:
    model = with_lora(make_model(), target_modules=["lm_head"])
    with _MergedWeights() as plain:
        run_step(model, BATCH, plain_logps)
    patch_model(model)
    with _MergedWeights() as ours:
        run_step(model, BATCH, fused_logps)
    assert plain.count > 0 and ours.count == 0


def test_bf16_models_with_an_fp32_adapter_lose_nothing_in_the_head() -> None:
    model = with_lora(make_model().bfloat16(), target_modules=["lm_head"])
    patch_model(model)
    layer = model.get_output_embeddings()
    assert layer.lora_A["default"].weight.dtype == torch.float32
    fill_adapters(model)
    with torch.no_grad():
        ours = fused_logps(model, BATCH)
        hidden = model.base_model.model.model(**BATCH.inputs).last_hidden_state.double()
    weight = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    targets = BATCH.labels.roll(-1, dims=1)
    log_p = (hidden @ weight.T).log_softmax(-1)
    truth = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].roll(1, dims=1)
    ignored = BATCH.labels == -100
    ignored[:, 0] = True
    assert_logps_close(ours, truth.masked_fill(ignored, 0.0), torch.bfloat16)


@pytest.mark.parametrize("reference", ["adapter", "precomputed"])
def test_the_loop_trains_an_adapter_on_the_head(
    reference: str,
    make_args: Callable[..., Any],  # noqa: F811
    tokenizer: Any,  # noqa: F811
) -> None:
    peft = pytest.importorskip("peft")
    trainer = PreferenceTrainer(
        tiny_llama(),
        make_args(reference=reference, learning_rate=1e-2),
        train_dataset=make_rows(12),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=HEAD, task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ln2 = torch.tensor(math.log(2)).item()  # in fp32
    assert losses[0] == ln2 if reference == "adapter" else losses[0] == pytest.approx(ln2, abs=1e-4)
    assert losses[-1] < losses[0]
    trained = trainer.model.named_parameters()
    assert any("lm_head.lora_B" in name and parameter.any() for name, parameter in trained)
