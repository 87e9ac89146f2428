"""`fused_preference_loss`: every loss that is not of pairs, against sums from all the logits in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import LOSSES, Execution, PackedLayout, fused_preference_loss, shift_labels
from fastdpo.losses import ListLogps, StepLogps, TokenLogps, UnpairedLogps, build_objective
from fastdpo.losses.inputs import Batch
from fastdpo.testing import assert_close_to_fp64

IGNORED, HIDDEN, VOCAB = -100, 16, 53
LENGTHS = (9, 5, 7, 8, 4, 9)
NAMES = [
    name for name, spec in LOSSES.items() if spec.inputs in (ListLogps, StepLogps, TokenLogps, UnpairedLogps)
]
GROUPS = torch.tensor([0, 1, 0, 0, 1, 1])


class Answers:
    """Six answers of uneven length; per-token data of steps beside them."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        shape = (len(LENGTHS), max(LENGTHS))
        self.is_real = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
        self.labels = torch.randint(VOCAB, shape, generator=generator).masked_fill(~self.is_real, IGNORED)
        self.labels[:, :2] = IGNORED
        self.hidden = draw(*shape, HIDDEN).to(dtype)
        self.ref_hidden = (self.hidden + 0.1 * draw(*shape, HIDDEN)).to(dtype)
        self.weight = (draw(VOCAB, HIDDEN) * 2 / HIDDEN**0.5).to(dtype)
        self.steps = (torch.arange(shape[1]) // 3 + 3 * torch.arange(shape[0])[:, None]).clone()
        self.scores = torch.tensor([0.5, -1.0, 2.0, 1.0, 0.0, 3.0])
        self.advantages = draw(18)

    def extras(self, name: str) -> dict[str, Any]:
        spec = LOSSES[name]
        if spec.inputs is UnpairedLogps:
            given: dict[str, Any] = {"is_desirable": torch.tensor([True, False, True, True, False, False])}
            given |= {key: torch.tensor(0.3) for key in spec.needs}
            return given
        if spec.inputs is ListLogps:
            scores = self.scores.abs() if spec.ranges else self.scores
            return {"group_ids": GROUPS} | ({"scores": scores} if "scores" in spec.needs else {})
        if spec.inputs is StepLogps:
            return {"segment_ids": self.steps, "num_segments": 18, "advantages": self.advantages}
        return {"win_rates": torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 1.0])}

    def packed(self, tensor: Tensor) -> Tensor:
        return tensor[self.is_real]

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()]))


