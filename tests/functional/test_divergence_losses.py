"""TDPO and AlignDistil from hidden states to the loss: values and gradients against dense fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import (
    Execution,
    LinearLogprobOutput,
    PackedLayout,
    TeacherCombination,
    fused_preference_loss,
    linear_logprob,
    preference_loss_from_logps,
    shift_labels,
    token_divergence,
)
from fastdpo.losses import build_objective
from fastdpo.losses.distillation import TeacherMode, aligndistil_coefficients
from fastdpo.losses.token_batches import TokenDivergences
from fastdpo.testing import assert_close_to_fp64
from fastdpo.testing.accuracy import logps_bound
from tests.ops.test_gemm_passes import count_passes

LENGTHS, H, V, IGNORED = (9, 5, 7, 8, 4, 9), 16, 53, -100
PAIRS = len(LENGTHS) // 2


class Pairs:
    """Three pairs of uneven answers, chosen first, a reference and another teacher."""

    def __init__(self, dtype: torch.dtype) -> None:
        shape = (2 * PAIRS, max(LENGTHS))
        self.is_real = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
        self.labels = torch.randint(V, shape).masked_fill(~self.is_real, IGNORED)
        self.labels[:, :2] = IGNORED
        self.hidden, noise, self.other = torch.randn(3, *shape, H).to(dtype)
        self.reference = self.hidden + 0.3 * noise
        self.weight, self.ref_weight = (torch.randn(2, V, H) * 2 / H**0.5).to(dtype)

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden, weight = (t.to(dtype, copy=True).requires_grad_() for t in (self.hidden, self.weight))
        return hidden, weight

    def log_probs(self, states: Tensor, weight: Tensor) -> Tensor:
        return (states @ weight.T).to(torch.promote_types(states.dtype, torch.float32)).log_softmax(-1)

    @property
    def targets(self) -> Tensor:
        return shift_labels(self.labels)

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()]))


def dense_tdpo(pairs: Pairs, name: str, dtype: torch.dtype, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The paper's formulas, written out."""
    hidden, weight = pairs.leaves(dtype)
    mask = pairs.targets != IGNORED
    log_p = pairs.log_probs(hidden, weight)
    log_q = pairs.log_probs(pairs.reference.to(dtype), pairs.ref_weight.to(dtype))
    label = pairs.targets.clamp(min=0)[..., None]
    u = ((log_p - log_q).gather(-1, label)[..., 0] * mask).sum(1)
    kl = ((log_q.exp() * (log_q - log_p)).sum(-1) * mask).sum(1)
    (u_w, u_l), (k_w, k_l) = u.chunk(2), kl.chunk(2)
    gap = k_l - k_w if name == "tdpo1" else 0.5 * (k_l - k_w.detach())
    losses = -torch.nn.functional.logsigmoid(0.4 * (u_w - u_l - gap))
    loss = (losses * weights.to(losses.dtype)).mean()
    return loss.detach(), list(torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo(name: str, dtype: torch.dtype, is_packed: bool) -> None:
    pairs, weights = Pairs(dtype), torch.tensor([1.0, 0.5, 2.0])
    hidden, weight = pairs.leaves(dtype)
    states: dict[str, Any] = {"ref_lm_head": pairs.ref_weight, "beta": 0.4, "row_weights": weights}
    run = Execution(workspace_mib=1)
    if is_packed:
        real = pairs.is_real
        out = fused_preference_loss(
            hidden[real], weight, pairs.labels[real], ref_hidden=pairs.reference[real], layout=pairs.layout,
            loss_type=name, execution=run, **states,
        )  # fmt: skip
    else:
        out = fused_preference_loss(
            hidden, weight, pairs.labels, ref_hidden=pairs.reference, loss_type=name, execution=run, **states
        )
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    truth, true_grads = dense_tdpo(pairs, name, torch.float64, weights)
    _, eager_grads = dense_tdpo(pairs, name, dtype, weights)
    # At most 8 tokens an answer, four sums of them: 32 errors of a log-probability at the most.
    unit = logps_bound(hidden.shape[-1], dtype)
    assert abs(out.loss.double().item() - truth.item()) < 32 * 0.4 * unit
    assert out.rewards is not None and out.rewards.shape == (2 * PAIRS,) and not out.rewards.requires_grad
    # As the authors log them: the divergence is part of an answer's value.
    kl = [out.metrics[f"kl/{side}"] for side in ("chosen", "rejected")]
    ratios = (out.logps - out.ref_logps).chunk(2)
    for side, value in enumerate(out.rewards.chunk(2)):
        assert kl[side] > 0
        torch.testing.assert_close(value.mean(), 0.4 * (ratios[side].mean() + kl[side]))
    assert (
        out.metrics["rewards/margins"].isfinite() and out.metrics["num_tokens"] == (pairs.targets >= 0).sum()
    )
    for ours, want, plain in zip(grads, true_grads, eager_grads, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)
        else:
            assert_close_to_fp64(ours, want, plain)


def test_policy_equals_reference() -> None:
    """No divergence and no margin: exactly ln 2, and the gradient of DPO there."""
    pairs = Pairs(torch.float32)
    for name in ("tdpo1", "tdpo2"):
        out = fused_preference_loss(
            pairs.hidden, pairs.weight, pairs.labels, ref_hidden=pairs.hidden, loss_type=name
        )
        assert out.loss.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-7)
        assert out.rewards is not None and out.rewards.count_nonzero() == 0


