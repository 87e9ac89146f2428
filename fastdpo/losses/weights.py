"""Weights that methods put on pairs: data for ``pair_weights`` and ``soft_labels``, without a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdpo.losses.aggregate import sequence_means
from fastdpo.losses.ranges import NOT_NEGATIVE, Interval, check_range

_COSINE = Interval(-1.0 - 1e-3, 1.0 + 1e-3)  # of vectors normalised in 16 bits it rounds beyond 1


@torch.no_grad()
def wpo_weights(
    logps: Tensor,
    log_sum_sq_probs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    max_weight: float | None = 1.0,
) -> Tensor:
    """WPO's pair weights: how close both answers are to what the policy itself would have sampled.

    w(y) = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2]), and w(y_w) w(y_l) for the pair.

    Args:
        logps: ``(2P, T)`` or packed ``(N_all,)`` log-probabilities of the answers' tokens, chosen first.
        log_sum_sq_probs: the same shape: log sum_v pi(v|x, y_<t)^2, an output of ``linear_logprob``. At
            temperature 1, as ``logps``.
        mask: bool, the same shape: the answers' tokens.
        cu_seqlens: ``(2P + 1,)`` or None.
        max_weight: bound of the pair's weight: 1 in the authors' code; None, no bound, is TRL.

    Returns:
        ``(P,)``; 1 for an empty answer's share.

    Source: arXiv:2406.11827 eq. 2.
    """
    log_weights = sequence_means(logps - log_sum_sq_probs, mask, cu_seqlens)
    weights = log_weights.view(2, -1).sum(0).exp()
    return weights if max_weight is None else weights.clamp(max=max_weight)


def semantic_weights(cosine_similarity: Tensor, alpha: float) -> Tensor:
    """exp(-alpha (1 - cos)): chosen answers that stray from the prompt count less (as in Sem-DPO).

    Args:
        cosine_similarity: ``(P,)`` in [-1, 1], of frozen embeddings of prompt and chosen answer.
        alpha: at least 0; 0 is DPO. It has no default: the paper's value could not be checked.

    Raises:
        ValueError: alpha, or (on the CPU) a similarity, is out of range.

    Source: arXiv:2507.20133.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: got {alpha!r}, wanted a number in [0, inf)")
    check_range("cosine_similarity", cosine_similarity, _COSINE)
    return torch.exp(-alpha * (1 - cosine_similarity.detach()))


def search_soft_labels(better_values: Tensor, worse_values: Tensor) -> Tensor:
    """Soft labels from the values of a tree search: q = 1 - min(1 - c, 1/2), c = 1 / (1 + Q_w / max(1, Q_b)).

    For ``soft_labels`` of a step-level pair, as MCTS-DPO's conservative DPO has them.

    Args:
        better_values, worse_values: ``(P,)`` visit-weighted values, at least 0.

    Raises:
        ValueError: on the CPU: a negative value, with which q would leave [0, 1].

    Source: arXiv:2405.00451, the authors' code.
    """
    for name, values in (("better_values", better_values), ("worse_values", worse_values)):
        check_range(name, values, NOT_NEGATIVE)
    confidence = 1 / (1 + worse_values.detach() / better_values.detach().clamp(min=1))
    return 1 - (1 - confidence).clamp(max=0.5)
