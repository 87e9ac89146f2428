"""The sums of matrix units, bit by bit: what the hardware alone does to a logit.

A tensor core adds ``products`` products to its accumulator at a time. It aligns all of them to the largest
exponent, cuts each off ``fraction_bits`` below it, adds exactly, and cuts the sum off at fp32's 23 bits.
Nothing is rounded to nearest, so every step moves the accumulator towards zero. The numbers are those of
MMA-Sim (arXiv:2511.10909), which are bit for bit those of the chips; this is our own writing of the
algorithm.

fp32 operands without TF32, and a CPU, have a chain of fused multiply-adds: each step is rounded to nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Bits of an fp64 number that are kept:
_EXPONENT = 0x7FF << 52  # the power of two below it
_SINGLE = -1 << 29  # the 23 fraction bits of fp32
_TF32 = -1 << 42  # 10
_SMALLEST = 2.0**-126  # the exponent of a product of zero


class TensorCore(NamedTuple):
    """How one architecture adds products of 16-bit operands; of TF32 ones it takes half as many at a time."""

    name: str
    products: int
    fraction_bits: int

    @property
    def of_tf32(self) -> TensorCore:
        return self._replace(products=self.products // 2)


AMPERE = TensorCore("sm_8x", 8, 24)  # Ampere and Ada
HOPPER = TensorCore("sm_90 and newer", 16, 25)  # Hopper, and Blackwell of both kinds


def tensor_core(capability: tuple[int, int]) -> TensorCore:
    """That of a compute capability; what is newer than Blackwell is taken for it."""
    return AMPERE if capability < (9, 0) else HOPPER


def summed_by(
    dtype: torch.dtype, capability: tuple[int, int] | None, *, tf32: bool = False
) -> TensorCore | None:
    """What adds products of ``dtype``: a GPU's tensor core; None for a chain, as of fp32 and of CPUs.

    Args:
        capability: of the GPU; None for a CPU.
        tf32: whether torch lets fp32 operands take TF32.
    """
    if capability is None or dtype.itemsize > 4 or (dtype.itemsize == 4 and not tf32):
        return None
    core = tensor_core(capability)
    return core.of_tf32 if dtype.itemsize == 4 else core


def tensor_core_sums(a: Tensor, b: Tensor, core: TensorCore) -> Tensor:
    """Sums over the last dimension of ``a * b`` as a tensor core makes them, from an accumulator of 0.

    Args:
        a, b: shapes that broadcast, ``(..., K)``; values that the operands' dtype holds, finite and, with
        their
            products, normal in fp32.

    Returns:
        ``(...)`` fp32.
    """
    total = torch.zeros(torch.broadcast_shapes(a.shape, b.shape)[:-1], dtype=torch.float64)
    for x, y in zip(_in_steps(a, core.products), _in_steps(b, core.products), strict=True):  # (..., products)
        # The exponent of a product is the sum of its factors', though it may be one more.
        top = (_kept(x, _EXPONENT) * _kept(y, _EXPONENT)).amax(-1)
        top = top.maximum(_kept(total, _EXPONENT)).clamp(min=_SMALLEST)
        scale = 2.0**core.fraction_bits / top  # powers of two: nothing rounds
        aligned = (x * y * scale[..., None]).trunc().sum(-1) + (total * scale).trunc()
        total = _kept(aligned / scale, _SINGLE)
    return total.float()


def multiply_add_chain(a: Tensor, b: Tensor) -> Tensor:
    """Sums over the last dimension of ``a * b`` by fused multiply-adds in fp32, one after the other.

    Each step is exact in fp64 up to its 53 bits and rounded to fp32 from there.

    Args:
        a, b: shapes that broadcast, ``(..., K)``; values of fp32.

    Returns:
        ``(...)`` fp32.
    """
    total = torch.zeros(torch.broadcast_shapes(a.shape, b.shape)[:-1])
    for x, y in zip(_in_steps(a, 1), _in_steps(b, 1), strict=True):
        total = (total + x[..., 0] * y[..., 0]).float()
    return total


def truncated_to_tf32(x: Tensor) -> Tensor:
    """What a tensor core takes of an fp32 operand under TF32: 10 fraction bits, the rest cut off."""
    return _kept(x.double(), _TF32).float()


def _in_steps(x: Tensor, size: int) -> Tensor:
    """``(..., K)`` as ``(steps, ..., size)`` fp64, the last step filled up with zeros."""
    x = F.pad(x.double(), (0, -x.shape[-1] % size))
    return x.unflatten(-1, (-1, size)).movedim(-2, 0).contiguous()


def _kept(x: Tensor, bits: int) -> Tensor:
    """Bits of fp64 numbers, the others 0: cut off towards zero."""
    return (x.view(torch.int64) & bits).view(torch.float64)