MODES: tuple[TeacherMode, ...] = ("aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive")
BETAS: dict[str, Any] = {"beta": 0.1, "beta2": 0.5}


def distil(pairs: Pairs, hidden: Tensor, weight: Tensor, *, is_packed: bool = False, **options: Any) -> Any:
    """``fused_preference_loss`` with a teacher of two, each token of three answers counting as it does."""
    real = pairs.is_real if is_packed else ...
    given: dict[str, Any] = {
        "loss_type": "aligndistil", "ref_hidden": pairs.other[real], "ref_lm_head": pairs.ref_weight,
        "teacher_hidden": pairs.reference[real], "teacher_lm_head": pairs.ref_weight,
        "execution": Execution(workspace_mib=1), "layout": pairs.layout if is_packed else None, **BETAS,
    }  # fmt: skip
    return fused_preference_loss(hidden[real], weight, pairs.labels[real], **given | options)


def dense_aligndistil(pairs: Pairs, mode: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The authors' code, written out."""
    hidden, weight = pairs.leaves(dtype)
    ref_weight = pairs.ref_weight.to(dtype)
    log_p = pairs.log_probs(hidden, weight)
    first, second = (pairs.log_probs(x.to(dtype), ref_weight) for x in (pairs.reference, pairs.other))
    distance = (first.exp() - second.exp()).abs().sum(-1)
    is_adaptive = mode in ("aligndistil", "theorem1_adaptive")
    w = 0.5 * distance + 1e-3 if is_adaptive else torch.full_like(distance, 0.2)
    scale = 0.1 / w if is_adaptive else 0.5
    first_share, second_share = (1 + w, -w) if mode in ("aligndistil", "theorem1_contrast") else (w, 1 - w)
    teacher = (first_share[..., None] * first + second_share[..., None] * second).log_softmax(-1)
    kl = (log_p.exp() * (log_p - teacher)).sum(-1)
    mask = pairs.targets != IGNORED
    loss = (((scale * kl) * mask).sum(1) / mask.sum(1)).mean()
    return loss.detach(), list(torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_aligndistil(mode: TeacherMode, dtype: torch.dtype, is_packed: bool) -> None:
    pairs = Pairs(dtype)
    hidden, weight = pairs.leaves(dtype)
    out = distil(pairs, hidden, weight, is_packed=is_packed, teacher_mode=mode)
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    truth, true_grads = dense_aligndistil(pairs, mode, torch.float64)
    _, eager_grads = dense_aligndistil(pairs, mode, dtype)
    # Each KL is right to the limit of a log-probability; the mean over the tokens is scaled by at most
    # 0.1 / w, w being at least 0.2 here (0.05 where it varies: the teachers are far apart).
    unit = logps_bound(hidden.shape[-1], dtype)
    assert abs(out.loss.double().item() - truth.item()) < 2 * unit
    for ours, want, plain in zip(grads, true_grads, eager_grads, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)
        else:
            assert_close_to_fp64(ours, want, plain)


def test_aligndistil_by_hand() -> None:
    """The op with the coefficients, and the second half: the same loss and gradient, and the metrics."""
    pairs = Pairs(torch.float64)
    hidden, weight = pairs.leaves(torch.float64)
    whole = distil(pairs, hidden, weight)
    (wanted,) = torch.autograd.grad(whole.loss, hidden)
    mask = pairs.targets != IGNORED
    out = token_divergence(
        hidden, weight, pairs.reference, pairs.targets, ref_lm_head=pairs.ref_weight,
        second_hidden=pairs.other, combination=TeacherCombination(*aligndistil_coefficients(**BETAS)),
        outputs=("reverse_kl", "l1_distance", "logps"), execution=Execution(workspace_mib=1),
    )  # fmt: skip
    assert out.reverse_kl is not None and out.logps is not None and out.l1_distance is not None
    half = preference_loss_from_logps(
        LinearLogprobOutput(out.logps), mask, loss_type="aligndistil",
        reverse_kl=out.reverse_kl, l1_distance=out.l1_distance, **BETAS,
    )  # fmt: skip
    batch = TokenDivergences(out.reverse_kl, mask, l1_distance=out.l1_distance)
    by_hand = build_objective("aligndistil", **BETAS).loss(batch)
    for loss in (half.loss, by_hand):
        torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-13)
    assert whole.ref_logps is None and whole.rewards is None and not whole.logps.requires_grad
    torch.testing.assert_close(whole.logps, (out.logps * mask).sum(1).detach())
    metrics = whole.metrics
    torch.testing.assert_close(metrics["kl/teacher"], (out.reverse_kl * mask).sum(1).mean().detach())
    torch.testing.assert_close(metrics["teachers/l1_distance"], out.l1_distance[mask].mean())
    torch.testing.assert_close(metrics["logps"], whole.logps.mean())
    assert metrics["num_tokens"] == mask.sum()


def test_equal_teachers_are_one() -> None:
    """Then it is reverse-KL distillation of the DPO model, each token scaled by beta / 1e-3; and of a policy
    that is its teacher nothing is left to learn, exactly."""
    pairs = Pairs(torch.float64)
    hidden, weight = pairs.leaves(torch.float64)
    out = distil(pairs, hidden, weight, ref_hidden=pairs.reference)
    kl = token_divergence(
        hidden, weight, pairs.reference, pairs.targets, ref_lm_head=pairs.ref_weight, outputs=("reverse_kl",)
    ).reverse_kl
    assert kl is not None and out.metrics["teachers/l1_distance"] == 0
    means = kl.sum(1) / (pairs.targets != IGNORED).sum(1)
    torch.testing.assert_close(out.loss, 100 * means.mean(), rtol=1e-12, atol=0)
    same = distil(
        pairs, hidden, weight, teacher_mode="theorem1_contrast",
        **dict.fromkeys(("ref_hidden", "teacher_hidden"), pairs.hidden),
        **dict.fromkeys(("ref_lm_head", "teacher_lm_head"), pairs.weight),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(same.loss, hidden)
    assert same.loss.item() == pytest.approx(0, abs=1e-12) and grad.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("needs", "mode", "passes"),
    [("nothing", "auto", 3), ("hidden", "auto", 4), ("both", "auto", 5), ("both", "recompute", 8)],
)
def test_aligndistil_gemm_passes(needs: str, mode: str, passes: int) -> None:
    """Log-probabilities to be looked at cost nothing beside the divergence."""
    pairs = Pairs(torch.float32)
    hidden, weight = pairs.leaves(torch.float32)
    hidden.requires_grad_(needs != "nothing")
    weight.requires_grad_(needs == "both")

    def step() -> None:
        out = distil(pairs, hidden, weight, execution=Execution(mode=mode))
        if needs != "nothing":
            out.loss.backward()

    assert count_passes(step, int((pairs.targets >= 0).sum()), H, V) == passes


def test_heads_padded_to_different_sizes() -> None:
    """All models over the same vocabulary: rows beyond it say nothing and learn nothing."""
    pairs = Pairs(torch.float64)
    hidden, weight = pairs.leaves(torch.float64)
    wide = torch.cat([pairs.weight.double(), torch.randn(3, H).double()]).requires_grad_()
    wider = torch.cat([pairs.ref_weight, torch.randn(5, H).double()])
    padded: dict[str, Any] = {"vocab_size": V, "ref_lm_head": wider}
    tdpo = partial(fused_preference_loss, labels=pairs.labels, ref_hidden=pairs.reference, loss_type="tdpo2")
    for plain, other in (
        (
            distil(pairs, hidden, weight),
            distil(pairs, hidden, wide, teacher_lm_head=wider[: V + 1], **padded),
        ),
        (tdpo(hidden, weight, ref_lm_head=pairs.ref_weight), tdpo(hidden, wide, **padded)),
    ):
        assert torch.equal(plain.loss, other.loss) and torch.equal(plain.logps, other.logps)
        (want,) = torch.autograd.grad(plain.loss, weight)
        (got,) = torch.autograd.grad(other.loss, wide)
        assert torch.equal(got[:V], want) and not got[V:].any()


BAD_DISTILLATION: list[tuple[dict[str, Any], str]] = [
    ({"teacher_hidden": None}, "teacher_lm_head: got a head without teacher_hidden"),
    ({"teacher_hidden": None, "teacher_lm_head": None}, "teacher_hidden: got None, wanted the hidden states"),
    ({"ref_hidden": None, "ref_lm_head": None}, "ref_hidden: got None, wanted the reference's hidden states"),
    ({"teacher_hidden": torch.zeros(6, 8, H)}, "teacher_hidden: got shape (6, 8, 16)"),
    ({"teacher_hidden": torch.zeros(6, 9, 7)}, "teacher_hidden: got shape (6, 9, 7), wanted (..., 16)"),
    ({"ref_hidden": torch.zeros(6, 9, 7)}, "ref_hidden: got shape (6, 9, 7), wanted (..., 16), as its head"),
    ({"teacher_hidden": torch.zeros(6, 9, H).int()}, "teacher_hidden: got torch.int32, wanted torch.float32"),
    ({"ref_hidden": None, "ref_lm_head": None, "ref_logps": torch.zeros(6)}, "ref_hidden: got None"),
    ({"token_weights": torch.ones(6, 9)}, "token_weights: got a value that aligndistil does not use"),
    ({"reverse_kl": torch.ones(6, 9)}, "reverse_kl: got an option that aligndistil does not have"),
    ({"teacher_mode": "kd"}, "teacher_mode: got 'kd', wanted one of aligndistil, theorem1"),
    ({"beta2": 0.0}, "beta2: got 0.0, wanted a number in (0, inf)"),
    (
        {"beta": torch.ones(6), "teacher_mode": "theorem1"},
        "beta: got a tensor of shape (6,), wanted a number",
    ),
    ({"execution": Execution(backend="cuda")}, "execution.backend: got 'cuda'"),
    (
        {"teacher_lm_head": torch.randn(V + 1, H)},
        "teacher_lm_head: got a vocabulary of 54, wanted 53, as lm_head has it, or vocab",
    ),
    ({"vocab_size": V + 1}, "vocab_size: got 54, wanted at most 53, the rows of lm_head"),
    ({"vocab_size": 0}, "vocab_size: got 0, wanted a whole number from 1"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_DISTILLATION, ids=[m[:50] for _, m in BAD_DISTILLATION])
def test_bad_distillation(changed: dict[str, Any], message: str) -> None:
    pairs = Pairs(torch.float32)
    assert distil(pairs, pairs.hidden, pairs.weight).loss.isfinite()
    with pytest.raises(ValueError) as caught:
        distil(pairs, pairs.hidden, pairs.weight, **changed)
    assert message in str(caught.value)


def test_second_half_wants_what_the_first_makes() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    token, values = LinearLogprobOutput(torch.zeros(2, 3)), torch.ones(2, 3)
    half = partial(preference_loss_from_logps, token, mask, loss_type="aligndistil")
    assert half(reverse_kl=values, l1_distance=values).loss.isfinite()
    for given, message in (
        ({"reverse_kl": values}, "l1_distance: got None, wanted a value for aligndistil"),
        ({"l1_distance": values}, "reverse_kl: got None, wanted a value for aligndistil"),
        ({"reverse_kl": values, "l1_distance": values[:1]}, "l1_distance: got shape"),
        ({"reverse_kl": values, "l1_distance": values, "ref_logps": torch.ones(2)}, "ref_logps: got a value"),
    ):
        with pytest.raises(ValueError, match=message):
            half(**given)  # type: ignore[arg-type]


def test_both_ops_agree_on_the_reference() -> None:
    """``token_divergence`` and ``linear_logprob`` see the same labelled tokens."""
    pairs = Pairs(torch.float64)
    scored = linear_logprob(pairs.hidden, pairs.weight, pairs.targets).logps
    kl = token_divergence(pairs.hidden, pairs.weight, pairs.other, pairs.targets).forward_kl
    assert kl is not None
    assert torch.equal(kl == 0, scored == 0)


@pytest.mark.parametrize(
    ("needs", "mode", "passes"),
    [("nothing", "auto", 2), ("hidden", "auto", 4), ("both", "auto", 4), ("hidden", "recompute", 5)],
)
def test_gemm_passes(needs: str, mode: str, passes: int) -> None:
    """Both streams' logits are made once: two ops made them twice, in 6 products (the head trained, in 8)."""
    pairs = Pairs(torch.float32)
    hidden, weight = pairs.leaves(torch.float32)
    hidden.requires_grad_(needs != "nothing")
    weight.requires_grad_(needs == "both")

    def step() -> None:
        out = fused_preference_loss(
            hidden, weight, pairs.labels, ref_hidden=pairs.reference, ref_lm_head=pairs.ref_weight,
            loss_type="tdpo2", execution=Execution(mode=mode),
        )  # fmt: skip
        if needs != "nothing":
            out.loss.backward()

    assert count_passes(step, int((pairs.targets >= 0).sum()), H, V) == passes


def test_metrics() -> None:
    """Means over the pairs of the KLs' sums, beside those of every pair."""
    pairs = Pairs(torch.float64)
    out = fused_preference_loss(
        pairs.hidden, pairs.weight, pairs.labels, ref_hidden=pairs.reference, loss_type="tdpo1"
    )
    kl = token_divergence(pairs.hidden, pairs.weight, pairs.reference, pairs.targets).forward_kl
    assert kl is not None
    sums = kl.sum(1).view(2, PAIRS).mean(1)
    for side, want in zip(("chosen", "rejected"), sums, strict=True):
        torch.testing.assert_close(out.metrics[f"kl/{side}"], want)
    assert {"rewards/accuracies", "rewards/margins", "logps/chosen", "num_tokens"} <= out.metrics.keys()


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"ref_hidden": None}, "ref_hidden: got None, wanted the reference's hidden states for tdpo1"),
    ({"ref_hidden": None, "ref_logps": torch.zeros(6)}, "ref_hidden: got None"),
    ({"token_weights": torch.ones(6, 9)}, "token_weights: got a value that tdpo1 does not use"),
    ({"win_rates": torch.ones(6)}, "win_rates: got a value that tdpo1 does not use"),
    ({"loss_type": ["tdpo1", "sigmoid"]}, "loss_type"),
    ({"execution": Execution(mode="lean")}, "execution.mode: got 'lean'"),
    ({"execution": Execution(backend="cuda")}, "execution.backend: got 'cuda'"),
    ({"execution": Execution(logits_dtype="bf16")}, "execution.logits_dtype: got 'bf16'"),
    ({"ref_lm_head": torch.randn(V + 1, H)}, "ref_lm_head: got a vocabulary of 54"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_CALLS, ids=[message[:40] for _, message in BAD_CALLS])
def test_bad_calls(changed: dict[str, Any], message: str) -> None:
    pairs = Pairs(torch.float32)
    good: dict[str, Any] = {
        "hidden": pairs.hidden, "lm_head": pairs.weight, "labels": pairs.labels,
        "ref_hidden": pairs.reference, "loss_type": "tdpo1",
    }  # fmt: skip
    assert fused_preference_loss(**good).loss.isfinite()
    with pytest.raises(ValueError) as caught:
        fused_preference_loss(**good | changed)
    assert message in str(caught.value)


def test_an_odd_number_of_sequences_is_no_pairs() -> None:
    pairs = Pairs(torch.float32)
    with pytest.raises(ValueError, match="labels: got shape .5, 9., wanted .2P, T."):
        fused_preference_loss(
            pairs.hidden[:5],
            pairs.weight,
            pairs.labels[:5],
            ref_hidden=pairs.reference[:5],
            loss_type="tdpo1",
        )
