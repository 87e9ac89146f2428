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
from fastdpo.losses.ranges import FlipProbability
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
