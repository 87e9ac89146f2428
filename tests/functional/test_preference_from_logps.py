"""``preference_loss_from_logps`` is the second half of ``fused_preference_loss``, for every kind of batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import (
    LOSSES,
    LinearLogprobOutput,
    PackedLayout,
    TokenLayout,
    fused_preference_loss,
    linear_logprob,
    preference_loss_from_logps,
    shift_labels,
    token_divergence,
)
from fastdpo.losses import DivergencePairLogps
from fastdpo.types import PreferenceLossOutput
from tests.functional.test_rows import IGNORED, LENGTHS, NAMES, Answers

PAIRED = [name for name, spec in LOSSES.items() if spec.inputs is DivergencePairLogps]


def shifted(values: Tensor, fill: float, answers: Answers, packed: bool) -> Tensor:
    """Per-token data where the tokens are predicted."""
    values = torch.nn.functional.pad(values[:, 1:], (0, 1), value=fill)
    return answers.packed(values) if packed else values


def both(
    answers: Answers, name: str, *, packed: bool = False, reference: str = "tokens", **options: Any
) -> tuple[PreferenceLossOutput, PreferenceLossOutput, Tensor, Tensor]:
    """From hidden states, and from log-probabilities; and the hidden states of either."""
    hidden, again = (answers.hidden.clone().requires_grad_() for _ in range(2))
    ref_hidden, labels = answers.ref_hidden, answers.labels
    targets = shift_labels(answers.labels)
    layout = answers.layout if packed else None
    given = {} if name in PAIRED else answers.extras(name)
    aligned = dict(given)
    if "segment_ids" in given:
        aligned["segment_ids"] = shifted(given["segment_ids"], -1, answers, packed)
    if "token_weights" in options:
        options["token_weights"] = options["token_weights"].to(hidden.dtype)
        aligned["token_weights"] = shifted(options["token_weights"], 0, answers, packed)
    if packed:
        ref_hidden, labels, targets = (answers.packed(x) for x in (ref_hidden, labels, targets))
        given |= {key: answers.packed(given[key]) for key in ("segment_ids",) if key in given}
        options |= {key: answers.packed(options[key]) for key in ("token_weights",) if key in options}
    rows, row_states = (answers.packed(x) if packed else x for x in (hidden, again))
    uses = {"ref_hidden": ref_hidden} if LOSSES[name].uses_reference else {}
    plain = {key: value for key, value in options.items() if key != "token_weights"}
    whole = fused_preference_loss(
        rows, answers.weight, labels, loss_type=name, layout=layout, **uses, **given, **options
    )
    entropy = linear_logprob(row_states, answers.weight, targets, outputs=("entropy",)).entropy
    if name in PAIRED:
        made = token_divergence(
            row_states, answers.weight, ref_hidden, targets, outputs=("forward_kl", "logps", "ref_logps")
        )
        aligned |= {"forward_kl": made.forward_kl}
        logps, ref_logps = made.logps, made.ref_logps
    else:
        logps = linear_logprob(row_states, answers.weight, targets).logps
        ref_logps = linear_logprob(ref_hidden, answers.weight, targets).logps if uses else None
    assert logps is not None
    if reference == "sums" and uses:
        ref_logps = whole.ref_logps
    half = preference_loss_from_logps(
        LinearLogprobOutput(logps, entropy=entropy), targets != IGNORED, loss_type=name, ref_logps=ref_logps,
        layout=layout, **aligned, **plain,
    )  # fmt: skip
    return whole, half, hidden, again


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [*NAMES, *PAIRED])
def test_it_is_the_second_half(name: str, packed: bool) -> None:
    answers = Answers(torch.float32)
    whole, half, hidden, again = both(answers, name, packed=packed)
    assert torch.equal(whole.loss, half.loss)
    for ours, want in ((half.logps, whole.logps), (half.ref_logps, whole.ref_logps)):
        assert (ours is None) == (want is None) and (ours is None or torch.equal(ours, want))
    assert half.metrics.keys() == {*whole.metrics, "entropy"}
    for metric, value in whole.metrics.items():
        assert torch.equal(half.metrics[metric], value) or value.isnan(), metric
    for ours, want in zip(
        torch.autograd.grad(half.loss, again), torch.autograd.grad(whole.loss, hidden), strict=True
    ):
        assert torch.equal(ours, want) and ours.any()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["kto", "sdpo", "direct_advantage", *PAIRED])
def test_sums_of_the_reference_are_as_good(name: str, packed: bool) -> None:
    """Of an answer, or of each of its steps."""
    whole, half, *_ = both(Answers(torch.float64), name, packed=packed, reference="sums")
    assert torch.equal(whole.loss, half.loss)
    assert half.ref_logps is not None and half.ref_logps.shape == half.logps.shape


def test_sums_of_steps_go_into_the_first_half_too() -> None:
    answers = Answers(torch.float64)
    given: dict[str, Any] = {"loss_type": "direct_advantage", **answers.extras("direct_advantage")}
    first = fused_preference_loss(
        answers.hidden, answers.weight, answers.labels, ref_hidden=answers.ref_hidden, **given
    )
    again = fused_preference_loss(
        answers.hidden, answers.weight, answers.labels, ref_logps=first.ref_logps, **given
    )
    assert torch.equal(first.loss, again.loss)


def test_weights_counts_and_options() -> None:
    answers = Answers(torch.float64)
    weights = torch.rand(answers.labels.shape, dtype=torch.float64)
    for packed in (False, True):
        whole, half, *_ = both(
            answers, "kto", packed=packed, token_weights=weights, beta=0.3, num_rows=17,
            row_weights=torch.rand(len(LENGTHS), dtype=torch.float64), desirable_weight=1.3,
        )  # fmt: skip
        assert torch.equal(whole.loss, half.loss)


def test_sums_of_rows_are_those_of_their_tokens() -> None:
    """Added up by hand: of answers, of steps, and of a batch of samples, whose mean is a metric."""
    answers = Answers(torch.float64)
    targets = shift_labels(answers.labels)
    steps = shifted(answers.steps, -1, answers, False).masked_fill(targets == IGNORED, -1)
    for states, field in ((answers.hidden, "logps"), (answers.ref_hidden, "ref_logps")):
        tokens = linear_logprob(states, answers.weight, targets).logps
        by_step = torch.stack([tokens[steps == step].sum() for step in range(18)])
        for name, wanted in (
            ("kto", tokens.sum(1)),
            ("nash_md", tokens.sum(1)),
            ("direct_advantage", by_step),
        ):
            _, half, *_ = both(answers, name)
            torch.testing.assert_close(getattr(half, field), wanted)
            assert half.metrics["num_tokens"] == (targets != IGNORED).sum()
            if name != "kto" and field == "logps":
                scored = wanted[wanted != 0]
                torch.testing.assert_close(half.metrics["logps"], scored.mean())


def test_entropy_is_a_mean_over_tokens() -> None:
    answers = Answers(torch.float64)
    targets = shift_labels(answers.labels)
    _, half, *_ = both(answers, "kto")
    found = linear_logprob(answers.hidden, answers.weight, targets, outputs=("entropy",)).entropy
    assert found is not None
    torch.testing.assert_close(half.metrics["entropy"], found[targets != IGNORED].mean())


@pytest.mark.parametrize("layout", ["padded", "packed", "tokens"])
@pytest.mark.parametrize("name", ["kto", "sdpo", "direct_advantage", "nash_md"])
def test_nothing_waits_for_the_device(name: str, layout: str) -> None:
    """Meta tensors have no values: reading one raises. Numbers of lists and of segments are the caller's."""
    where: dict[str, Any] = {"device": "meta"}
    shape = (4, 6) if layout == "padded" else (24,)
    ids = torch.zeros(24, dtype=torch.int64, **where)
    packed = PackedLayout(torch.zeros(5, dtype=torch.int32, **where))
    layouts = {"packed": packed, "tokens": TokenLayout(ids, ids, ids, (6, 6, 6, 6))}
    floats, rows = torch.zeros(shape, **where).requires_grad_(), torch.zeros(4, **where)
    given: dict[str, Any] = {
        "kto": {"is_desirable": rows > 0, "kl": rows.sum()},
        "sdpo": {"group_ids": ids[:4], "scores": rows, "num_groups": 2, "max_candidates": 2},
        "direct_advantage": {"segment_ids": ids.view(shape), "num_segments": 4, "advantages": rows},
        "nash_md": {"win_rates": rows},
    }[name]
    out = preference_loss_from_logps(
        LinearLogprobOutput(floats, entropy=floats), floats == 0, loss_type=name, ref_logps=floats,
        token_weights=floats, layout=layouts.get(layout), num_rows=rows.sum(), **given,
    )  # fmt: skip
    assert out.loss.is_meta and all(value.is_meta for value in out.metrics.values())
    assert torch.autograd.grad(out.loss, floats)[0].shape == shape


