"""Listwise losses of an order: from the candidates of G prompts, or the items of G answers, to G numbers.

u is a candidate's log-ratio to the reference. What counts of scores is which is higher, but where a loss says
that they are relevances. A group of one candidate gives 0 unless its loss says otherwise; a NaN score gives a
NaN loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.batches import ListLogps
from fastdpo.losses.heads import listwise_ce, logistic, margin_loss, masked_log_softmax, rank_hinge
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.list_scores import (
    RELEVANCE,
    best_target,
    column,
    has_levels,
    is_best,
    is_better,
    poison,
    three,
    three_free,
    triple,
)
from fastdpo.losses.ranges import FlipProbability, Fraction, NonNegative, Positive
from fastdpo.losses.registry import BatchExample, preference_loss
from fastdpo.losses.stable import token_mean


@preference_loss(
    "sdpo",
    paper="arXiv:2406.09215",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    shift_invariant=True,
    # beta 1: -1 + log(e + 1 + 1/e)
    example=BatchExample(0.4076059644, three),
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
    example=BatchExample(1.7208676520, three, {"beta": 1.0}),
)
def plackett_luce_loss(lists: ListLogps, *, beta: PerPair = 0.1) -> Tensor:
    """Plackett-Luce DPO: the likelihood of the whole ranking by score, best first.

    -sum_i log [e^(beta u_i) / sum_j e^(beta u_j)], j over the candidates with no higher score than i's. Those
    with equal scores share a place, so that their order in the data changes nothing (Breslow's form).
    """
    scores, mask = lists.dense_scores, lists.mask
    rewards = column(beta) * lists.logratios
    # (G, K, K): row i is the choice among the candidates that are no better than i.
    among = (scores.unsqueeze(-2) <= scores.unsqueeze(-1)) & mask.unsqueeze(-2) & mask.unsqueeze(-1)
    choices = masked_log_softmax(rewards.unsqueeze(-2).expand_as(among), among)
    return -choices.diagonal(dim1=-2, dim2=-1).where(mask, 0).sum(-1) + poison(scores).squeeze(-1)


@preference_loss(
    "lipo_lambda",
    paper="arXiv:2402.01878 eq. 8",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    ranges={"scores": RELEVANCE},
    shift_invariant=True,
    counted=has_levels,
    # gains 3, 0, 1 at the places 1, 2, 3, with d_k = 1 / ln(1 + k):
    # 3 (d_1 - d_2) log(1 + e^-1) + 2 (d_1 - d_3) log(1 + e^-2) + (d_2 - d_3) log(1 + e)
    example=BatchExample(0.9315766736, three, {"beta": 1.0}),
)
def lipo_lambda_loss(lists: ListLogps, *, beta: PerPair = 0.1) -> Tensor:
    """LiPO-lambda: DPO between all pairs of a list, weighted by what swapping the two would cost in DCG.

    sum over score_i > score_j of |2^score_i - 2^score_j| |1 / log(1 + place_i) - 1 / log(1 + place_j)|
    log(1 + e^-(s_i - s_j)), s = beta u; a candidate's place is that of its s in the list, from 1, and carries
    no gradient. Scores are relevances, in the paper win rates in [0, 1]; a negative one makes the group NaN
    where it was not refused before. A group of one level has nothing to compare: it is 0 and counts nowhere.
    """
    scores, mask = lists.dense_scores, lists.mask
    scores = scores.where(scores >= 0, torch.nan)
    rewards = column(beta) * lists.logratios
    discount = 1 / torch.log(1 + _places(rewards.detach(), mask))
    gain = torch.exp2(scores)
    cost = (gain.unsqueeze(-1) - gain.unsqueeze(-2)) * (discount.unsqueeze(-1) - discount.unsqueeze(-2))
    losses = cost.abs() * logistic(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))
    return losses.where(is_better(lists), 0).sum((-2, -1)) + poison(scores).squeeze(-1)


def _places(values: Tensor, mask: Tensor) -> Tensor:
    """``(G, K)`` from 1: where each candidate stands once its list is sorted, the highest first."""
    order = torch.argsort(values.where(mask, -torch.inf), dim=-1, descending=True, stable=True)
    place = torch.arange(1, mask.shape[-1] + 1, device=mask.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, place).to(values.dtype)


@preference_loss(
    "in_context_ranking",
    paper="arXiv:2504.15477 (the authors' code)",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    ranges={"scores": RELEVANCE},
    shift_invariant=True,
    # w = (3 / log2 2, 0, 1 / log2 4): (3 log(1 + (e^-1 + e^-2) / 2) + 0.5 log(1 + (e^2 + e) / 2)) / 3
    example=BatchExample(0.5245393698, three),
)
def in_context_ranking_loss(lists: ListLogps, *, beta: PerPair = 1.0) -> Tensor:
    """Ranking inside one answer: the items of a list, weighted by relevance over log rank.

    -(1/n) sum_i w_i ls(-log mean_(j != i) e^(beta (u_j - u_i))), w_i = (2^score_i - 1) / log2(1 + rank_i),
    rank being the item's position in the answer (its place in the group). Scores are relevances, from 0 up:
    a negative one would turn the item's ranking round, so it makes the group NaN where it was not refused
    before. u_i are sums over the item's tokens (``aggregate.segment_sums``). Of one item alone it is 0.
    """
    scores, mask = lists.dense_scores, lists.mask
    scores = scores.where(scores >= 0, torch.nan)
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
    example=BatchExample(4.5, three_free),
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
    over tokens (the paper); with ``mean_nll`` the mean over the answer's. The authors' code has a mean over
    all positions of the padded batch, prompt and padding counted as 0, so that its size depends on the rows
    beside; its rank weight is 1 in every script (100 is the unused default of its argument). Equally good
    best candidates share the NLL, where theirs takes the first.
    """
    sums, tokens = lists.logratios, lists.dense(lists.tokens)
    scaled = sums / tokens.clamp(min=1) ** length_power
    violations = rank_hinge(scaled.unsqueeze(-1), scaled.unsqueeze(-2)).where(is_better(lists), 0)
    nll = -(best_target(lists) * (token_mean(sums, tokens) if mean_nll else sums)).sum(-1)
    return rank_weight * violations.sum((-2, -1)) + nll


@preference_loss(
    "trpa",
    paper="arXiv:2504.04524",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    length_normalized=True,
    counted=has_levels,
    # ubar = 1, 0, -1/3 of levels 1, 3, 2: log(1 + e^-0.25), log(1 + e^-1/3), log(1 + e^1/30), mean
    example=BatchExample(0.6087325748, three),
)
def trpa_loss(lists: ListLogps, *, beta: PerPair = 0.1, anisotropy: Positive = 2.5) -> Tensor:
    """TRPA's preference term: DPO on per-token means between all levels of a group of rollouts.

    The levels are the group's different scores, the highest being level 1. Mean over pairs of different
    levels of -ls(kappa beta (ubar_i - ubar_j)), kappa the ``anisotropy`` where i is of level 1, else 1. A
    group of one level has nothing to compare: it is 0 and counts nowhere.

    In the authors' code levels are those of a rule (right, wrong, no answer, no format), so that a group
    without a right answer has no anisotropy; the mean is over the pairs of a batch, ours over groups; of a
    batch without any pair all answers of level 1 are pushed up and all others down, where ours is 0. The
    trust region is a term of its own: ``terms.trust_region``.
    """
    better = is_better(lists)
    gap = column(beta) * lists.per_token(lists.logratios)
    kappa = torch.full_like(gap, anisotropy).where(is_best(lists), 1.0).unsqueeze(-1)
    losses = logistic(kappa * (gap.unsqueeze(-1) - gap.unsqueeze(-2))).where(better, 0)
    mean = losses.sum((-2, -1)) / better.sum((-2, -1)).clamp(min=1)
    return mean + poison(lists.dense_scores).squeeze(-1)


@preference_loss(
    "wrpo",
    paper="arXiv:2412.03187",
    kind="listwise",
    inputs=ListLogps,
    shift_invariant=True,
    # m = 0.01 (0.1 * 1 + 0.9 * 0 + 1) = 0.011: log(1 + e^-0.011)
    example=BatchExample(0.6876623055, triple),
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
