"""PEFT's virtual tokens: results of the caller's own tokens, whatever PEFT puts before them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastdpo
from fastdpo import Execution, LMHead
from fastdpo.integrations.lazy import LazyLogits
from fastdpo.integrations.lazy_call import lazy_head
from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.model import backbone_states, is_patched, patch_model, unpatch_model
from fastdpo.types import TokenLayout
from tests.integrations.peft_cases import CASES, with_lora, with_peft
from tests.integrations.test_token_layout import layout_of_labels
from tests.integrations.tiny import BATCH, fused, fused_logps, make_model, plain_logps

peft = pytest.importorskip("peft")

NUM_VIRTUAL = 3
KINDS = ["prompt", "p-tuning", "prefix"]
STATISTICS = ("lse", "entropy", "mean_logit", "is_top1")


def filled(kind: str, model: Any = None) -> Any:
    names = {
        "prompt": "PromptTuningConfig",
        "p-tuning": "PromptEncoderConfig",
        "prefix": "PrefixTuningConfig",
    }
    return with_peft(names[kind], model, num_virtual_tokens=NUM_VIRTUAL)


@pytest.mark.promise(48)
@pytest.mark.parametrize("kind", KINDS)
def test_all_results_are_of_the_callers_tokens(kind: str) -> None:
    model = patch_model(filled(kind))
    out = fused(model, logps_outputs=STATISTICS)
    for name in ("logps", "logps_mask", *STATISTICS):
        assert getattr(out, name).shape == BATCH.labels.shape, name
    expected = BATCH.labels != -100
    expected[:, 0] = False
    assert BATCH.labels[0, 0] != -100  # which the last virtual token predicts, and nothing without an adapter
    assert torch.equal(out.logps_mask, expected) and not out.logps[~expected].any()
    with torch.no_grad():
        logits = model(**BATCH.inputs).logits[:, -BATCH.labels.shape[1] : -1]
    ours = out.mean_logit[:, 1:][expected[:, 1:]]
    torch.testing.assert_close(ours, logits.mean(-1)[expected[:, 1:]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_switched_off_adapter_is_the_reference(kind: str) -> None:
    reference = fused_logps(patch_model(make_model()), BATCH)
    model = patch_model(filled(kind))
    policy = fused_logps(model, BATCH)
    for _ in range(2):  # PEFT leaves a bound forward on its model behind
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(fused_logps(model, BATCH), reference)
        assert torch.equal(fused_logps(model, BATCH), policy)
    assert not torch.equal(policy, reference)
    unpatch_model(model)
    assert type(model) is peft.PeftModelForCausalLM and "forward" not in vars(model)
    assert type(unwrap(model)) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_layout_counts_the_callers_tokens(kind: str) -> None:
    model = patch_model(filled(kind))
    layout = layout_of_labels()
    with torch.no_grad():
        named = model(**BATCH.inputs, token_layout=layout, return_logps=True).logps
        padded = fused_logps(model, BATCH)[:, 1:][BATCH.labels[:, 1:] != -100]
    torch.testing.assert_close(named, padded, rtol=1e-6, atol=1e-6)
    assert padded.std() > 0.1


def test_patched_before_the_virtual_tokens_came() -> None:
    """Then results are as long as PEFT's own logits, until the model is patched again."""
    model = filled("prompt", patch_model(make_model()))
    with torch.no_grad():
        long = fused_logps(model, BATCH)
        assert long.shape[1] == NUM_VIRTUAL + BATCH.labels.shape[1]
        with pytest.raises(
            ValueError, match=r"inputs_embeds: got .* token_layout.*patch_model\(model\) after"
        ):
            model(**BATCH.inputs, token_layout=layout_of_labels(), return_logps=True)
        assert patch_model(model) is model
        short = fused_logps(model, BATCH)
    assert short.shape == BATCH.labels.shape
    assert torch.equal(short[:, 1:], long[:, NUM_VIRTUAL + 1 :])


def test_embeddings_with_a_token_layout_say_how_many_of_them_are_virtual() -> None:
    model = patch_model(make_model())
    embeds = model.get_input_embeddings()(BATCH.input_ids).detach()
    call = {"inputs_embeds": embeds, "attention_mask": BATCH.attention_mask, "return_logps": True}
    with pytest.raises(ValueError, match="inputs_embeds.*num_virtual_tokens"):
        model(**call, token_layout=layout_of_labels())
    with torch.no_grad():
        ours = model(**call, token_layout=layout_of_labels(), num_virtual_tokens=0).logps
        expected = model(**BATCH.inputs, token_layout=layout_of_labels(), return_logps=True).logps
    assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="num_virtual_tokens: got a value"):
        model(**BATCH.inputs, num_virtual_tokens=0)


