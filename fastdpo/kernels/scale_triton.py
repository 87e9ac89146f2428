"""``tensor *= factor`` in Triton, whose blocks return at once where the factor on the device is 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_device import unavailable_reason
from .triton_parts import _jit, tl

__all__ = ["scale_", "unavailable_reason"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 2048
BLOCKS_PER_MULTIPROCESSOR = 8


@_jit(do_not_specialize=["size"])
def _scale_kernel(tensor, factor, size, BLOCK: tl.constexpr):
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        lanes = tl.arange(0, BLOCK)
        while start + BLOCK <= size:  # without a mask, which would split accesses of 16 bytes
            at = tensor + start + lanes
            tl.store(at, (tl.load(at).to(tl.float32) * scale).to(tensor.dtype.element_ty))
            start += step
        if start < size:
            at, mask = tensor + start + lanes, start + lanes < size
            value = tl.load(at, mask=mask).to(tl.float32)
            tl.store(at, (value * scale).to(tensor.dtype.element_ty), mask=mask)


def plan_launch(tensor: Tensor, factor: Tensor) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and options of the launch, so that a test can compile just that."""
    num_blocks = -(-tensor.numel() // BLOCK)
    if tensor.device.type == "cuda":
        properties = torch.cuda.get_device_properties(tensor.device)
        num_blocks = min(num_blocks, BLOCKS_PER_MULTIPROCESSOR * properties.multi_processor_count)
    return (num_blocks,), (tensor, factor, tensor.numel()), {"BLOCK": BLOCK, "num_warps": 8}


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous fp32, bf16 or fp16 tensor by a ``()`` tensor on its device."""
    if tensor.numel() == 0:
        return
    with torch.cuda.device_of(tensor):
        grid, args, options = plan_launch(tensor, factor)
        _scale_kernel[grid](*args, **options)
