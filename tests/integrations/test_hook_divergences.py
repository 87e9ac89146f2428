"""The hook with a reference: its states, and divergences from them, beside the log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastdpo import HeadStates, LMHead, TeacherCombination, Teachers, TokenLayout, token_divergence
from fastdpo.integrations.fused_output import require_states
from fastdpo.integrations.model import patch_model
from fastdpo.losses.distillation import aligndistil_coefficients
from tests.integrations.test_token_layout import layout_of_labels
from tests.integrations.tiny import BATCH, VOCAB, fused, make_model

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def states_of(model: Any, **inputs: Any) -> HeadStates:
    with torch.no_grad():
        return require_states(model(**(inputs or BATCH.inputs), return_states=True))


def test_states_are_what_the_head_sees() -> None:
    model = make_model("gemma2")
    wanted = model.model(**BATCH.inputs).last_hidden_state
    states = states_of(patch_model(model))
    assert torch.equal(states.hidden, wanted)
    assert states.lm_head.weight is model.lm_head.weight and states.lm_head.softcap is not None
    rows = [{name: value[i : i + 1] for name, value in BATCH.inputs.items()} for i in range(3)]
    parts = states_of(model, row_batches=rows)
    torch.testing.assert_close(parts.hidden, wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_divergences_are_those_of_the_op(family: str) -> None:
    """Values and gradients; the reference is another model, of another width."""
    model, other = make_model(family), make_model("llama", seed=1, hidden_size=64)
    hidden = model.model(**BATCH.inputs).last_hidden_state
    reference = states_of(patch_model(other))
    targets = torch.nn.functional.pad(BATCH.labels[:, 1:], (0, 1), value=-100)
    wanted = token_divergence(
        hidden, LMHead.from_model(model), reference.hidden, targets, ref_lm_head=reference.lm_head,
        outputs=(*DIVERGENCES, "logps", "ref_logps"),
    )  # fmt: skip
    patch_model(model)
    out = fused(model, reference=reference, logps_outputs=DIVERGENCES)
    plain = fused(model)
    assert torch.equal(out.logps_mask, plain.logps_mask)
    torch.testing.assert_close(out.logps, plain.logps, rtol=0, atol=1e-5)
    for name in (*DIVERGENCES, "logps", "ref_logps"):
        assert torch.equal(out[name][:, 1:], getattr(wanted, name)[:, :-1]), name
        assert not out[name][~out.logps_mask].any()
    assert not out.ref_logps.requires_grad and out.entropy is None
    (ours,) = torch.autograd.grad(out.jsd.sum() + out.logps.sum(), model.lm_head.weight)
    (want,) = torch.autograd.grad(
        wanted.jsd.sum() + wanted.logps.sum(),
        model.lm_head.weight,  # type: ignore[union-attr]
    )
    torch.testing.assert_close(ours, want)
    assert other.lm_head.weight.grad is None


def test_a_token_layout_and_several_inputs() -> None:
    model, reference = patch_model(make_model()), patch_model(make_model(seed=1))
    padded = fused(model, reference=states_of(reference), logps_outputs=("forward_kl",))
    mask = BATCH.labels[:, 1:] != -100
    rows = [{name: value[i : i + 1] for name, value in BATCH.inputs.items()} for i in range(3)]
    for inputs in (BATCH.inputs, {"row_batches": rows}):
        layout: TokenLayout = layout_of_labels()
        out = model(
            **inputs, token_layout=layout, return_logps=True, logps_outputs=("forward_kl",),
            reference=states_of(reference, **inputs),
        )  # fmt: skip
        for name in ("logps", "ref_logps", "forward_kl"):
            torch.testing.assert_close(
                getattr(out, name), getattr(padded, name)[:, 1:][mask], rtol=1e-5, atol=1e-5
            )


def test_the_policy_without_its_adapter() -> None:
    """A fresh adapter is no difference: exactly 0, value and gradient of the divergence."""
    torch.manual_seed(0)
    adapted = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
    model = patch_model(adapted)
    with torch.no_grad(), model.disable_adapter():
        reference = require_states(model(**BATCH.inputs, return_states=True))
    out = fused(model, reference=reference, logps_outputs=("forward_kl",))
    assert torch.equal(out.logps, out.ref_logps) and out.logps.any()
    assert not out.forward_kl.any()


def test_a_teacher_made_of_two() -> None:
    """Values are the op's, in either form of the labels; log-probabilities may be there to be looked at."""
    model, *others = (make_model(seed=seed) for seed in range(3))
    hidden = model.model(**BATCH.inputs).last_hidden_state
    first, second = (states_of(patch_model(other)) for other in others)
    combination = TeacherCombination(*aligndistil_coefficients(beta2=2.0))
    targets = torch.nn.functional.pad(BATCH.labels[:, 1:], (0, 1), value=-100)
    names = ("reverse_kl", "l1_distance")
    wanted = token_divergence(
        hidden, LMHead.from_model(model), first.hidden, targets, ref_lm_head=first.lm_head,
        second_hidden=second.hidden, second_lm_head=second.lm_head, combination=combination,
        outputs=(*names, "logps", "ref_logps"), vocab_size=VOCAB - 3,
    )  # fmt: skip
    teachers = Teachers(first, second, combination, vocab_size=VOCAB - 3, logps_requires_grad=False)
    patch_model(model)
    out = fused(model, reference=teachers, logps_outputs=names)
    layout: TokenLayout = layout_of_labels()
    flat = model(
        **BATCH.inputs, token_layout=layout, return_logps=True, logps_outputs=names, reference=teachers
    )
    mask = BATCH.labels[:, 1:] != -100
    for name in (*names, "logps", "ref_logps"):
        assert torch.equal(out[name][:, 1:], getattr(wanted, name)[:, :-1]), name
        torch.testing.assert_close(flat[name], out[name][:, 1:][mask], rtol=1e-5, atol=1e-5)
    assert out.reverse_kl.requires_grad and not out.logps.requires_grad and not out.l1_distance.requires_grad


