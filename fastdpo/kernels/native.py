"""Tensors to the addresses and sizes that the compiled kernels take: the Python side of ``csrc/common.h``.

The kernels trust what they are given, so whatever could make one touch memory that is not its own is
checked here, once per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import LogitTransform, RowOutputs

try:
    from .. import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR: str | None = str(error)
else:
    _IMPORT_ERROR = None

D_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def extension_problem() -> str | None:
    """Why ``fastdpo._C`` cannot be used here, with the remedy, or None."""
    if _IMPORT_ERROR is None:
        return None
    return f"fastdpo._C is not built ({_IMPORT_ERROR}): with a C++17 compiler, `fastdpo build` builds it"


def cuda_problem() -> str | None:
    """Why the extension's CUDA kernels cannot be used here, with the remedy, or None."""
    if _IMPORT_ERROR is not None or _C.built_with_cuda:
        return extension_problem()
    return "fastdpo._C was built without CUDA: with nvcc on PATH or in CUDA_HOME, `fastdpo build` builds it"


def row_args(
    logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    outputs: RowOutputs,
    *,
    target_logits: Tensor | None = None,
    d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> _C.RowArgs:
    """A chunk in the terms of ``csrc/common.h``; the arguments are those of ``contract.RowKernel``.

    The result holds addresses only: the tensors must outlive the kernel's use of it.

    Raises:
        ValueError: a tensor whose shape, dtype, device or strides the kernels cannot take.
    """
    rows, vocab = logits.shape
    device = logits.device
    args = _C.RowArgs()
    args.rows, args.vocab = rows, vocab
    args.logits, args.logits_stride = _matrix("logits", logits, (rows, vocab), device)
    args.logits_dtype = _dtype("logits", logits, (torch.float32, torch.bfloat16))
    args.labels = _vector("labels", labels, (rows,), torch.int64, device)

    args.bias = _vector("bias", transform.bias, (vocab,), torch.float32, device)
    args.scale, args.softcap, args.temperature = (
        transform.scale,
        transform.softcap or 0.0,
        transform.temperature,
    )

    args.is_top1 = _vector("is_top1", outputs.is_top1, (rows,), torch.bool, device)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logit"):
        setattr(args, name, _vector(name, getattr(outputs, name), (rows,), torch.float32, device))

    if target_logits is not None and logits.dtype != torch.bfloat16:
        raise ValueError(f"target_logits: wanted only with bfloat16 logits, got {logits.dtype} logits")
    args.target_logits = _vector("target_logits", target_logits, (rows,), torch.float32, device)

    if d_out is not None:
        args.d_out, args.d_stride = _matrix("d_out", d_out, (rows, vocab), device)
        args.d_dtype = _dtype("d_out", d_out, D_DTYPES)
        _check_overlap("d_out", logits, d_out)
        args.grad_coeffs = _vector("grad_coeffs", grad_coeffs, (3, rows), torch.float32, device)
    elif grad_coeffs is not None:
        raise ValueError("grad_coeffs: wanted only with d_out, got d_out=None")
    return args


def _matrix(name: str, tensor: Tensor, shape: tuple[int, int], device: torch.device) -> tuple[int, int]:
    """Address and row stride of a matrix with contiguous rows that do not overlap."""
    row_stride, column_stride = tensor.stride()
    if tensor.shape != shape or tensor.device != device:
        raise ValueError(f"{name}: wanted {shape} on {device}, got {tuple(tensor.shape)} on {tensor.device}")
    if (column_stride != 1 and shape[1] > 1) or (row_stride < shape[1] and shape[0] > 1):
        raise ValueError(
            f"{name}: wanted contiguous rows at least {shape[1]} apart, got strides {tensor.stride()}"
        )
    return tensor.data_ptr(), row_stride


def _vector(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> int:
    """Address of a contiguous tensor, 0 for None."""
    if tensor is None:
        return 0
    if (
        tensor.shape != shape
        or tensor.dtype != dtype
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name}: wanted a contiguous {dtype} tensor {shape} on {device}, got {tensor.dtype} "
            f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


def _dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> _C.DType:
    if tensor.dtype not in allowed:
        raise ValueError(
            f"{name}: the compiled kernels take {', '.join(map(str, allowed))}, got {tensor.dtype}"
        )
    return {torch.float32: _C.DType.f32, torch.bfloat16: _C.DType.bf16, torch.float16: _C.DType.f16}[
        tensor.dtype
    ]


def _check_overlap(name: str, logits: Tensor, d_out: Tensor) -> None:
    """D in the place of the logits must keep every row inside that row's own logits."""
    if d_out.data_ptr() != logits.data_ptr() or logits.shape[0] < 2:
        return
    logits_bytes, d_bytes = (t.stride(0) * t.element_size() for t in (logits, d_out))
    if logits_bytes != d_bytes or d_out.element_size() > logits.element_size():
        raise ValueError(
            f"{name}: wanted rows of {logits_bytes} bytes and elements no larger than the logits' where both "
            f"share memory, got rows of {d_bytes} bytes and {d_out.dtype} in the place of {logits.dtype}"
        )
