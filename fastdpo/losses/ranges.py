"""Legal ranges of numbers: of a loss's options, and of what comes with rows of data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """The legal range of a number, as the metadata of an ``Annotated`` option; ``[low, high)`` by default."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = False

    def __contains__(self, value: float) -> bool:
        is_above = self.low < value or (self.includes_low and value == self.low)
        is_below = value < self.high or (self.includes_high and value == self.high)
        return math.isfinite(value) and is_above and is_below

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        left, right = "[" if self.includes_low else "(", "]" if self.includes_high else ")"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"


FINITE = Interval()
NOT_NEGATIVE = Interval(0.0)
POSITIVE = Interval(0.0, includes_low=False)
PROBABILITY = Interval(0.0, 1.0, includes_high=True)

FlipProbability: TypeAlias = Annotated[float, Interval(0.0, 0.5)]
NonNegative: TypeAlias = Annotated[float, NOT_NEGATIVE]
Positive: TypeAlias = Annotated[float, POSITIVE]
Fraction: TypeAlias = Annotated[float, PROBABILITY]


def check_range(name: str, values: object, legal: Interval) -> None:
    """Raise ValueError unless all numbers of a tensor are in a range. What is no tensor is fine.

    On the CPU only: to read them elsewhere would synchronise.
    """
    if not isinstance(values, Tensor) or not can_be_read(values):
        return
    seen = values.detach()
    is_good = seen.isfinite() & (seen >= legal.low) & (seen <= legal.high)
    is_good &= (seen != legal.low) | legal.includes_low
    is_good &= (seen != legal.high) | legal.includes_high
    if not bool(is_good.all()):
        raise ValueError(f"{name}: got {seen[~is_good][0].item()!r} among them, wanted each {legal}")


def can_be_read(values: Tensor) -> bool:
    """Whether looking at the numbers of a tensor costs nothing: on the CPU, in a plain run.

    Elsewhere it would wait for the device. A tensor that is traced or fake (as every subclass may be) has no
    numbers yet.
    """
    is_plain = type(values) in (Tensor, torch.nn.Parameter)
    return is_plain and values.device.type == "cpu" and not torch.compiler.is_compiling()
