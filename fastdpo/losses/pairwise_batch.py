"""Pairwise losses of the batch as a whole: their scope is ``batch``, a pair alone means something else.

Alignment via optimal transport compares distributions: sorted scores of one kind with sorted scores of
the other. The method's batch is the global one; TRL, and these functions, sort the batch they are
given, so gather the log-probabilities of all ranks first (``gather.gather_pairs``) for the method's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.heads import logistic, margin_loss
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.ranges import FlipProbability, NonNegative
from fastdpo.losses.registry import BatchExample, preference_loss


def _transported(source: Tensor, target: Tensor, is_scored: Tensor) -> Tensor:
    """For each source value, the target value of the same rank; pairs without a token take no part.

    Stable sorts: ties keep their order, so the result is deterministic. A NaN ranks last, and makes only
    what it meets NaN.
    """
    # Padding sorts behind everything on both sides, so it meets padding; NaN could not be told from it.
    order = torch.argsort(source.detach().where(is_scored, torch.inf), stable=True)
    target_order = torch.argsort(target.detach().where(is_scored, torch.inf), stable=True)
    partner = torch.empty_like(order).scatter(0, order, target_order)
    return target.gather(0, partner)


def _two_pairs() -> PairLogps:
    """Policy gaps 3 and 1, reference gaps 0 and 2; log-ratios 3 and 1 chosen, 0 and 2 rejected."""
    sums = ([-1.0, -2.0], [-4.0, -3.0], [1.0, 1.0], [1.0, 1.0], [-4.0, -3.0], [-4.0, -5.0])
    return PairLogps(*(torch.tensor(values, dtype=torch.float64) for values in sums))


@preference_loss(
    "aot",
    paper="arXiv:2406.05882",
    scope="batch",
    shift_invariant=True,
    # sorted gaps 1, 3 of the policy less 0, 2 of the reference: 1 and 1, so log(1 + e^-0.1)
    example=BatchExample(0.6443966601, _two_pairs),
)
def aot_loss(pair: PairLogps, *, beta: PerPair = 0.1, label_smoothing: FlipProbability = 0.0) -> Tensor:
    """AOT: the batch's policy gaps against its reference gaps, rank by rank (optimal transport in 1-D).

    d_i = sort(s_w - s_l)_i - sort(ref_w - ref_l)_i, then cDPO's loss of beta d_i. The paper uses beta 0.01.
    The loss of a rank is that of the pair whose policy gap landed there.
    """
    gap = pair.chosen - pair.rejected
    shift = _transported(gap, pair.reference_gap, pair.is_scored)
    return margin_loss(beta * (gap - shift), logistic, 1.0 - label_smoothing)


@preference_loss(
    "aot_unpaired",
    paper="arXiv:2406.05882",
    scope="batch",
    # chosen 1, 3 less rejected 0, 2, rank by rank: 1 and 1, so log(1 + e^-0.1)
    example=BatchExample(0.6443966601, _two_pairs),
)
def aot_unpaired_loss(
    pair: PairLogps, *, beta: PerPair = 0.1, label_smoothing: FlipProbability = 0.0
) -> Tensor:
    """AOT for unpaired data: sorted log-ratios of the chosen against sorted ones of the rejected.

    d_i = sort(u_w)_i - sort(u_l)_i. The loss of a rank is that of the pair whose chosen answer landed there.
    """
    chosen = pair.chosen_logratios
    rejected = _transported(chosen, pair.rejected_logratios, pair.is_scored)
    return margin_loss(beta * (chosen - rejected), logistic, 1.0 - label_smoothing)


def _standardised(values: Tensor, is_scored: Tensor) -> Tensor:
    """(x - mean) / std over the pairs with a token, std the sample's; 0 where all are equal."""
    count = is_scored.sum()
    mean = values.where(is_scored, 0).sum() / count.clamp(min=1)
    centred = (values - mean).where(is_scored, 0)
    std = ((centred**2).sum() / (count - 1).clamp(min=1)).sqrt()
    return centred / std.where(std != 0, 1)


@preference_loss(
    "alpha_dpo",
    paper="arXiv:2410.10148 (the authors' code)",
    scope="batch",
    length_normalized=True,
    # D = 3 and -1, standardised 0.70710678 and minus that: log(1 + e^-m), m = 2.5 (3 - 0.14142136) - 1.5 and
    # 2.5 (1 + 0.14142136) - 1.5
    example=BatchExample(0.1166509436, _two_pairs),
)
def alpha_dpo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 2.5,
    label_smoothing: FlipProbability = 0.0,
    gamma: NonNegative = 1.5,
    alpha: float = 0.2,
) -> Tensor:
    """alpha-DPO: SimPO with a wider target gap for pairs that the policy tells apart more than the reference.

    -log sigmoid(beta (mean_w - mean_l - alpha z) - gamma), z the gap of per-token log-ratios, standardised
    over the batch and without a gradient. ``gamma`` is beta times the authors' ``gamma_beta_ratio`` (0.6
    here, with beta and alpha as for their Llama 3). They standardise by exponential means over batches,
    which start from 0; this takes the batch it is given.
    """
    policy = pair.without_reference().mean_delta
    z = _standardised(pair.mean_delta.detach(), pair.is_scored)
    return margin_loss(beta * (policy - alpha * z) - gamma, logistic, 1.0 - label_smoothing)
