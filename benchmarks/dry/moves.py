"""``Tensor.to`` between a CPU and a GPU of which torch's C++ knows nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.dry.tensor import Hollow, current, to_any


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Hollow) -> Tensor:
        return current().to_host(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return current().to_gpu(grad, non_blocking=True)


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, non_blocking: bool) -> Tensor:
        return current().to_gpu(tensor, non_blocking)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return current().to_host(grad), None


def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    """``Tensor.to``, also to and from a GPU of which C++ knows nothing."""
    copy = bool(options.pop("copy", False))
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **options)
    if device is not None and (device.type == "cuda") != isinstance(tensor, Hollow):
        if device.type == "cuda":
            tensor = _ToGpu.apply(tensor, non_blocking)
        elif isinstance(tensor, Hollow) and device.type == "cpu":
            tensor = _ToHost.apply(tensor)
        else:
            tensor = to_any(tensor, device)
    more = {} if memory_format is None else {"memory_format": memory_format}
    return to_any(tensor, dtype or tensor.dtype, copy=copy, **more)