def test_everything_else_is_unchanged(tmp_path: Path) -> None:
    plain, model = filled("prompt"), filled("prompt")
    model.load_state_dict(plain.state_dict())
    patch_model(model, logits="real")
    assert is_patched(model) and isinstance(model, peft.PeftModelForCausalLM)
    assert type(model).__name__ == "PeftModelForCausalLM" and patch_model(model, logits="real") is model
    assert torch.equal(plain_logps(model, BATCH), plain_logps(plain, BATCH))
    ids = BATCH.input_ids[:1, :4]
    tokens = [each.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for each in (plain, model)]
    assert torch.equal(*tokens)
    expected = fused_logps(model, BATCH)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(fused_logps(twin, BATCH), expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert torch.equal(fused_logps(patch_model(loaded), BATCH), expected)


def test_what_does_not_go_with_virtual_tokens_says_so() -> None:
    model = patch_model(filled("prompt"))
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="row_batches.*virtual tokens"):
        model(row_batches=[BATCH.inputs], token_layout=TokenLayout(none, none, none), return_logps=True)
    with pytest.raises(ValueError, match="virtual tokens"):
        backbone_states(model, **BATCH.inputs)
    fresh = filled("prompt")
    with fresh.disable_adapter(), pytest.raises(ValueError, match=r"outside disable_adapter\(\)"):
        patch_model(fresh)
    assert not is_patched(fresh)
    with fresh.disable_adapter():
        pass
    assert torch.equal(fused_logps(patch_model(fresh), BATCH)[:, 0], torch.zeros(len(BATCH.labels)))


def test_a_model_class_that_ignores_the_tokens_is_refused() -> None:
    model = filled("prompt")

    class Other(peft.PeftModelForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.base_model(*args, **kwargs)

    model.__class__ = Other
    with pytest.raises(ValueError, match="not added by PeftModelForCausalLM"):
        patch_model(model)


def test_the_doctor_sees_them() -> None:
    lines = dict(fastdpo.doctor(patch_model(filled("prompt"))).sections["Model LlamaForCausalLM"])
    assert lines["class"] == "LlamaForCausalLM in a PeftModelForCausalLM" and lines["patched"].startswith(
        "yes"
    )
    assert lines["virtual tokens"] == "3 before every row (PROMPT_TUNING)"
    plan = dict(fastdpo.doctor(filled("prefix")).sections["Plan for 4096 labelled tokens"])
    assert plan["mode"] == "stash"  # the head is frozen, the prefix trained through the hidden states


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    reset()


def test_lazy_logits_for_one_call_under_mixed_precision(accelerator: Any) -> None:
    """As the trainers of other packages run: policy, and reference inside ``disable_adapter``."""
    expected = fused_logps(patch_model(filled("prompt")), BATCH)
    reference = fused_logps(patch_model(make_model()), BATCH)
    torch.manual_seed(0)
    model = accelerator.prepare(filled("prompt"))
    before = vars(model)["forward"]

    def check(wanted: torch.Tensor, *, is_rounded: bool) -> None:
        own = vars(model)["forward"]
        with torch.no_grad(), lazy_head(unwrap(model), Execution(), "error"):
            assert isinstance(model(**BATCH.inputs).logits, LazyLogits)
            found = plain_logps(model, BATCH)
        assert vars(model)["forward"] == own and not is_patched(model)
        assert found.shape == wanted.shape and torch.equal(found, wanted) != is_rounded
        assert (found - wanted).abs().max() < 0.2  # bf16 through two layers, logits of about 3

    check(expected, is_rounded=True)
    with model.disable_adapter():
        check(reference, is_rounded=False)  # PEFT calls past accelerate's wrapper
    assert vars(model)["forward"] == before


@pytest.mark.parametrize("name", ["prompt", "prompt, lora", "prefix"])
def test_the_head_is_that_of_the_model_inside(name: str) -> None:
    model = CASES[name].make()
    head = LMHead.from_model(model)
    assert head.weight is getattr(unwrap(model).lm_head, "base_layer", unwrap(model).lm_head).weight
    assert (head.adapter is not None) == (name == "prompt, lora")


def test_lora_alone_is_left_its_class() -> None:
    model = patch_model(with_lora(make_model()))
    assert type(model) is peft.PeftModelForCausalLM
