"""What scores of a list say: which candidate is best, which is better than which, a target distribution.

All are ``(G, K)`` for G lists of at most K candidates, and carry no gradient. A NaN score must make the loss
of its list NaN: comparisons alone would take it for low or high (``poison``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.batches import ListLogps
from fastdpo.losses.heads import masked_log_softmax
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.ranges import Interval

# 2^score is what an item counts; beyond this one item would be the whole loss.
RELEVANCE = Interval(0.0, 30.0, includes_high=True)


def column(value: PerPair) -> PerPair:
    """A number per group, ``(G,)``, as ``(G, 1)``."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.dim() == 1 else value


def is_best(lists: ListLogps) -> Tensor:
    """``(G, K)`` bool: the candidates with the highest score of their group."""
    scores, mask = lists.dense_scores, lists.mask
    if scores.numel() == 0:
        return mask
    lowest = torch.finfo(scores.dtype).min
    return mask & (scores == scores.where(mask, lowest).amax(-1, keepdim=True))


def is_better(lists: ListLogps) -> Tensor:
    """``(G, K, K)`` bool: candidate i of the group has a higher score than candidate j."""
    scores, mask = lists.dense_scores, lists.mask
    return (scores.unsqueeze(-1) > scores.unsqueeze(-2)) & mask.unsqueeze(-1) & mask.unsqueeze(-2)


def has_levels(lists: ListLogps) -> Tensor:
    """``(G,)`` bool: some candidate of the group has a higher score than another."""
    return is_better(lists).any(-1).any(-1) | poison(lists.dense_scores).squeeze(-1).isnan()


def best_target(lists: ListLogps) -> Tensor:
    """``(G, K)``: 1 on the candidate with the highest score; equals share it."""
    best, scores = is_best(lists), lists.dense_scores
    return best.to(scores.dtype) / best.sum(-1, keepdim=True).clamp(min=1) + poison(scores)


def softmax_target(lists: ListLogps, temperature: float, *, normalize: bool = False) -> Tensor:
    """``(G, K)``: softmax(scores / temperature); with ``normalize`` of (r - mean) / (std + 1e-6) per group.

    The standard deviation is the sample's, of n - 1. Equal scores give the uniform distribution.
    """
    scores, mask = lists.dense_scores, lists.mask
    if normalize:
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        centred = (scores - scores.sum(-1, keepdim=True) / count).where(mask, 0)
        scores = centred / ((centred**2).sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt().add(1e-6)
    return masked_log_softmax(scores / temperature, mask).exp().where(mask, 0)


def poison(scores: Tensor) -> Tensor:
    """0, or NaN for a group with a score that is not finite: comparisons would let it through."""
    return (0 * scores).sum(-1, keepdim=True)


def entropy(target: Tensor) -> Tensor:
    """sum_i q_i log q_i, ``(G,)``: what a KL divergence has and a cross-entropy has not."""
    return torch.special.xlogy(target, target).sum(-1)


def candidates(
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


def three() -> ListLogps:
    """u = (1, 0, -1) with the scores 2, 0, 1: the first is best, the last second."""
    return candidates([-3.0, -5.0, -6.0], [2.0, 0.0, 1.0], [-4.0, -5.0, -5.0], [1.0, 2.0, 3.0])


def three_free() -> ListLogps:
    """The same without a reference; per-token means -3, -2.5 and -2."""
    return candidates([-3.0, -5.0, -6.0], [2.0, 0.0, 1.0], None, [1.0, 2.0, 3.0])


def triple() -> ListLogps:
    """The same without scores."""
    return candidates([-3.0, -5.0, -6.0], None, [-4.0, -5.0, -5.0], [1.0, 2.0, 3.0])
