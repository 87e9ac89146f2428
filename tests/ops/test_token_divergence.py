"""``token_divergence`` against fp64, and by its identities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdpo.kernels.divergence as kernel
from fastdpo import LMHead, TeacherCombination, TokenLayout, token_divergence
from fastdpo.kernels.divergence import divergence_rows, l1_distance
from fastdpo.losses.distillation import aligndistil_coefficients, aligndistil_teacher
from fastdpo.testing import make_case
from tests.ops.divergence_cases import (
    DIFFERENTIABLE,
    DIVERGENCES,
    HEADS,
    MIX,
    DivergenceCase,
    assert_divergence_right,
    dense_divergence,
    make_divergence_case,
    run_divergence,
    small,
    weighted,
)

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_divergence(name: str, dtype: torch.dtype, head: str) -> None:
    """Part of D from the cache, the rest recomputed, a ragged vocabulary, ignored rows."""
    assert_divergence_right(make_divergence_case(head, dtype), (name,), small())


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("outputs", [("jsd", "forward_kl"), DIVERGENCES], ids=str)
def test_several_at_once(outputs: tuple[str, ...], dtype: torch.dtype, head: str) -> None:
    assert_divergence_right(make_divergence_case(head, dtype), outputs, small())


@pytest.mark.parametrize("mode", ["stash", "cache", "recompute"])
@pytest.mark.parametrize("workspace_mib", [1, 64])
def test_modes(mode: str, workspace_mib: int) -> None:
    case = make_divergence_case("a cap on the policy")
    if mode != "stash":
        assert_divergence_right(case, ("reverse_kl",), small(mode, workspace_mib=workspace_mib))
        return
    results = []
    for run_mode in (mode, "recompute"):
        h = case.policy.hidden.clone().requires_grad_()
        execution = small(run_mode, workspace_mib=workspace_mib)
        out = run_divergence(case, h, case.policy.weight, case.policy.bias, ("reverse_kl",), execution)
        assert out.reverse_kl is not None
        (grad,) = torch.autograd.grad(weighted(case, out, ("reverse_kl",)), h)
        results.append((out.reverse_kl.detach(), grad))
    assert torch.equal(results[0][0], results[1][0])  # no bit depends on the mode
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("outputs", [("reverse_kl", "l1_distance"), (*DIVERGENCES, "l1_distance")], ids=str)
def test_two_teachers(outputs: tuple[str, ...], dtype: torch.dtype, head: str) -> None:
    """a and b, up to 2.9 and 1.9 here, multiply the errors of the teachers' logits."""
    case = make_divergence_case(head, dtype, num_teachers=2)
    assert_divergence_right(case, outputs, small(), value_factor=5.0)


