"""Log-probabilities of the labels beside a divergence, from the same logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdpo.kernels.divergence as kernel
import fastdpo.ops.divergence_chunks as divergence_chunks
from fastdpo import LMHead, linear_logprob, token_divergence
from fastdpo.ops.gradients import DGroup, Gradients
from fastdpo.testing import assert_logps_close, make_case
from tests.ops.divergence_cases import (
    DIVERGENCES,
    HEADS,
    assert_divergence_right,
    make_divergence_case,
    run_divergence,
    small,
    weighted,
)

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BOTH = ("logps", "ref_logps")


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_beside_one_divergence(name: str, dtype: torch.dtype, head: str) -> None:
    """Part of both D's from the cache, the rest recomputed."""
    assert_divergence_right(make_divergence_case(head, dtype), (name, *BOTH), small())


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("mode", ["cache", "recompute"])
@pytest.mark.parametrize("budget", [1, 64])
def test_modes(mode: str, dtype: torch.dtype, budget: int) -> None:
    """Nothing recomputed, part of it, all of it."""
    case = make_divergence_case("a cap on the policy", dtype)
    execution = small(mode, workspace_mib=budget, cache_mib=budget)
    assert_divergence_right(case, ("forward_kl", "logps"), execution)


@pytest.mark.parametrize("outputs", [("forward_kl", *BOTH), ("jsd", "logps")], ids=str)
def test_with_the_head_frozen(outputs: tuple[str, ...]) -> None:
    """The two products of ``stash`` are the gradient that ``recompute`` makes at once."""
    case = make_divergence_case("a cap on the policy")
    results = []
    for mode in ("stash", "recompute"):
        h = case.policy.hidden.clone().requires_grad_()
        out = run_divergence(case, h, case.policy.weight, case.policy.bias, outputs, small(mode))
        (grad,) = torch.autograd.grad(weighted(case, out, outputs), h)
        results.append((*(getattr(out, name).detach() for name in outputs), grad))
    for ours, other in zip(results[0][:-1], results[1][:-1], strict=True):
        assert torch.equal(ours, other)  # no bit depends on the mode
    torch.testing.assert_close(results[0][-1], results[1][-1], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("cache_mib", [1, 2, 64])
def test_groups_are_as_many_as_the_plan_says(cache_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On their number depends in which dtype dW is summed; two D's are combined in several."""
    groups: list[DGroup] = []
    planned: list[int] = []

    class Counted(Gradients):
        def add_group(self, group: DGroup, *args: Any) -> None:
            groups.append(group)
            planned.append(self.call.plan.weight_grad_groups)
            super().add_group(group, *args)

    monkeypatch.setattr(divergence_chunks, "Gradients", Counted)
    case, outputs = make_divergence_case("plain", length=200), ("forward_kl", "logps")
    h, w = case.policy.hidden.clone().requires_grad_(), case.policy.weight.clone().requires_grad_()
    out = run_divergence(case, h, w, None, outputs, small("cache", cache_mib=cache_mib))
    torch.autograd.grad(weighted(case, out, outputs), (h, w))
    assert len(groups) == planned[0] > 2
    bounds = [(group.start, group.stop) for group in groups]
    assert bounds[0][0] == 0 and bounds[-1][1] == int(case.scored.sum())
    assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:], strict=False))


@pytest.mark.parametrize("num_teachers", [1, 2])
def test_beside_several_divergences(num_teachers: int) -> None:
    case = make_divergence_case("one tile wide", num_teachers=num_teachers)
    assert_divergence_right(case, (*DIVERGENCES, *BOTH), small(), value_factor=5.0)
    assert_divergence_right(case, ("reverse_kl", *BOTH), small(), value_factor=5.0)


