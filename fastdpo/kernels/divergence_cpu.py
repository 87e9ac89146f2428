"""The divergence kernel in C++ (``csrc/cpu/divergence.cpp``): rows over OpenMP threads, vectorised."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import LogitTransform
from .cpu import unavailable_reason
from .divergence import DivergenceOutputs
from .divergence_native import divergence_args
from .native import _C

__all__ = ["divergence_kernel", "unavailable_reason"]


def divergence_kernel(
    logits: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor,
    transforms: tuple[LogitTransform, ...],
    outputs: DivergenceOutputs,
    *,
    coefficients: Tensor | None = None,
    slopes: tuple[float, float] = (0.0, 0.0),
    jsd_beta: float = 0.5,
    d_out: Tensor | None = None,
    logps_d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> None:
    """``divergence.DivergenceKernel`` on CPU tensors, fp32 logits, with ``torch.get_num_threads()`` threads.

    Takes a whole chunk at once: beside it 8 bytes are made for every 1024 logits of a row.

    Raises:
        RuntimeError: the backend cannot run here, see ``unavailable_reason``.
        ValueError: tensors of a shape, dtype, device or strides the kernel cannot take.
    """
    if (reason := unavailable_reason(logits.device)) is not None:
        raise RuntimeError(reason)
    args = divergence_args(
        logits,
        teachers,
        labels,
        transforms,
        outputs,
        coefficients=coefficients,
        slopes=slopes,
        jsd_beta=jsd_beta,
        d_out=d_out,
        logps_d_out=logps_d_out,
        grad_coeffs=grad_coeffs,
    )
    _C.cpu_divergence_kernel(args, torch.get_num_threads())