def dense(answers: Answers, name: str, dtype: torch.dtype, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients from all the logits, sums taken answer by answer and step by step."""
    spec = LOSSES[name]
    hidden = answers.hidden.to(dtype, copy=True).requires_grad_()
    weight = answers.weight.to(dtype, copy=True).requires_grad_()
    targets = shift_labels(answers.labels)
    mask = targets != IGNORED

    def token_logps(states: Tensor) -> Tensor:
        log_probs = (states @ weight.T).to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
        return log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask

    token = token_logps(hidden)
    with torch.no_grad():
        reference = token_logps(answers.ref_hidden.to(dtype))
    ref_logps = reference.sum(-1) if spec.uses_reference else None
    given = {
        key: value.to(token.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in answers.extras(name).items()
    }
    batch: Batch
    if spec.inputs is StepLogps:
        following = torch.nn.functional.pad(answers.steps, (0, 1), value=-1)[:, 1:]
        sums = [(token * (following == step)).sum() for step in range(18)]
        ref_sums = [(reference * (following == step)).sum() for step in range(18)]
        counts = torch.stack([((following == step) & mask).sum() for step in range(18)]).to(token.dtype)
        batch = StepLogps(torch.stack(sums), given["advantages"], counts, torch.stack(ref_sums))
    elif spec.inputs is TokenLogps:
        batch = TokenLogps(token, mask, None, reference, given["win_rates"])
    elif spec.inputs is UnpairedLogps:
        batch = UnpairedLogps(
            token.sum(-1), tokens=mask.sum(-1).to(token.dtype), ref_logps=ref_logps, **given
        )
    else:
        batch = ListLogps(token.sum(-1), mask.sum(-1).to(token.dtype), ref_logps=ref_logps, **given)
    loss = build_objective(name, **options).loss(batch)
    return loss.detach(), list(torch.autograd.grad(loss, (hidden, weight)))


def run(
    answers: Answers, name: str, hidden: Tensor, weight: Tensor, *, packed: bool = False, **kwargs: Any
) -> Any:
    given = answers.extras(name)
    if LOSSES[name].uses_reference and "ref_logps" not in kwargs:
        kwargs.setdefault("ref_hidden", answers.packed(answers.ref_hidden) if packed else answers.ref_hidden)
    labels = answers.labels
    if packed:
        hidden, labels = answers.packed(hidden), answers.packed(labels)
        kwargs["layout"] = answers.layout
        if "segment_ids" in given:
            given["segment_ids"] = answers.packed(given["segment_ids"])
    return fused_preference_loss(hidden, weight, labels, loss_type=name, **(given | kwargs))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_dense_fp64(name: str, dtype: torch.dtype, packed: bool) -> None:
    answers = Answers(dtype)
    want, want_grads = dense(answers, name, torch.float64)
    eager, eager_grads = dense(answers, name, dtype)
    hidden = answers.hidden.clone().requires_grad_()
    weight = answers.weight.clone().requires_grad_()
    out = run(answers, name, hidden, weight, packed=packed)
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    for got, truth, plain in zip(
        (out.loss.detach(), *grads), (want, *want_grads), (eager, *eager_grads), strict=True
    ):
        shape = (-1, got.shape[-1]) if got.dim() else (1,)
        if dtype == torch.float64:
            torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)
        else:
            assert_close_to_fp64(got.reshape(shape), truth.reshape(shape), plain.to(got).reshape(shape))


@pytest.mark.parametrize("name", ["kto", "sdpo"])
def test_sums_of_the_reference_are_as_good(name: str) -> None:
    answers = Answers(torch.float64)
    first = run(answers, name, answers.hidden, answers.weight)
    again = run(answers, name, answers.hidden, answers.weight, ref_logps=first.ref_logps)
    assert torch.equal(first.loss, again.loss) and torch.equal(first.rewards, again.rewards)


def test_policy_equal_to_reference_has_no_reward() -> None:
    answers = Answers(torch.bfloat16)
    for execution in (None, Execution(mode="recompute")):
        out = run(
            answers, "kto", answers.hidden, answers.weight.clone().requires_grad_(),
            ref_hidden=answers.hidden, execution=execution,
        )  # fmt: skip
        assert not out.rewards.any()


def test_token_weights_weigh_policy_and_reference() -> None:
    """Twice the weight is twice the log-probabilities of both: the reward doubles."""
    answers = Answers(torch.float64)
    twice = torch.full(answers.labels.shape, 2.0, dtype=torch.float64)
    once = run(answers, "kto", answers.hidden, answers.weight)
    double = run(answers, "kto", answers.hidden, answers.weight, token_weights=twice)
    torch.testing.assert_close(double.rewards, 2 * once.rewards)


def test_items_ranked_in_one_answer() -> None:
    """The items of a list are segments of answers: the same loss as if each were an answer of its own."""
    answers = Answers(torch.float64)
    targets = shift_labels(answers.labels)
    following = torch.nn.functional.pad(answers.steps // 3, (0, 1), value=-1)[:, 1:]
    assert torch.equal(
        following[targets != IGNORED], (torch.arange(6)[:, None] + 0 * targets)[targets != IGNORED]
    )
    whole = run(answers, "plackett_luce", answers.hidden, answers.weight)
    items = run(
        answers,
        "plackett_luce",
        answers.hidden,
        answers.weight,
        segment_ids=answers.steps // 3,
        num_segments=6,
    )
    torch.testing.assert_close(items.loss, whole.loss)


HIDDEN_STATES, HEAD = torch.zeros(4, 6, 8), torch.zeros(11, 8)
LABELS = torch.ones(4, 6, dtype=torch.int64)
GOOD = torch.tensor([True, True, False, False])
KTO = {"loss_type": "kto", "is_desirable": GOOD, "kl": torch.tensor(0.0), "ref_logps": torch.zeros(4)}
LISTS = {
    "loss_type": "sdpo",
    "group_ids": torch.tensor([0, 0, 1, 1]),
    "scores": torch.tensor([1.0, 0.0, 1.0, 0.0]),
    "ref_logps": torch.zeros(4),
}
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    (KTO | {"loss_type": "sigmoid"}, "loss_type: got sigmoid, wanted losses of another kind than pairs"),
    (KTO | {"loss_type": "aligndistil"}, "is_desirable: got a value that aligndistil does not use"),
    (KTO | {"teacher_hidden": HIDDEN_STATES}, "teacher_hidden: got a value that kto does not use"),
    (KTO | {"vocab_size": 5}, "vocab_size: got a value that kto does not use"),
    (KTO | {"is_desirable": None}, "is_desirable: got None, wanted a value for kto"),
    (KTO | {"is_desirable": GOOD.float()}, "is_desirable: got torch.float32, wanted torch.bool"),
    (KTO | {"is_desirable": GOOD[:3]}, "is_desirable: got shape (3,)"),
    (KTO | {"kl": None}, "kl: got None, wanted a value for kto"),
    (KTO | {"scores": torch.zeros(4)}, "scores: got a value that kto does not use, wanted None"),
    (KTO | {"ref_logps": None}, "ref_logps: got no reference"),
    (KTO | {"ref_logps": torch.zeros(3)}, "ref_logps: got shape (3,), wanted (4,) or (4, 6)"),
    (KTO | {"ref_hidden": HIDDEN_STATES}, "ref_logps: got a value together with ref_hidden"),
    (KTO | {"ref_lm_head": HEAD}, "ref_lm_head: got a head without ref_hidden"),
    (
        KTO | {"token_weights": torch.ones(4, 6)},
        "ref_logps (with token_weights): got shape (4,), wanted (4, 6)",
    ),
    (KTO | {"labels": LABELS[0]}, "labels: got shape (6,), wanted (B, T)"),
    (KTO | {"layout": (0, 24)}, "layout: got tuple, wanted None, a PackedLayout or a TokenLayout"),
    (KTO | {"num_rows": 0}, "num_pairs: got 0"),
    (KTO | {"gamma": 1.0}, "gamma: got an option that kto does not have"),
    (LISTS | {"group_ids": None}, "group_ids: got None, wanted a value for sdpo"),
    (LISTS | {"scores": None}, "scores: got None, wanted a value"),
    (
        LISTS | {"scores": torch.tensor([1.0, float("nan"), 0.0, 0.0])},
        "scores: got nan among them, wanted each a finite number",
    ),
    (LISTS | {"group_ids": torch.tensor([0, 0, 1])}, "group_ids: got shape (3,)"),
    (LISTS | {"num_segments": 4}, "num_segments: got a value without segment_ids"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_CALLS, ids=[message[:50] for _, message in BAD_CALLS])
def test_bad_calls(changed: dict[str, Any], message: str) -> None:
    arguments = {"hidden": HIDDEN_STATES, "lm_head": HEAD, "labels": LABELS} | changed
    with pytest.raises(ValueError) as caught:
        fused_preference_loss(**arguments)
    assert message in str(caught.value)


def test_the_calls_that_the_bad_ones_are_made_of_are_good() -> None:
    for arguments in (KTO, LISTS):
        assert fused_preference_loss(HIDDEN_STATES, HEAD, LABELS, **arguments).loss.isfinite()
