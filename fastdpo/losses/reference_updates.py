"""Moving the reference, or the start of the next round, along with the policy: on parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def mix_parameters(reference: Iterable[Tensor], policy: Iterable[Tensor], weight: float = 0.6) -> None:
    """reference <- weight * policy + (1 - weight) * reference, in place: TR-DPO's update.

    Args:
        reference, policy: parameters in the same order, of the same shapes.
        weight: in [0, 1]: 0 changes nothing, 1 copies. The paper has 0.6 every 512 steps, or 1 (hard).

    Raises:
        ValueError: the weight is out of range, or the parameters do not match.

    Source: arXiv:2404.09656.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: got {weight!r}, wanted a number in [0, 1]")
    for target, source in _matched(reference, policy):
        target.lerp_(source.to(target.device, target.dtype), weight)


@torch.no_grad()
def extrapolate_parameters(current: Iterable[Tensor], last_end: Iterable[Tensor], alpha: float) -> None:
    """current <- current + alpha (current - last_end) and last_end <- what current was, both in place.

    The step of accelerated preference optimisation (arXiv:2410.06293) at the end of a round: what comes of
    ``current`` is the next round's start and its reference. The direction is from the end of the last round
    to that of this one, neither of them extrapolated. alpha = 0 is iterative DPO; it has no default, as the
    paper's could not be checked.

    Args:
        current: what this round has reached.
        last_end: copies of what the last one had reached, before it was extrapolated; before the first, of
            the parameters that it started from.
        alpha: at least 0.

    Raises:
        ValueError: alpha is negative or not finite, or the parameters do not match.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha: got {alpha!r}, wanted a number in [0, inf)")
    for target, previous in _matched(current, last_end):
        end = target.clone()
        target.lerp_(previous.to(target.device, target.dtype), -alpha)
        previous.copy_(end)


def _matched(first: Iterable[Tensor], second: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Both as pairs, checked before anything is changed."""
    targets, sources = list(first), list(second)
    if len(targets) != len(sources):
        raise ValueError(f"parameters: got {len(targets)} and {len(sources)}, wanted the same number")
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            shapes = f"shapes {tuple(target.shape)} and {tuple(source.shape)}"
            raise ValueError(f"parameters[{index}]: got {shapes}, wanted the same")
    return list(zip(targets, sources, strict=True))
