"""Multiply a gradient that is ready by the incoming one, without waiting for the device to know it.

A loss's incoming gradient is nearly always 1. Then nothing is read or written: on a CPU because the value is
at hand, on a GPU because the kernel's blocks look at it first and return.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

PIECE = 2**24  # elements


def scaled(tensor: Tensor, factor: Tensor) -> Tensor:
    """``tensor * factor``, in the place of ``tensor``, which the caller gives up.

    Args:
        tensor: floating point, contiguous.
        factor: ``()``, on the same device. The product is rounded once, to the dtype of ``tensor``.
    """
    if type(tensor) is not Tensor:  # traced: a compiler finds the place itself
        return (tensor * factor).to(tensor.dtype)
    if tensor.device.type == "cpu":
        value = factor.item()
        return tensor if value == 1 else tensor.mul_(value)
    kernels = import_module("fastdpo.kernels.scale_triton")  # not before it is used: it loads triton
    if kernels.unavailable_reason(tensor.device) is None and tensor.dtype in kernels.DTYPES:
        kernels.scale_(tensor, factor)
        return tensor
    # In pieces: a bf16 tensor times a () tensor would round the factor to bf16 first.
    for piece in tensor.view(-1).split(PIECE):
        wide = torch.promote_types(piece.dtype, factor.dtype)
        piece.copy_(piece.to(wide) * factor.to(wide))
    return tensor
