"""Listwise losses: a function each, from the candidates of G prompts to G numbers.

u is a candidate's log-ratio to the reference (``ListLogps.ref_logps``: an old policy, a proposal or an
exponential average does as well). Most are the cross-entropy of a target distribution q against
softmax((s - a) / tau), whose gradient is (p_i - q_i) / tau on each s_i. A group of one candidate gives 0
unless its loss says otherwise; a NaN score gives a NaN loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.batches import ListLogps
from fastdpo.losses.heads import listwise_ce, logistic, margin_loss, masked_log_softmax, rank_hinge
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.registry import (
    BatchExample,
    FlipProbability,
    Fraction,
    NonNegative,
    Positive,
    preference_loss,
)
from fastdpo.losses.stable import token_mean


def column(value: PerPair) -> PerPair:
    """A number per group, ``(G,)``, as ``(G, 1)``."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.dim() == 1 else value


def best_target(lists: ListLogps) -> Tensor:
    """``(G, K)``: 1 on the candidate with the highest score; equals share it."""
    scores, mask = lists.dense_scores, lists.mask
    lowest = torch.finfo(scores.dtype).min
    is_best = mask & (scores == scores.where(mask, lowest).amax(-1, keepdim=True)) if scores.numel() else mask
    return is_best.to(scores.dtype) / is_best.sum(-1, keepdim=True).clamp(min=1) + _poison(scores)


def softmax_target(lists: ListLogps, temperature: float, *, normalize: bool = False) -> Tensor:
    """``(G, K)``: softmax(scores / temperature); with ``normalize`` of (r - mean) / (std + 1e-6) per group.

    The standard deviation is the population's. Equal scores give the uniform distribution.
    """
    scores, mask = lists.dense_scores, lists.mask
    if normalize:
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        centred = (scores - scores.sum(-1, keepdim=True) / count).where(mask, 0)
        scores = centred / ((centred**2).sum(-1, keepdim=True) / count).sqrt().add(1e-6)
    return masked_log_softmax(scores / temperature, mask).exp().where(mask, 0)


def _poison(scores: Tensor) -> Tensor:
    """0, or NaN for a group with a score that is not finite: comparisons would let it through."""
    return (0 * scores).sum(-1, keepdim=True)


def _entropy(target: Tensor) -> Tensor:
    """sum_i q_i log q_i, ``(G,)``: what a KL divergence has and a cross-entropy has not."""
    return torch.special.xlogy(target, target).sum(-1)


