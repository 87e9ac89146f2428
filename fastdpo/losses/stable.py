"""Small building blocks that stay finite, with finite gradients, wherever their arguments are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_EXPONENT = 80.0  # e^80 = 5.5e34 leaves room for a few factors in fp32 (and is TRL's bound)


def exponent_bound(scale: float | Tensor) -> float | Tensor:
    """The largest x for which scale * e^x still has that room: less by log(scale) for a scale above 1."""
    if isinstance(scale, Tensor):
        return MAX_EXPONENT - scale.detach().clamp(min=1).log()
    return MAX_EXPONENT - math.log(max(scale, 1.0))


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


def bounded_exp(exponent: Tensor, most: float | Tensor = MAX_EXPONENT) -> Tensor:
    """e^min(x, most): finite, with gradient 0 beyond the bound."""
    return _bounded(exponent, most).exp()


def bounded_expm1(exponent: Tensor, most: float | Tensor = MAX_EXPONENT) -> Tensor:
    """e^min(x, most) - 1, exact near 0; gradient 0 beyond the bound."""
    return torch.expm1(_bounded(exponent, most))


def _bounded(exponent: Tensor, most: float | Tensor) -> Tensor:
    if isinstance(most, Tensor):
        return torch.clamp(exponent, max=most.to(exponent.dtype))
    return exponent.clamp(max=most)


def sigmoid_times_exp(weight: Tensor, exponent: Tensor, most: float | Tensor = MAX_EXPONENT) -> Tensor:
    """sigmoid(w) e^x in log space, where either factor alone would vanish or overflow."""
    return bounded_exp(F.logsigmoid(weight) + exponent, most)


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - e^x), the log-probability of the complement; x at most -eps of the dtype, where it is cut off.

    Two branches meet at -ln 2 (Maechler, 2012): ``log1p`` loses no digits below, ``expm1`` none above.
    """
    x = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    is_small = x < -math.log(2)
    # Each branch gets arguments of its own side, so that neither sends a NaN into the gradient.
    small, large = x.where(is_small, -1.0), x.where(~is_small, -0.1)
    return torch.where(is_small, torch.log1p(-small.exp()), torch.log(-torch.expm1(large)))
