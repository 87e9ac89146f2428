"""Tensors to the addresses that the compiled divergence kernel takes: the Python side of ``csrc/common.h``.

As ``native.py``: whatever could make the kernel touch memory that is not its own is checked here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import LogitTransform
from .divergence import DIVERGENCES, DivergenceOutputs
from .native import _C, D_DTYPES, _check_overlap, _dtype, _matrix, _vector


def divergence_args(
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
) -> _C.DivergenceArgs:
    """A chunk in the terms of ``csrc/common.h``; the arguments are those of ``divergence.DivergenceKernel``.

    The result holds addresses only: the tensors must outlive the kernel's use of it.

    Raises:
        ValueError: a tensor whose shape, dtype, device or strides the kernel cannot take, or arguments that
            contradict each other.
    """
    (rows, vocab), device = logits.shape, logits.device
    _check_together(teachers, transforms, outputs, coefficients, slopes, jsd_beta)
    _check_gradient(outputs, d_out, logps_d_out, grad_coeffs)
    args = _C.DivergenceArgs()
    args.rows, args.vocab = rows, vocab
    args.policy = _head("logits", logits, (rows, vocab), transforms[0], device)
    args.first = _head("teachers[0]", teachers[0], (rows, vocab), transforms[1], device)
    if len(teachers) == 2:
        args.second = _head("teachers[1]", teachers[1], (rows, vocab), transforms[2], device)
    args.labels = _vector("labels", labels, (rows,), torch.int64, device)
    args.coefficients = _vector("coefficients", coefficients, (2, rows), torch.float32, device)
    args.first_slope, args.second_slope = slopes
    args.jsd_beta = jsd_beta
    for name, out in outputs._asdict().items():
        setattr(args, name, _vector(name, out, (rows,), torch.float32, device))
    args.d_out = _d_args("d_out", d_out, logits, teachers)
    args.logps_d_out = _d_args("logps_d_out", logps_d_out, logits, teachers)
    args.grad_coeffs = _vector("grad_coeffs", grad_coeffs, (4, rows), torch.float32, device)
    return args


def _check_together(
    teachers: tuple[Tensor, ...],
    transforms: tuple[LogitTransform, ...],
    outputs: DivergenceOutputs,
    coefficients: Tensor | None,
    slopes: tuple[float, float],
    jsd_beta: float,
) -> None:
    if len(teachers) not in (1, 2):
        raise ValueError(f"teachers: wanted one or two, got {len(teachers)}")
    if len(transforms) != 1 + len(teachers):
        raise ValueError(f"transforms: wanted {1 + len(teachers)}, one for each head, got {len(transforms)}")
    if (coefficients is not None) != (len(teachers) == 2):
        raise ValueError(
            f"coefficients: wanted with two teachers and only then, got "
            f"{'none' if coefficients is None else 'some'} with {len(teachers)}"
        )
    if len(teachers) == 1 and outputs.l1_distance is not None:
        raise ValueError("l1_distance: wanted only with two teachers, got one teacher")
    if len(teachers) == 1 and any(slopes):
        raise ValueError(f"slopes: wanted only with two teachers, got {slopes} with one teacher")
    if outputs.jsd is not None and not 0.0 < jsd_beta < 1.0:
        raise ValueError(f"jsd_beta: wanted a number between 0 and 1, got {jsd_beta}")


def _check_gradient(
    outputs: DivergenceOutputs,
    d_out: Tensor | None,
    logps_d_out: Tensor | None,
    grad_coeffs: Tensor | None,
) -> None:
    if d_out is None:
        for name, tensor in (("logps_d_out", logps_d_out), ("grad_coeffs", grad_coeffs)):
            if tensor is not None:
                raise ValueError(f"{name}: wanted only with d_out, got d_out=None")
        return
    made = [name for name in DIVERGENCES if getattr(outputs, name) is not None]
    if grad_coeffs is None and len(made) != 1:
        raise ValueError(f"d_out: wanted one divergence in outputs without grad_coeffs, got {made}")
    if logps_d_out is not None and logps_d_out.data_ptr() == d_out.data_ptr() and d_out.numel():
        raise ValueError("logps_d_out: wanted memory of its own, got that of d_out")


def _head(
    name: str, logits: Tensor, shape: tuple[int, int], transform: LogitTransform, device: torch.device
) -> _C.HeadArgs:
    head = _C.HeadArgs()
    head.logits, head.stride = _matrix(name, logits, shape, device)
    _dtype(name, logits, (torch.float32,))
    head.bias = _vector(f"bias of {name}", transform.bias, (shape[1],), torch.float32, device)
    head.scale, head.softcap, head.temperature = (
        transform.scale,
        transform.softcap or 0.0,
        transform.temperature,
    )
    return head


def _d_args(name: str, d_out: Tensor | None, logits: Tensor, teachers: tuple[Tensor, ...]) -> _C.DArgs:
    args = _C.DArgs()
    if d_out is None:
        return args
    args.d, args.stride = _matrix(name, d_out, (logits.shape[0], logits.shape[1]), logits.device)
    args.dtype = _dtype(name, d_out, D_DTYPES)
    for products in (logits, *teachers):
        _check_overlap(name, products, d_out)
    return args