LOGPS, MASK = LinearLogprobOutput(-torch.rand(4, 6)), torch.ones(4, 6, dtype=torch.bool)
KTO = {
    "loss_type": "kto",
    "is_desirable": torch.tensor([True, True, False, False]),
    "kl": torch.tensor(0.0),
    "ref_logps": torch.zeros(4),
}
TDPO = {"loss_type": "tdpo1", "ref_logps": torch.zeros(4, 6), "forward_kl": torch.zeros(4, 6)}
STEPS = {
    "loss_type": "direct_advantage",
    "segment_ids": torch.arange(24).view(4, 6) // 3,
    "num_segments": 8,
    "advantages": torch.zeros(8),
    "ref_logps": torch.zeros(8),
}
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    (KTO | {"loss_type": "sigmoid"}, "loss_type: got sigmoid, wanted losses of another kind than pairs"),
    (KTO | {"mask": MASK[:3]}, "mask: got shape (3, 6)"),
    (KTO | {"mask": MASK.float()}, "mask: got torch.float32, wanted torch.bool"),
    (KTO | {"token": LinearLogprobOutput(torch.zeros(24))}, "token.logps: got shape (24,), wanted (B, T)"),
    (KTO | {"forward_kl": torch.zeros(4, 6)}, "forward_kl: got a value that kto does not use"),
    (KTO | {"ref_logps": torch.zeros(5)}, "ref_logps: got shape (5,), wanted (4,) or (4, 6)"),
    (KTO | {"kl": None}, "kl: got None, wanted a value for kto"),
    (KTO | {"gamma": 1.0}, "gamma: got an option that kto does not have"),
    (
        KTO | {"token_weights": torch.ones(4, 6)},
        "ref_logps (with token_weights): got shape (4,), wanted (4, 6)",
    ),
    (TDPO | {"forward_kl": None}, "forward_kl: got None, wanted a value for tdpo1"),
    (TDPO | {"forward_kl": torch.zeros(4)}, "forward_kl: got shape (4,), wanted (4, 6)"),
    (TDPO | {"ref_logps": None}, "ref_logps: got no reference"),
    (TDPO | {"token_weights": torch.ones(4, 6)}, "token_weights: got a value that tdpo1 does not use"),
    (STEPS | {"ref_logps": torch.zeros(4)}, "ref_logps: got shape (4,), wanted (8,) or (4, 6)"),
    (STEPS | {"segment_ids": torch.zeros(4)}, "segment_ids: got shape (4,)"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_CALLS, ids=[message[:50] for _, message in BAD_CALLS])
def test_bad_calls(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"token": LOGPS, "mask": MASK} | changed
    with pytest.raises(ValueError) as caught:
        preference_loss_from_logps(**arguments)
    assert message in str(caught.value)


def test_the_calls_that_the_bad_ones_are_made_of_are_good() -> None:
    for arguments in (KTO, TDPO, STEPS):
        assert preference_loss_from_logps(LOGPS, MASK, **arguments).loss.isfinite()
    with pytest.raises(TypeError, match="mask: got NoneType"):
        preference_loss_from_logps(LOGPS, None, **KTO)  # type: ignore[arg-type]
