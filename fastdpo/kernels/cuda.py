"""The row kernel in CUDA C++ (``csrc/cuda``): compute capability 8.0 and up, with clusters from 9.0 on.

Takes fp32 and bf16 logits. Each logit is read from memory once: with clusters up to a vocabulary of 360
thousand, without them up to 32 thousand on an A100. Of a longer row the part that does not fit on chip is
read twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import LogitTransform, RowOutputs
from .native import cuda_problem, row_args

MIN_CAPABILITY = (8, 0)


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot run here (on ``device``), with the remedy, or None."""
    if (problem := cuda_problem()) is not None:
        return problem
    if device is not None and device.type != "cuda":
        return f"it runs on CUDA tensors, got {device}"
    if not torch.cuda.is_available():
        return "no CUDA device is available to torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 8.0 or higher, {name} has {capability[0]}.{capability[1]}"
    return None


def row_kernel(
    logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    outputs: RowOutputs,
    *,
    target_logits: Tensor | None = None,
    d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> None:
    """``contract.RowKernel`` on CUDA tensors: one launch on the device's current stream, no synchronisation.

    Raises:
        RuntimeError: the backend cannot run here, see ``unavailable_reason``, or the launch failed.
        ValueError: tensors of a shape, dtype, device or strides the kernel cannot take.
    """
    if (reason := unavailable_reason(logits.device)) is not None:
        raise RuntimeError(reason)
    from fastdpo import _C  # not there in an install without a compiler, and then refused above

    args = row_args(
        logits,
        labels,
        transform,
        outputs,
        target_logits=target_logits,
        d_out=d_out,
        grad_coeffs=grad_coeffs,
    )
    # The launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(logits.device):
        _C.cuda_row_kernel(args, torch.cuda.current_stream().cuda_stream)