def _candidates(
    logps: list[float], scores: list[float] | None, ref: list[float] | None, tokens: list[float]
) -> ListLogps:
    """One group, for the examples."""

    def optional(values: list[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float64)

    return ListLogps(
        torch.tensor(logps, dtype=torch.float64),
        torch.tensor(tokens, dtype=torch.float64),
        torch.zeros(len(logps), dtype=torch.int64),
        optional(scores),
        optional(ref),
    )


def _three() -> ListLogps:
    """u = (1, 0, -1) with the scores 2, 0, 1: the first is best, the last second."""
    return _candidates([-3.0, -5.0, -6.0], [2.0, 0.0, 1.0], [-4.0, -5.0, -5.0], [1.0, 2.0, 3.0])


def _three_free() -> ListLogps:
    """The same without a reference; per-token means -3, -2.5 and -2."""
    return _candidates([-3.0, -5.0, -6.0], [2.0, 0.0, 1.0], None, [1.0, 2.0, 3.0])


def _levels() -> ListLogps:
    """The same with levels 1, 2 and 3."""
    return _candidates([-3.0, -5.0, -6.0], [-1.0, -2.0, -3.0], [-4.0, -5.0, -5.0], [1.0, 2.0, 3.0])


def _triple() -> ListLogps:
    """The same without scores."""
    return _candidates([-3.0, -5.0, -6.0], None, [-4.0, -5.0, -5.0], [1.0, 2.0, 3.0])


@preference_loss(
    "sdpo",
    paper="arXiv:2406.09215",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    shift_invariant=True,
    # beta 1: -1 + log(e + 1 + 1/e)
    example=BatchExample(0.4076059644, _three),
)
def sdpo_loss(lists: ListLogps, *, beta: PerPair = 1.0) -> Tensor:
    """S-DPO: DPO with several rejected answers, -log softmax(beta u) of the best.

    The best is the candidate with the highest score; equals share the target evenly.
    """
    return listwise_ce(column(beta) * lists.logratios, best_target(lists), lists.mask)


@preference_loss(
    "plackett_luce",
    paper="arXiv:2305.18290 app. A.3",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    shift_invariant=True,
    # order u = 1, -1, 0 at beta 1: -1 + log(e + 1/e + 1), then 1 + log(1/e + 1)
    example=BatchExample(1.7208676520, _three, {"beta": 1.0}),
)
def plackett_luce_loss(lists: ListLogps, *, beta: PerPair = 0.1) -> Tensor:
    """Plackett-Luce DPO: the likelihood of the whole ranking by score, best first.

    -sum_k log [e^(beta u_(k)) / sum_(j >= k) e^(beta u_(j))]. Equal scores count as ranked in data order.
    """
    scores, mask = lists.dense_scores, lists.mask
    order = torch.argsort(scores.where(mask, -torch.inf), dim=-1, descending=True, stable=True)
    logits = (column(beta) * lists.logratios).gather(-1, order)
    is_there = mask.gather(-1, order)
    size = logits.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu()
    # (G, K, K): row k is the choice among the candidates from k on.
    choices = masked_log_softmax(
        logits.unsqueeze(-2).expand(-1, size, -1), later & is_there.unsqueeze(-2) & is_there.unsqueeze(-1)
    )
    return -choices.diagonal(dim1=-2, dim2=-1).where(is_there, 0).sum(-1) + _poison(scores).squeeze(-1)


@preference_loss(
    "infonca",
    paper="arXiv:2402.05369",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    shift_invariant=True,
    # q = softmax(2, 0, 1), p = softmax(1, 0, -1)
    example=BatchExample(0.9870934797, _three, {"beta": 1.0}),
)
def infonca_loss(lists: ListLogps, *, beta: PerPair = 0.1, score_temperature: Positive = 1.0) -> Tensor:
    """InfoNCA: cross-entropy of softmax(scores / temperature) against softmax(beta u).

    With beta 1, the proposal's log-probabilities as reference and its posterior's log-weights as scores
    it is the self-normalised KL divergence of posterior and policy (as in BRAIn), up to a constant.
    """
    target = softmax_target(lists, score_temperature)
    return listwise_ce(column(beta) * lists.logratios, target, lists.mask)


@preference_loss(
    "nca",
    paper="arXiv:2402.05369",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    # q = softmax(2, 0, 1), softplus(-1) = 0.31326, softplus(0) = 0.69315, softplus(1) = 1.31326
    example=BatchExample(1.3654149858, _three, {"beta": 1.0}),
)
def nca_loss(lists: ListLogps, *, beta: PerPair = 0.1, score_temperature: Positive = 1.0) -> Tensor:
    """NCA for lists: raises each candidate's own likelihood ratio by its share of the scores.

    -sum_i [q_i ls(beta u_i) + ls(-beta u_i) / K], q = softmax(scores / temperature). Two candidates with
    the target (1, 0) are ``nca_pair``.
    """
    mask = lists.mask
    rewards = column(beta) * lists.logratios
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    noise = (logistic(-rewards) / count).where(mask, 0)
    return (softmax_target(lists, score_temperature) * logistic(rewards) + noise).sum(-1)


@preference_loss(
    "adpo",
    paper="arXiv:2510.18913",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    shift_invariant=True,
    # q = softmax(2, 0, 1), p = softmax(1, 0, -1): sum q log(q / p)
    example=BatchExample(0.1546978979, _three, {"score_temperature": 1.0, "normalize_scores": False}),
)
def adpo_loss(
    lists: ListLogps,
    *,
    tau: Positive = 1.0,
    score_temperature: Positive = 0.5,
    normalize_scores: bool = True,
) -> Tensor:
    """Anchored DPO (ADPO): KL of softmax((s - anchor) / tau) from the softmax of normalised scores.

    The anchor is the reference: a frozen model, the old policy, or an exponential average. Scores are
    normalised per group to mean 0 and standard deviation 1 unless told not to; soft targets of one's own
    are scores of log q with a temperature of 1. K = 2, a hard target and tau = 1 / beta is DPO.
    """
    target = softmax_target(lists, score_temperature, normalize=normalize_scores)
    return listwise_ce(lists.logratios / tau, target, lists.mask) + _entropy(target)


@preference_loss(
    "ddo_rm",
    paper="arXiv:2604.11119",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    uses_reference=False,
    length_normalized=True,
    # s = (-3, -2.5, -2), q = softmax(s + r) = softmax(-1, -2.5, -1), p = softmax(s)
    example=BatchExample(1.1802696706, _three_free),
)
def ddo_rm_loss(lists: ListLogps, *, tau: Positive = 1.0, eta: NonNegative = 1.0) -> Tensor:
    """DDO-RM: the policy's own choice among the candidates, moved towards their rewards and distilled.

    p = softmax(s / tau) of per-token means s; q = softmax((s + eta r) / tau), detached (centring the
    rewards, as the paper does, cancels); L = -sum q log p. Equal scores give gradient 0.
    """
    means = lists.per_token(lists.logratios)
    improved = (means.detach() + eta * lists.dense_scores) / tau
    target = masked_log_softmax(improved, lists.mask).exp().where(lists.mask, 0)
    return listwise_ce(means / tau, target, lists.mask)


@preference_loss(
    "in_context_ranking",
    paper="arXiv:2504.15477 (the authors' code)",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    shift_invariant=True,
    # w = (3 / log2 2, 0, 1 / log2 4): (3 log(1 + (e^-1 + e^-2) / 2) + 0.5 log(1 + (e^2 + e) / 2)) / 3
    example=BatchExample(0.5245393698, _three),
)
def in_context_ranking_loss(lists: ListLogps, *, beta: PerPair = 1.0) -> Tensor:
    """Ranking inside one answer: the items of a list, weighted by relevance over log rank.

    -(1/n) sum_i w_i ls(-log mean_(j != i) e^(beta (u_j - u_i))), w_i = (2^score_i - 1) / log2(1 + rank_i),
    rank being the item's position in the answer (its place in the group). u_i are sums over the item's
    tokens (``aggregate.segment_sums``). Of one item alone it is 0.
    """
    scores, mask = lists.dense_scores, lists.mask
    rewards = column(beta) * lists.logratios
    size = mask.shape[-1]
    rank = torch.arange(1, size + 1, device=scores.device, dtype=scores.dtype)
    weights = ((torch.exp2(scores) - 1) / torch.log2(1 + rank)).where(mask, 0)
    count = mask.sum(-1, keepdim=True)
    others = mask.unsqueeze(-2) & mask.unsqueeze(-1) & ~torch.eye(size, dtype=torch.bool, device=mask.device)
    lowest = torch.finfo(rewards.dtype).min
    gaps = (rewards.unsqueeze(-2) - rewards.unsqueeze(-1)).where(others, lowest)  # [i, j]: u_j - u_i
    has_others = (count > 1) & mask
    num_others = (count - 1).clamp(min=1).to(rewards.dtype)  # of an integer, log would be fp32
    log_mean = torch.logsumexp(gaps, -1).where(has_others, 0) - num_others.log()
    return (weights * logistic(-log_mean)).where(has_others, 0).sum(-1) / count.squeeze(-1).clamp(min=1)


@preference_loss(
    "rrhf",
    paper="arXiv:2304.05302",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    uses_reference=False,
    length_normalized=True,
    # means -3, -2.5, -2 with scores 2, 0, 1: worse over better 2.5 over 3 and 2 over 3, 0.5 + 1; NLL 3
    example=BatchExample(4.5, _three_free),
)
def rrhf_loss(
    lists: ListLogps,
    *,
    rank_weight: NonNegative = 1.0,
    length_power: NonNegative = 1.0,
    mean_nll: bool = False,
) -> Tensor:
    """RRHF: hinge without a margin on every pair ranked the wrong way round, and NLL of the best.

    rank_weight * sum_(r_i < r_j) relu(pi_i - pi_j) + NLL(best), pi = s / |y|^length_power. The NLL is a sum
    over tokens (the paper); with ``mean_nll`` a mean, for which the authors' code has rank_weight 100.
    Equally good best candidates share the NLL.
    """
    scores, sums = lists.dense_scores, lists.logratios
    mask = lists.mask
    tokens = lists.dense(lists.tokens)
    scaled = sums / tokens.clamp(min=1) ** length_power
    is_ranked = (scores.unsqueeze(-1) > scores.unsqueeze(-2)) & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    violations = rank_hinge(scaled.unsqueeze(-1), scaled.unsqueeze(-2)).where(is_ranked, 0)
    nll = -(best_target(lists) * (token_mean(sums, tokens) if mean_nll else sums)).sum(-1)
    return rank_weight * violations.sum((-2, -1)) + nll


@preference_loss(
    "trpa",
    paper="arXiv:2504.04524",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    length_normalized=True,
    # ubar = 1, 0, -1/3 of levels 1, 2, 3: log(1 + e^-0.25), log(1 + e^-1/3), log(1 + e^-1/30), mean
    example=BatchExample(0.5976214636, _levels),
)
def trpa_loss(lists: ListLogps, *, beta: PerPair = 0.1, anisotropy: Positive = 2.5) -> Tensor:
    """TRPA's preference term: DPO on per-token means between all levels of a group of rollouts.

    Scores are minus the preference level, so -1 for level 1, the best. Mean over pairs of
    -ls(kappa beta (ubar_i - ubar_j)), kappa the ``anisotropy`` where i is of level 1, else 1. A group of one
    level gives the mean of -ls(ubar) if that is level 1, else of -ls(-ubar). Groups count alike; the authors'
    code counts the batch's pairs alike, and comes to groups of one level only where it has no pair at all.
    The trust region is a term of its own: ``terms.trust_region``.
    """
    scores, mask = lists.dense_scores, lists.mask
    means = lists.per_token(lists.logratios)
    is_top = scores == -1
    better = (scores.unsqueeze(-1) > scores.unsqueeze(-2)) & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    gap = column(beta) * means
    kappa = torch.full_like(means, anisotropy).where(is_top, 1.0).unsqueeze(-1)
    losses = logistic(kappa * (gap.unsqueeze(-1) - gap.unsqueeze(-2))).where(better, 0)
    pairs = better.sum((-2, -1))
    alone = logistic(means.where(is_top, -means)).where(mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    ranked = losses.sum((-2, -1)) / pairs.clamp(min=1)
    return torch.where(pairs > 0, ranked, alone) + _poison(scores).squeeze(-1)


@preference_loss(
    "bolt",
    paper="arXiv:2605.02469 eq. 10",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    uses_reference=False,
    # softmax(2, 0, 1) against 3, 5, 6
    example=BatchExample(3.9142465595, _three_free),
)
def bolt_loss(lists: ListLogps, *, score_temperature: Positive = 1.0) -> Tensor:
    """BOLT: likelihood of the reference's samples, weighted by e^(score / temperature), mean 1 per group.

    -(1/K) sum_n w_n s_n. A large temperature is SFT on all, a small one SFT on the best.
    """
    return -(softmax_target(lists, score_temperature) * lists.logratios).sum(-1)


@preference_loss(
    "wrpo",
    paper="arXiv:2412.03187",
    kind="listwise",
    inputs=ListLogps,
    shift_invariant=True,
    # m = 0.01 (0.1 * 1 + 0.9 * 0 + 1) = 0.011: log(1 + e^-0.011)
    example=BatchExample(0.6876623055, _triple),
)
def wrpo_loss(
    lists: ListLogps,
    *,
    beta: PerPair = 0.01,
    label_smoothing: FlipProbability = 0.0,
    source_weight: Fraction = 0.1,
) -> Tensor:
    """WRPO: the chosen answers of a source model and of the policy, weighted, against one rejected.

    m = beta (a u_source + (1 - a) u_own - u_rejected), a the ``source_weight``, which the paper ramps up
    from 0 over training. Every group has exactly three candidates, in this order.

    Raises:
        ValueError: a group has another size (checked on the CPU; elsewhere only the largest group).
    """
    index = lists.index
    if index.shape[-1] != 3 or (index.device.type == "cpu" and bool((index < 0).any())):
        sizes = "groups of another size"
        raise ValueError(
            f"ListLogps.group_ids: got {sizes}, wanted three candidates each: source, own, rejected"
        )
    source, own, rejected = lists.logratios.unbind(-1)
    m = beta * (source_weight * source + (1 - source_weight) * own - rejected)
    return margin_loss(m, logistic, 1.0 - label_smoothing)