def test_gradients_in_fp64_by_finite_differences() -> None:
    torch.manual_seed(1)
    h, w = (torch.randn(n, 4, dtype=FP64, requires_grad=True) for n in (5, 9))
    b = torch.randn(9, dtype=FP64, requires_grad=True)
    states, weights = torch.randn(2, 5, 3, dtype=FP64), torch.randn(2, 9, 3, dtype=FP64)
    labels = torch.tensor([0, 8, -100, 3, 3])

    def results(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        head = LMHead(w, bias=b, softcap=2.0, logit_scale=0.7, temperature=1.3)
        out = token_divergence(
            h, head, states[0], labels, ref_lm_head=weights[0], second_hidden=states[1],
            second_lm_head=weights[1], combination=MIX, outputs=DIVERGENCES, jsd_beta=0.8,
        )  # fmt: skip
        return tuple(value for value in out if value is not None)

    assert torch.autograd.gradcheck(results, (h, w, b))


@pytest.mark.parametrize("mode", ["cache", "recompute"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_the_same_model_twice_is_exactly_0(dtype: torch.dtype, mode: str) -> None:
    """Values and gradients: two products of one shape have the same bits, and so has all that follows."""
    case = make_case(batch=3, length=40, dtype=dtype, softcap=20.0)
    h, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    head = replace(case.lm_head, weight=w)
    for name in DIVERGENCES:
        out = token_divergence(h, head, case.hidden, case.labels, outputs=(name,), execution=small(mode))
        value = getattr(out, name)
        assert value.count_nonzero() == 0, name
        for grad in torch.autograd.grad(value.sum(), (h, w)):
            assert grad.count_nonzero() == 0, name


def _bare(case: DivergenceCase, swapped: bool = False, **kwargs: Any) -> Any:
    policy, (teacher,) = case.policy, case.teachers
    if swapped:
        policy, teacher = teacher, policy
    return token_divergence(
        policy.hidden,
        policy.lm_head,
        teacher.hidden,
        case.policy.labels,
        ref_lm_head=teacher.lm_head,
        **kwargs,
    )


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_identities(head: str) -> None:
    """KL(p || q) is KL(q || p) of the roles exchanged; JSD_b is JSD_(1 - b) of them, at most H(b)."""
    case = make_divergence_case(head, FP64)
    ours, swapped = (_bare(case, s, outputs=("forward_kl", "reverse_kl")) for s in (False, True))
    torch.testing.assert_close(ours.forward_kl, swapped.reverse_kl)
    torch.testing.assert_close(ours.reverse_kl, swapped.forward_kl)
    assert ours.forward_kl[case.scored].median() > 0.1
    for beta in (0.5, 0.1):
        one = _bare(case, outputs=("jsd",), jsd_beta=beta).jsd
        other = _bare(case, True, outputs=("jsd",), jsd_beta=1 - beta).jsd
        torch.testing.assert_close(one, other)
        bound = torch.special.entr(torch.tensor([beta, 1 - beta])).sum()
        assert (one >= 0).all() and (one < bound).all() and (one[case.scored] > 0).all()
    default = _bare(case, outputs=("jsd",)).jsd
    assert torch.equal(default, _bare(case, outputs=("jsd",), jsd_beta=0.5).jsd)


def test_the_limits_of_jsd_are_the_kls() -> None:
    """JSD_b / b goes to KL(q || p) for b -> 0, and JSD_b / (1 - b) to KL(p || q) for b -> 1."""
    case = make_divergence_case("one tile wide", FP64)
    kls = _bare(case, outputs=("forward_kl", "reverse_kl"))
    small_beta = 2.0**-40
    for beta, want in ((small_beta, kls.forward_kl), (1 - small_beta, kls.reverse_kl)):
        got = _bare(case, outputs=("jsd",), jsd_beta=beta).jsd / small_beta
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_one_teacher_out_of_two() -> None:
    case = make_divergence_case("a cap on the teacher", FP64, num_teachers=2)
    tensors = (case.policy.hidden, case.policy.weight, case.policy.bias)
    for i, combination in ((0, TeacherCombination(1, 0)), (1, TeacherCombination(0.0, 1.0))):
        both = run_divergence(replace(case, combination=combination), *tensors, DIVERGENCES)
        alone = replace(case, teachers=(case.teachers[i],), combination=None)
        single = run_divergence(alone, *tensors, DIVERGENCES)
        for got, want in zip(both, single, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive"])
def test_coefficients_from_the_distance_are_aligndistils(mode: Any) -> None:
    """In one pass by their slopes, as with the distance of a first pass given back as tensors."""
    case = make_divergence_case("one tile wide", FP64, num_teachers=2)
    tensors = (case.policy.hidden, case.policy.weight, case.policy.bias)
    outputs = ("reverse_kl", "l1_distance")
    any_mix = replace(case, combination=TeacherCombination(1.0, 0.0))
    distance = run_divergence(any_mix, *tensors, outputs).l1_distance
    assert distance is not None and (distance <= 2).all() and distance[case.scored].median() > 0.1
    given = aligndistil_teacher(distance, mode=mode)
    two_passes = run_divergence(
        replace(case, combination=TeacherCombination(given.first, given.second)), *tensors, outputs
    )
    slopes = TeacherCombination(*aligndistil_coefficients(mode=mode))
    one_pass = run_divergence(replace(case, combination=slopes), *tensors, outputs)
    torch.testing.assert_close(one_pass.reverse_kl, two_passes.reverse_kl)
    torch.testing.assert_close(one_pass.l1_distance, distance)


@pytest.mark.parametrize("spread", [1e-3, 100.0])
def test_flat_and_peaked_logits(spread: float) -> None:
    """Peaked, logits are in the hundreds; values are held to what an error of logits of eps does to them.

    It moves log p and log q by 2 eps at most and p and q by the factor 2 eps, hence sum q delta by
    4 eps + 2 eps sum q |delta|; eps is twice that of plain products, whose order of sums is another.
    """
    case = make_divergence_case("plain")
    (teacher,) = case.teachers
    case = replace(
        case,
        policy=replace(case.policy, weight=case.policy.weight * (spread / 3)),
        teachers=(replace(teacher, weight=teacher.weight * (spread / 3)),),
    )
    p, (q,) = case.policy, case.teachers
    h, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    wide, wide_w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    ours, truth = (
        run_divergence(case, h, w, None, DIVERGENCES, small()),
        dense_divergence(case, wide, wide_w, None, FP64),
    )
    eps = 2 * max(
        float((one.hidden @ one.weight.T - one.hidden.double() @ one.weight.double().T).abs().max())
        for one in (p, q)
    )
    for name in DIVERGENCES:
        want = getattr(truth, name)
        error = (getattr(ours, name).double() - want).abs()
        assert (error <= 4 * eps + 2 * eps * (want + 1) + 1e-6).all(), (name, error.max(), eps)
        assert want[case.scored].min() > (0.5 if spread > 1 else 0)
    loss = weighted(case, ours, ("forward_kl",))
    for got, want in zip(
        torch.autograd.grad(loss, (h, w)),
        torch.autograd.grad(weighted(case, truth, ("forward_kl",)), (wide, wide_w)),
        strict=True,
    ):
        # D = p - q moves by 2 eps (p + q), and |dhidden| by that times the largest weight; |dweight| likewise
        largest = max(float(w.abs().max()), float(h.abs().max())) * float(case.upstream.abs().max())
        rows = 1 if got.shape == h.shape else int(case.scored.sum())
        assert (got.double() - want).abs().max() <= (4 * eps + 1e-6) * largest * rows


def test_masked_vocabularies() -> None:
    """Masked in both heads: nothing. In the teacher alone KL(p || q) is infinite, else KL(q || p)."""
    case = make_divergence_case("a cap on the teacher", FP64)
    policy, (teacher,) = case.policy, case.teachers
    policy, teacher = replace(policy, softcap=None), replace(teacher, softcap=None, logit_scale=0.5)
    case = replace(case, policy=policy, teachers=(teacher,))
    assert policy.bias is not None and teacher.bias is not None
    policy.bias[100:900] = -torch.inf
    teacher.bias[100:900] = -torch.inf
    h, w, b = (t.clone().requires_grad_() for t in (policy.hidden, policy.weight, policy.bias))
    out = run_divergence(case, h, w, b, DIVERGENCES)
    keep = torch.cat((torch.arange(100), torch.arange(900, 1003)))

    def kept(one: Any) -> Any:
        return replace(one, weight=one.weight[keep], bias=one.bias[keep])

    fewer = replace(case, policy=kept(policy), teachers=(kept(teacher),))
    want = run_divergence(fewer, policy.hidden, fewer.policy.weight, fewer.policy.bias, DIVERGENCES)
    for ours, truth in zip(out, want, strict=True):
        assert (ours is None) == (truth is None)
        if ours is not None:
            torch.testing.assert_close(ours, truth)
    for grad in torch.autograd.grad(weighted(case, out, DIVERGENCES), (h, w)):
        assert grad.isfinite().all()

    teacher.bias[5] = -torch.inf
    out = run_divergence(case, h, w, b, DIVERGENCES)
    assert out.forward_kl is not None and out.reverse_kl is not None and out.jsd is not None
    scored = case.scored
    assert (out.reverse_kl[scored] == torch.inf).all() and out.forward_kl.isfinite().all()
    assert out.jsd.isfinite().all()
    for name in ("forward_kl", "jsd"):
        loss = getattr(run_divergence(case, h, w, b, (name,)), name).sum()
        assert torch.autograd.grad(loss, h)[0].isfinite().all()
    policy.bias[7] = -torch.inf
    out = run_divergence(case, policy.hidden, policy.weight, policy.bias, DIVERGENCES)
    assert out.forward_kl is not None and (out.forward_kl[scored] == torch.inf).all()
    assert out.jsd is not None and out.jsd.isfinite().all()


def test_a_bad_row_stays_alone() -> None:
    case = make_divergence_case("plain")
    row = tuple(case.scored.nonzero()[7].tolist())
    for tensor in (case.policy.hidden, case.teachers[0].hidden):
        clean = run_divergence(case, case.policy.hidden, case.policy.weight, None, DIVERGENCES)
        good, tensor[row] = tensor[row].clone(), torch.nan
        h = case.policy.hidden.clone().requires_grad_()
        dirty = run_divergence(case, h, case.policy.weight, None, DIVERGENCES)
        (grad,) = torch.autograd.grad(weighted(case, dirty, DIVERGENCES), h)
        tensor[row] = good
        others = torch.ones_like(case.scored)
        others[row] = False
        for name in DIVERGENCES:
            ours, want = getattr(dirty, name), getattr(clean, name)
            assert ours[row].isnan() and torch.equal(ours[others], want[others])
        assert grad[row].isnan().all() and grad[others].isfinite().all()


@pytest.mark.parametrize("outputs", [("forward_kl",), DIVERGENCES], ids=str)
def test_no_tokens(outputs: tuple[str, ...]) -> None:
    case = make_divergence_case("plain", num_teachers=2)
    case.policy.labels.fill_(-100)
    h, w = case.policy.hidden.clone().requires_grad_(), case.policy.weight.clone().requires_grad_()
    out = run_divergence(case, h, w, None, (*outputs, "l1_distance"))
    assert all(value is None or value.count_nonzero() == 0 for value in out)
    for grad in torch.autograd.grad(weighted(case, out, outputs), (h, w)):
        assert grad.count_nonzero() == 0
    none = token_divergence(h[:0], w, case.policy.hidden[:0], case.policy.labels[:0])
    assert none.forward_kl is not None and none.forward_kl.shape == (0, 64)


@pytest.mark.parametrize("kind", ["given", "repeated"])
def test_index_and_layout(kind: str) -> None:
    """Positions given, and rows of hidden that occur twice, whose gradients add up."""
    case = make_divergence_case("plain", FP64, num_teachers=2)
    flat = case.scored.flatten().nonzero()[:, 0]
    coefficients = torch.rand(2, *case.scored.shape, dtype=FP64)
    first, second = case.teachers
    teachers: dict[str, Any] = {
        "ref_lm_head": first.weight, "second_hidden": second.hidden, "second_lm_head": second.weight,
        "outputs": DIFFERENTIABLE,
    }  # fmt: skip

    def loss(labels: Any, mix: Tensor, upstream: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        h = case.policy.hidden.clone().requires_grad_()
        out = token_divergence(
            h,
            case.policy.weight,
            first.hidden,
            labels,
            combination=TeacherCombination(*mix),
            **teachers,
            **kwargs,
        )
        values = torch.stack([getattr(out, name) for name in DIFFERENTIABLE])
        return values.detach(), torch.autograd.grad((values * upstream).sum(), h)[0]

    found, grad = loss(case.policy.labels, coefficients, case.upstream.double())
    if kind == "given":
        ours, our_grad = loss(case.policy.labels, coefficients, case.upstream.double(), token_index=flat)
        torch.testing.assert_close(ours, found)
    else:
        twice = flat.repeat(2)
        layout = TokenLayout(twice, case.policy.labels.flatten()[twice], torch.zeros_like(twice))
        ours, our_grad = loss(
            layout, coefficients.flatten(1)[:, twice], case.upstream.double().flatten(1)[:, twice] / 2
        )
        torch.testing.assert_close(ours, found.flatten(1)[:, twice])
    torch.testing.assert_close(our_grad, grad)


def test_teachers_are_constants() -> None:
    """Whatever requires a gradient there gets none, also where the teacher's head is the policy's own."""
    case = make_divergence_case("plain", FP64)
    h, w = case.policy.hidden.clone().requires_grad_(), case.policy.weight.clone().requires_grad_()
    other = torch.randn_like(h).requires_grad_()
    loss = token_divergence(h, w, other, case.policy.labels).forward_kl.sum()  # type: ignore[union-attr]
    dhidden, dweight, dother = torch.autograd.grad(loss, (h, w, other), allow_unused=True)
    assert dother is None
    shared = replace(case, teachers=(replace(case.policy, hidden=other.detach()),))
    dense = dense_divergence(shared, h, w, None, FP64).forward_kl
    assert dense is not None
    for ours, want in zip((dhidden, dweight), torch.autograd.grad(dense.sum(), (h, w)), strict=True):
        torch.testing.assert_close(ours, want)


def _without_cap_slope(*args: Any, **kwargs: Any) -> None:
    divergence_rows(*args[:3], replace(args[3], softcap=None), *args[4:], **kwargs)


def _exchanged_jsd(*args: Any, jsd_beta: float, **kwargs: Any) -> None:
    divergence_rows(*args, jsd_beta=1 - jsd_beta, **kwargs)


BUGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "no slope of the cap": ("divergence_rows", _without_cap_slope),
    "weights of the JSD exchanged": ("divergence_rows", _exchanged_jsd),
    "half the distance": ("l1_distance", lambda *teachers: l1_distance(*teachers) / 2),
    "second teacher left out": ("combine", lambda first, second, c: first.mul_(c[0, :, None])),
}


def _shifted(**terms: float) -> Callable[..., None]:
    """``divergence_rows`` with D changed by so much of p and q."""

    def wrong(
        logits: Tensor, teacher: Tensor, *args: Any, d_out: Tensor | None = None, **kwargs: Any
    ) -> None:
        p, q = logits.softmax(1), teacher.softmax(1)
        divergence_rows(logits, teacher, *args, d_out=d_out, **kwargs)
        if d_out is not None:
            d_out.add_(terms.get("p", 0.0) * p + terms.get("q", 0.0) * q)

    return wrong


BUGS["a term of p dropped"] = ("divergence_rows", _shifted(p=-0.05))


BUGS["a term of q dropped"] = ("divergence_rows", _shifted(q=0.05))


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bugs_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of these tests fails where a term is missing; it passes without."""
    case = make_divergence_case("a cap on the policy", num_teachers=2)
    outputs = (*DIVERGENCES, "l1_distance")
    assert_divergence_right(case, outputs, small(backend="reference"), value_factor=5.0)
    name, wrong = BUGS[bug]
    monkeypatch.setattr(kernel, name, wrong)
    with pytest.raises(AssertionError):
        assert_divergence_right(case, outputs, small(backend="reference"), value_factor=5.0)
