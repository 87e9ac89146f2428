"""The definitions in plain torch: the oracle of every test.

Per token, for a hidden state h and a label y (H hidden, V vocabulary, log-probabilities in nats):

    x = W h,   z = softcap(s (x + b)) / tau,   softcap(u) = cap tanh(u / cap)
    lse = logsumexp(z),   logp = z_y - lse,   p = exp(z - lse),   entropy = -sum p log p

``linear_logprob_reference`` is that, dense and differentiable. It is not written for speed or memory: it
holds all logits, several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdpo.types import (
    DEFAULT_TOPK,
    TOKEN_STATISTICS,
    TOPK_STATISTICS,
    LinearLogprobOutput,
    LMHead,
    TeacherCombination,
    TokenDivergenceOutput,
)


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    topk: int = DEFAULT_TOPK,
) -> LinearLogprobOutput:
    """Per-token log-probabilities of ``labels`` under a language-model head, by definition.

    Works in fp64 for fp64 inputs and in fp32 for every other dtype, 16-bit inputs being converted
    first, so that nothing is rounded but the inputs and the results. Differentiable by autograd in
    ``hidden``, ``weight`` and ``bias``, through every statistic but ``is_top1``.

    Args:
        hidden: ``(..., H)``, floating point.
        weight: ``(V, H)``.
        labels: ``(...)`` integers, aligned with ``hidden`` (no shift).
        bias: ``(V,)``, or None.
        logit_scale, softcap, temperature: s, cap and tau of the module's docstring.
        ignore_index: the label of positions that give 0 and take no part in any gradient.
        outputs: statistics wanted beside ``logps``, names of ``fastdpo.types.TOKEN_STATISTICS`` and of
            ``TOPK_STATISTICS``.
        topk: how many of the largest probabilities the latter look at.

    Returns:
        ``LinearLogprobOutput`` with fields of the labels' shape, 0 (False) where ignored. A label
        outside ``0..V-1`` that is not ``ignore_index`` gives a log-probability of NaN.

    Raises:
        ValueError: an unknown name in ``outputs``.
    """
    known = (*TOKEN_STATISTICS, *TOPK_STATISTICS)
    unknown = set(outputs) - set(known)
    if unknown:
        raise ValueError(f"outputs: got {sorted(unknown)}, want names out of {known}")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    labelled = labels != ignore_index
    kept = labels[labelled].long()  # (N,)

    head = LMHead(weight, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    z = head_logits(hidden[labelled].to(dtype), head)  # (N, V)
    results = token_statistics(z, kept, ("logps", *outputs), topk)
    spread = {
        name: torch.zeros_like(labels, dtype=value.dtype).masked_scatter(labelled, value)
        for name, value in results.items()
    }
    return LinearLogprobOutput(**spread)


def head_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """Final logits ``(..., V)`` of hidden states ``(..., H)``, in their dtype."""
    z = hidden @ head.weight.to(hidden.dtype).T
    if head.bias is not None:
        z = z + head.bias.to(hidden.dtype)
    z = head.logit_scale * z
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def divergences_reference(z: Tensor, teacher: Tensor, *, jsd_beta: float = 0.5) -> TokenDivergenceOutput:
    """Forward KL, reverse KL and JSD of final logits z ``(..., V)`` and a teacher's, by definition.

    Dense and differentiable in both; the definitions are those of ``token_divergence``.
    """
    log_p, log_q = z.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (jsd_beta * q + (1 - jsd_beta) * p).log()

    def kl(weight: Tensor, log_weight: Tensor, log_other: Tensor) -> Tensor:
        return torch.where(weight > 0, weight * (log_weight - log_other), 0.0).sum(-1)

    return TokenDivergenceOutput(
        forward_kl=kl(q, log_q, log_p),
        reverse_kl=kl(p, log_p, log_q),
        jsd=jsd_beta * kl(q, log_q, log_m) + (1 - jsd_beta) * kl(p, log_p, log_m),
    )


def combined_logits(first: Tensor, second: Tensor, combination: TeacherCombination) -> tuple[Tensor, Tensor]:
    """A teacher's logits ``(..., V)`` made of two, and the L1 distance ``(...)`` of the two distributions."""
    distance = (first.softmax(-1) - second.softmax(-1)).abs().sum(-1)
    a = combination.first + combination.first_slope * distance
    b = combination.second + combination.second_slope * distance
    return a[..., None] * first + b[..., None] * second, distance


def token_statistics(
    z: Tensor, labels: Tensor, names: Sequence[str], topk: int = DEFAULT_TOPK
) -> dict[str, Tensor]:
    """The statistics ``names`` of final logits: ``logps``, of ``TOKEN_STATISTICS`` or ``TOPK_STATISTICS``.

    Args:
        z: ``(N, V)`` logits, fp32 or fp64; -inf is legal and counts as probability 0.
        labels: ``(N,)`` int64; outside ``0..V-1`` the log-probability is NaN and ``is_top1`` False.
    """
    log_p = log_softmax(z)
    results = {}
    for name in names:
        if name == "logps":
            results[name] = _pick(log_p, labels)
        elif name == "lse":
            results[name] = by_row(torch.logsumexp, z)
        elif name == "entropy":
            results[name] = -by_row(torch.sum, p_log_p(log_p))
        elif name == "log_sum_sq_probs":
            results[name] = by_row(torch.logsumexp, 2 * log_p)
        elif name == "mean_logit":
            results[name] = by_row(torch.mean, z)
        elif name == "topk_mass":
            results[name] = _top_log_p(log_p, topk).exp().sum(-1)
        elif name == "topk_entropy":
            results[name] = -p_log_p(_top_log_p(log_p, topk)).sum(-1)
        else:
            assert name == "is_top1", name
            results[name] = _pick(z, labels) == z.amax(-1)
    return results


def log_softmax(z: Tensor) -> Tensor:
    """log p. The maximum goes first, so that a large common offset costs no digits.

    Not torch's own: on the CPU that adds 128k terms one after the other and errs by 1e-5 nats and more,
    where ``torch.sum`` adds them in a tree.
    """
    shifted = z - z.amax(-1, keepdim=True).detach()
    return shifted - by_row(torch.sum, shifted.exp()).log()[:, None]


def by_row(reduce: Callable[[Tensor, int], Tensor], z: Tensor) -> Tensor:
    """``reduce(z, -1)``, in an order that does not depend on the number of rows.

    torch splits a lone row over its threads, which moves the last bits; two rows it does not.
    """
    return reduce(z, -1) if len(z) != 1 else reduce(z.expand(2, -1), -1)[:1]


def _pick(values: Tensor, labels: Tensor) -> Tensor:
    """The label's entry of each row ``(N,)``; NaN where a label is none of 0..V-1."""
    in_range = (labels >= 0) & (labels < values.shape[1])
    picked = values.gather(1, labels.where(in_range, 0)[:, None])[:, 0]
    return picked.where(in_range, float("nan"))


def _top_log_p(log_p: Tensor, k: int) -> Tensor:
    """``(N, k)`` the largest log p of each row, without a gradient."""
    return log_p.detach().sort(-1, descending=True).values[:, :k]


def p_log_p(log_p: Tensor) -> Tensor:
    """p log p, with 0 * -inf counted as 0."""
    return log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)
