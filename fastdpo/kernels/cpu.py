"""The row kernel in C++ (``csrc/cpu/row_kernels.cpp``): rows over OpenMP threads, vectorised exp and tanh.

Takes fp32 and bf16 logits on the CPU; each logit is read from memory once where a row fits in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import LogitTransform, RowOutputs
from .native import _C, extension_problem, row_args


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot run here (on ``device``), with the remedy, or None."""
    if device is not None and device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    return extension_problem()


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
    """``contract.RowKernel`` on CPU tensors, with ``torch.get_num_threads()`` threads.

    Raises:
        RuntimeError: the backend cannot run here, see ``unavailable_reason``.
        ValueError: tensors of a shape, dtype, device or strides the kernel cannot take.
    """
    if (reason := unavailable_reason(logits.device)) is not None:
        raise RuntimeError(reason)
    args = row_args(
        logits,
        labels,
        transform,
        outputs,
        target_logits=target_logits,
        d_out=d_out,
        grad_coeffs=grad_coeffs,
    )
    _C.cpu_row_kernel(args, torch.get_num_threads())
