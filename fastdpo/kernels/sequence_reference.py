"""The sequence kernel in plain torch: the backend ``reference`` of ``kernels/sequence.py``.

Takes any floating dtype, on any device. Written for clarity: a dozen launches where the kernels take one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.kernels.sequence import SigmoidOutputs, SigmoidTerms


def sequence_sums(
    values: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``kernels/sequence.py``'s sums of every sequence."""
    summands = values.double() if weights is None else values.double() * weights.double()
    out.copy_(_segment_sums(summands if mask is None else summands.where(mask, 0), offsets))


def sigmoid_pairs(
    values: Tensor,
    offsets: Tensor,
    terms: SigmoidTerms,
    outputs: SigmoidOutputs,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``kernels/sequence.py``'s sums, loss and gradient of the sigmoid loss of every pair."""
    sequence_sums(values, offsets, outputs.sums, weights=weights, mask=mask)
    num_pairs = len(outputs.sums) // 2

    def per_pair(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.double().expand(num_pairs)
        return torch.full((num_pairs,), value, dtype=torch.float64, device=values.device)

    beta, margin, weight = map(per_pair, (terms.beta, terms.margin, terms.pair_weights))
    preferred = per_pair(terms.preferred)
    divisor = terms.divisor.double() if isinstance(terms.divisor, Tensor) else terms.divisor
    ratios = outputs.sums.double()
    if terms.ref_sums is not None:
        ratios = ratios - terms.ref_sums.double()
    chosen, rejected = ratios.view(num_pairs, 2).unbind(1)
    h = beta * (chosen - rejected) - margin

    counts = torch.ones_like(values, dtype=torch.bool) if mask is None else mask  # (N,): the tokens that do
    is_scored = _segment_sums(counts.double(), offsets).view(num_pairs, 2).sum(1) > 0
    losses = _expected(preferred, -F.logsigmoid(h)) + _expected(1 - preferred, -F.logsigmoid(-h))
    outputs.loss.copy_((weight * losses).where(is_scored, 0).sum() / divisor)

    slope = (1 - preferred) * torch.sigmoid(h) - preferred * torch.sigmoid(-h)
    coeff = (weight * slope * beta / divisor).where(is_scored, 0)
    # (2P + 1,): wrong offsets may leave tokens behind the last sequence.
    per_sequence = F.pad(torch.stack([coeff, -coeff], dim=1).flatten(), (0, 1))
    position = torch.arange(len(values), device=values.device)
    g = per_sequence[torch.searchsorted(offsets[1:], position, right=True)]
    if weights is not None:
        g = g * weights.double()
    outputs.g.copy_(g.where(counts, 0))


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot run on ``device``, or None where it can: always None."""
    return None


def _segment_sums(summands: Tensor, offsets: Tensor) -> Tensor:
    """fp64 ``(S,)``. Offsets are forced into range first: torch reads whatever they point at."""
    bounds = offsets.clamp(0, len(summands)).cummax(0).values
    return torch.segment_reduce(summands, "sum", offsets=bounds, unsafe=True)


def _expected(probability: Tensor, penalty: Tensor) -> Tensor:
    """probability * penalty; 0 where the probability is, however large the penalty."""
    return (probability * penalty).where(probability != 0, 0)
