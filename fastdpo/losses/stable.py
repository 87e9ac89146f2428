"""Small building blocks that stay finite, with finite gradients, wherever their arguments are."""

from __future__ import annotations

import torch
from torch import Tensor


def token_mean(sums: Tensor, counts: Tensor) -> Tensor:
    """``sums / counts``; where the count is 0, the sum (0 for an empty answer) as it is."""
    return sums / counts.clamp(min=1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum of ``values`` where ``mask``, in fp64; what is masked away may be NaN and gets gradient 0.

    fp64, rounded once by the caller, so that the mean of equal numbers is that number to the last bit
    (ln 2 stays ln 2 for any number of pairs) and micro-batches add up to the whole batch.
    """
    return values.where(mask, 0).sum(dtype=torch.float64)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``values`` where ``mask``, in their dtype; 0 where nothing is left."""
    return (masked_sum(values, mask) / mask.sum().clamp(min=1)).to(values.dtype)