@pytest.mark.parametrize("used", ["forward_kl", "logps"])
@pytest.mark.parametrize("mode", ["stash", "cache", "recompute"])
def test_a_loss_of_one_of_the_two(mode: str, used: str) -> None:
    """What a loss does not look at changes nothing, in any mode."""
    case = make_divergence_case("plain")
    grads = []
    for outputs in (
        (("forward_kl", "logps"), ("forward_kl",)) if used == "forward_kl" else (("jsd", "logps"),)
    ):
        h = case.policy.hidden.clone().requires_grad_()
        w = case.policy.weight.clone().requires_grad_(mode != "stash")
        out = run_divergence(case, h, w, None, outputs, small(mode))
        leaves = [h] if mode == "stash" else [h, w]
        grads.append(torch.autograd.grad(weighted(case, out, (used,)), leaves))
    if used == "logps":
        h, w = (t.detach().clone().requires_grad_() for t in (case.policy.hidden, case.policy.weight))
        scored = linear_logprob(h, replace(case.policy.lm_head, weight=w), case.policy.labels).logps
        loss = (scored * case.upstream[3]).sum()
        grads.append(torch.autograd.grad(loss, [h, w][: len(grads[0])]))
    for ours, want in zip(*grads, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_they_are_those_of_linear_logprob(dtype: torch.dtype) -> None:
    """By its limits; not its bits, for its chunks have the workspace to themselves."""
    case = make_divergence_case("a cap on the teacher", dtype)
    policy, (teacher,) = case.policy, case.teachers
    out = run_divergence(case, policy.hidden, policy.weight, policy.bias, ("forward_kl", *BOTH), small())
    for got, one in ((out.logps, policy), (out.ref_logps, teacher)):
        want = linear_logprob(one.hidden, one.lm_head, policy.labels).logps
        assert got is not None and got.dtype == want.dtype
        assert_logps_close(got, want.double(), dtype, hidden_size=one.hidden.shape[-1])


@pytest.mark.parametrize("mode", ["score", "stash", "cache", "recompute"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_the_same_model_twice_has_a_log_ratio_of_exactly_0(dtype: torch.dtype, mode: str) -> None:
    case = make_case(batch=3, length=40, dtype=dtype, softcap=20.0)
    h = case.hidden.clone().requires_grad_(mode != "score")
    w = case.weight.clone().requires_grad_(mode in ("cache", "recompute"))
    head = replace(case.lm_head, weight=w)
    out = token_divergence(
        h, head, case.hidden, case.labels, outputs=("forward_kl", *BOTH), execution=small(mode)
    )
    assert out.logps is not None and out.ref_logps is not None and out.forward_kl is not None
    assert torch.equal(out.logps, out.ref_logps) and out.logps.count_nonzero() > 0
    assert out.forward_kl.count_nonzero() == 0
    assert out.logps.requires_grad == (mode != "score") and not out.ref_logps.requires_grad


def test_a_label_that_is_no_token() -> None:
    """NaN for it alone, as in ``linear_logprob``; its divergence is what it was."""
    case = make_divergence_case("plain")
    row = tuple(case.scored.nonzero()[5].tolist())
    outputs = ("forward_kl", *BOTH)
    clean = run_divergence(case, case.policy.hidden, case.policy.weight, None, outputs, small())
    case.policy.labels[row] = case.policy.weight.shape[0]
    h = case.policy.hidden.clone().requires_grad_()
    out = run_divergence(case, h, case.policy.weight, None, outputs, small())
    others = torch.ones_like(case.scored)
    others[row] = False
    for name in BOTH:
        ours, want = getattr(out, name), getattr(clean, name)
        assert ours[row].isnan() and torch.equal(ours[others], want[others])
    assert out.forward_kl is not None and torch.equal(out.forward_kl, clean.forward_kl)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(out.logps[others].sum(), h)  # type: ignore[index]
    assert grad.isfinite().all()


def test_no_tokens() -> None:
    case = make_divergence_case("plain")
    case.policy.labels.fill_(-100)
    h, w = case.policy.hidden.clone().requires_grad_(), case.policy.weight.clone().requires_grad_()
    outputs = ("forward_kl", *BOTH)
    out = run_divergence(case, h, w, None, outputs)
    assert out.logps is not None and out.logps.count_nonzero() == 0
    for grad in torch.autograd.grad(weighted(case, out, outputs), (h, w)):
        assert grad.count_nonzero() == 0


def _no_one_hot(p: Tensor, labels: Tensor) -> Tensor:
    return p


def _next_label(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(1, (labels[:, None] + 1) % values.shape[1])[:, 0]


BUGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "no one-hot in D": ("_minus_d_of_logps_", _no_one_hot),
    "the next token's log-probability": ("_at_labels", _next_label),
    "no slope of the cap": ("_write_d", lambda d, cap_slope, d_out: d_out.copy_(d)),
}


@pytest.mark.parametrize("mode", ["cache", "recompute"])
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bugs_are_found(bug: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, outputs = make_divergence_case("a cap on the policy"), ("forward_kl", *BOTH)
    execution = small(mode, cache_mib=64, backend="reference")
    assert_divergence_right(case, outputs, execution)
    monkeypatch.setattr(kernel, *BUGS[bug])
    with pytest.raises(AssertionError):
        assert_divergence_right(case, outputs, execution)


@pytest.mark.parametrize("needs_weight", [False, True], ids=["stash", "cache"])
@pytest.mark.parametrize("num_teachers", [1, 2])
def test_to_be_looked_at_alone(num_teachers: int, needs_weight: bool) -> None:
    """The same bits and the divergence's own gradient, and nothing kept beside it."""
    case = make_divergence_case("a cap on the policy", num_teachers=num_teachers)
    results, sizes = [], []
    for outputs, options in (
        (("reverse_kl", *BOTH), {}),
        (("reverse_kl", *BOTH), {"logps_requires_grad": False}),
        (("reverse_kl",), {}),
    ):
        h = case.policy.hidden.clone().requires_grad_()
        w = case.policy.weight.clone().requires_grad_(needs_weight)
        saved: list[int] = []

        def keep(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = run_divergence(case, h, w, case.policy.bias, outputs, small(), **options)
        assert out.reverse_kl is not None
        (wanted, *others) = (h, w) if needs_weight else (h,)
        loss = (out.reverse_kl * case.upstream[1]).sum()
        results.append((out, torch.autograd.grad(loss, (wanted, *others))))
        sizes.append(sum(saved))
    (both, _), (alone, grads), (_, plain_grads) = results
    assert both.logps is not None and both.logps.requires_grad
    assert alone.logps is not None and not alone.logps.requires_grad
    for name in ("reverse_kl", *BOTH):
        assert torch.equal(getattr(both, name), getattr(alone, name))
    for ours, want in zip(grads, plain_grads, strict=True):
        assert torch.equal(ours, want)
    assert sizes[0] > sizes[1] == sizes[2]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_first_rows_of_every_head(dtype: torch.dtype) -> None:
    """``vocab_size``: as if the other rows, and the bias's, were not there."""
    case = make_divergence_case("plain", dtype, num_teachers=2)
    size = case.policy.weight.shape[0]

    def padded(head: LMHead, rows: int) -> LMHead:
        more = torch.full((rows, head.weight.shape[1]), 3.0, dtype=dtype)
        return replace(head, weight=torch.cat([head.weight, more]))

    first, second = case.teachers
    results = []
    for rows in ((0, 0, 0), (2, 0, 5)):
        heads = (case.policy.lm_head, first.lm_head, second.lm_head)
        policy, *others = (padded(head, more) for head, more in zip(heads, rows, strict=True))
        weight = policy.weight.detach().requires_grad_()
        out = token_divergence(
            case.policy.hidden, replace(policy, weight=weight), first.hidden, case.policy.labels,
            ref_lm_head=others[0], second_hidden=second.hidden, second_lm_head=others[1],
            combination=case.combination, outputs=("reverse_kl", "logps", "l1_distance"), vocab_size=size,
        )  # fmt: skip
        assert out.reverse_kl is not None and out.logps is not None
        (out.reverse_kl.sum() + out.logps.sum()).backward()
        assert weight.grad is not None
        results.append((out.reverse_kl, out.logps, out.l1_distance, weight.grad[:size]))
        assert not weight.grad[size:].any()
    for ours, want in zip(*results, strict=True):
        assert ours is not None and want is not None and torch.equal(ours, want)
