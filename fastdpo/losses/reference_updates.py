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
def extrapolate_parameters(current: Iterable[Tensor], previous: Iterable[Tensor], alpha: float) -> None:
    """current <- current + alpha (current - previous), in place, at the end of a round.

    The step of accelerated preference optimisation (arXiv:2410.06293): the result is the next round's start
    and its reference. 0 changes nothing: iterative DPO. alpha has no default: the paper's could not be
    checked.

    Raises:
        ValueError: alpha is not finite or negative, or the parameters do not match.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha: got {alpha!r}, wanted a number in [0, inf)")
    for target, source in _matched(current, previous):
        target.lerp_(source.to(target.device, target.dtype), -alpha)


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
