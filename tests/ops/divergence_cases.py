"""What the tests of ``token_divergence`` share: data with a teacher of its own size, and the dense truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo import Execution, LMHead, TeacherCombination, TokenDivergenceOutput, token_divergence
from fastdpo.definitions.logprob import combined_logits, divergences_reference, head_logits
from fastdpo.testing import Case, assert_close_to_fp64, assert_logps_close, make_case

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
DIFFERENTIABLE = (*DIVERGENCES, "logps")
HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"has_bias": False}, {"has_bias": False}),
    "a cap on the policy": ({"softcap": 5.0, "logit_scale": 0.3, "temperature": 1.4}, {"has_bias": False}),
    "a cap on the teacher": ({}, {"softcap": 20.0, "logit_scale": -0.5, "temperature": 0.8}),
    "one tile wide": ({"vocab": 16, "logit_scale": -2.0}, {"vocab": 16}),
}
MIX = TeacherCombination(1.3, -0.3, 0.8, -0.8)


@dataclass(frozen=True, eq=False)
class DivergenceCase:
    """A policy, one teacher or two, and the gradients that come back to what is made of them."""

    policy: Case
    teachers: tuple[Case, ...]
    upstream: Tensor  # (4, B, T)
    combination: TeacherCombination | None = None
    jsd_beta: float = 0.3

    @property
    def scored(self) -> Tensor:
        return self.policy.labels != -100


def make_divergence_case(
    head: str = "plain",
    dtype: torch.dtype = torch.float32,
    *,
    num_teachers: int = 1,
    batch: int = 3,
    length: int = 64,
    device: str = "cpu",
) -> DivergenceCase:
    """Teachers differ from the policy in hidden size, transform and data, and from each other in data."""
    of_policy, of_teacher = HEADS[head]
    policy = make_case(batch=batch, length=length, dtype=dtype, device=device, **of_policy)
    teachers = tuple(
        make_case(
            batch=batch, length=length, hidden_size=48, dtype=dtype, seed=1 + i, device=device, **of_teacher
        )
        for i in range(num_teachers)
    )
    turned = (policy.upstream.flip(0), policy.upstream.flip(1), policy.upstream.flip(0, 1))
    upstream = torch.stack((policy.upstream, *turned))
    return DivergenceCase(policy, teachers, upstream, MIX if num_teachers == 2 else None)


def small(mode: str = "auto", **kwargs: Any) -> Execution:
    """Budgets of 1 MiB: several chunks, part of D cached, the rest recomputed."""
    return Execution(**{"mode": mode, "workspace_mib": 1, "cache_mib": 1} | kwargs)


def run_divergence(
    case: DivergenceCase,
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    outputs: tuple[str, ...],
    execution: Execution | None = None,
    **options: Any,
) -> TokenDivergenceOutput:
    """`token_divergence` on a case."""
    first, *others = case.teachers
    if others:
        options |= {
            "second_hidden": others[0].hidden,
            "second_lm_head": others[0].lm_head,
            "combination": case.combination,
        }
    return token_divergence(
        h,
        replace(case.policy.lm_head, weight=w, bias=b),
        first.hidden,
        case.policy.labels,
        ref_lm_head=first.lm_head,
        outputs=outputs,
        jsd_beta=case.jsd_beta if "jsd" in outputs else None,
        execution=execution,
        **options,
    )


def dense_divergence(
    case: DivergenceCase, h: Tensor, w: Tensor, b: Tensor | None, dtype: torch.dtype
) -> TokenDivergenceOutput:
    """The definition, all logits at once: in fp64, or as plain torch has it in the inputs' dtype."""

    def logits(head: LMHead, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if dtype == torch.float64:
            return head_logits(hidden.double(), replace(head, weight=weight, bias=bias))
        z = head.logit_scale * F.linear(hidden, weight, bias)
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        return (z / head.temperature).to(torch.promote_types(dtype, torch.float32))

    z = logits(case.policy.lm_head, h, w, b)
    teachers = [logits(t.lm_head, t.hidden, t.weight, t.bias) for t in case.teachers]
    distance = None
    if case.combination is not None:
        teachers[0], distance = combined_logits(*teachers, case.combination)
    results = divergences_reference(z, teachers[0], jsd_beta=case.jsd_beta)
    label = case.policy.labels.clamp(min=0)[..., None]
    logps, ref_logps = (x.log_softmax(-1).gather(-1, label)[..., 0] for x in (z, teachers[0]))
    results = results._replace(logps=logps, ref_logps=ref_logps)
    masked = (None if value is None else value.where(case.scored, 0.0) for value in results)
    return TokenDivergenceOutput(*masked)._replace(
        l1_distance=None if distance is None else distance.where(case.scored, 0.0)
    )


def weighted(case: DivergenceCase, out: TokenDivergenceOutput, outputs: tuple[str, ...]) -> Tensor:
    """A loss: every result of every token has its own gradient."""
    total = torch.zeros((), device=case.upstream.device)
    for i, name in enumerate(DIFFERENTIABLE):
        if name in outputs:
            value = getattr(out, name)
            total = total + (value * case.upstream[i].to(value.dtype)).sum()
    return total


def assert_divergence_right(
    case: DivergenceCase,
    outputs: tuple[str, ...],
    execution: Execution | None = None,
    *,
    value_factor: float = 1.0,
) -> None:
    """Values to the limits of a log-probability (times ``value_factor``), gradients to the block rule."""
    dtype = case.policy.hidden.dtype
    results = []
    for of in ("ours", "truth", "eager"):
        tensors = (case.policy.hidden, case.policy.weight, case.policy.bias)
        wide = torch.float64 if of == "truth" else dtype
        leaves = [None if t is None else t.detach().to(wide).requires_grad_() for t in tensors]
        if of == "ours":
            out = run_divergence(case, *leaves, outputs, execution)  # type: ignore[arg-type]
        else:
            out = dense_divergence(case, *leaves, wide)  # type: ignore[arg-type]
        wanted = [leaf for leaf in leaves if leaf is not None]
        results.append((out, torch.autograd.grad(weighted(case, out, outputs), wanted)))
    (ours, our_grads), (truth, true_grads), (_, eager_grads) = results
    for name in TokenDivergenceOutput._fields:
        got, want = getattr(ours, name), getattr(truth, name)
        assert (got is not None) == (name in outputs)
        if got is None:
            continue
        assert got[~case.scored].count_nonzero() == 0
        got, want = got.detach() / value_factor, want.detach() / value_factor
        assert_logps_close(got, want, dtype, hidden_size=case.policy.hidden.shape[-1], name=name)
    for name, got, want, plain in zip(
        ("dhidden", "dweight", "dbias"), our_grads, true_grads, eager_grads, strict=False
    ):
        assert got.dtype == dtype
        if name == "dhidden":
            assert got[~case.scored].count_nonzero() == 0
            got, want, plain = (x.flatten(0, 1) for x in (got, want, plain))
        if dtype == torch.float64:  # the definition's own fp64 is the truth: some 1e3 roundings of 1e-16
            assert (got - want).abs().max() <= 1e-12 * (1 + want.abs().max()), name
            continue
        assert_close_to_fp64(got, want, plain, name=f"{name} of {outputs}")