def test_coefficients_per_token_are_aligned_with_the_labels() -> None:
    """Written out from the distances that a first call returned, they make the same teacher."""
    model, *others = (patch_model(make_model(seed=seed)) for seed in range(3))
    first, second = (states_of(other) for other in others)
    names = ("reverse_kl", "l1_distance")
    by_slope = TeacherCombination(1.0, 0.0, 2.0, -2.0)
    wanted = fused(model, reference=Teachers(first, second, by_slope), logps_outputs=names)
    weight = 2.0 * wanted.l1_distance
    written_out = TeacherCombination(1.0 + weight, -weight)
    out = fused(model, reference=Teachers(first, second, written_out), logps_outputs=names)
    torch.testing.assert_close(out.reverse_kl, wanted.reverse_kl, rtol=1e-5, atol=1e-5)
    mask, layout = BATCH.labels[:, 1:] != -100, layout_of_labels()
    flat_weights = TeacherCombination(*(value[:, 1:][mask] for value in written_out[:2]))
    flat = model(
        **BATCH.inputs, token_layout=layout, return_logps=True, logps_outputs=names,
        reference=Teachers(first, second, flat_weights),
    )  # fmt: skip
    torch.testing.assert_close(flat.reverse_kl, out.reverse_kl[:, 1:][mask], rtol=1e-5, atol=1e-5)


def states(shape: tuple[int, int, int], vocab: int) -> HeadStates:
    return HeadStates(torch.zeros(shape), LMHead(torch.zeros(vocab, shape[-1])))


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"return_states": True}, ValueError, "return_states: got True with return_logps"),
    (
        {"return_logps": False, "return_states": True, "logps_outputs": (), "reference": None},
        ValueError,
        "labels: got a value together with",
    ),
    ({"reference": BATCH.labels}, TypeError, "reference: got Tensor, wanted HeadStates or Teachers"),
    ({"logps_outputs": ("l1_distance", "jsd")}, ValueError, "'l1_distance' without second_hidden"),
    ({"logps_outputs": ()}, ValueError, "wanted at least one"),
    ({"logps_outputs": ("lse",)}, ValueError, "outputs: got 'lse'"),
    ({"logps_topk": 3}, ValueError, "logps_topk: got 3"),
    ({"return_logps": False, "logps_outputs": ()}, ValueError, "reference.*wanted return_logps=True"),
    ({"reference": states((1, 4, 32), VOCAB)}, ValueError, "ref_hidden: got shape"),
    ({"reference": states((3, 12, 8), 9)}, ValueError, "a vocabulary of 9"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS, ids=[call[2][:30] for call in BAD_CALLS])
def test_bad_calls(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    model = patch_model(make_model())
    good = {"labels": BATCH.labels, "return_logps": True, "logps_outputs": ("forward_kl",)}
    good["reference"] = states_of(model)
    assert fused(model, **{name: good[name] for name in ("reference", "logps_outputs")}).ref_logps is not None
    with pytest.raises(error, match=message):
        model(**BATCH.inputs, **{**good, **changed})


def test_an_unpatched_model_is_found_out() -> None:
    with pytest.raises(TypeError, match="wanted HeadStates: the model is not patched"):
        require_states(make_model()(**BATCH.inputs))
