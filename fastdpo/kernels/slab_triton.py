"""D of a vocabulary slab from a given lse, in Triton (``slab.SlabGradient``): one read, one write a logit.

A program walks up one row of the slab. A 16-bit D overwrites the front of its own fp32 row, as in
``triton.py``: tile t of D lies over logits that tile t or an earlier one has read, and a barrier keeps fast
threads from writing what slow ones have yet to read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import LogitTransform
from .slab import value_and_slope
from .triton_device import unavailable_reason
from .triton_parts import LOG2_E, _expm1, _jit, _tanh

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # `unavailable_reason` says so
    triton = None

MAX_TILE = 2048


@_jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["labels", "logps", "lse", "coeffs", "entropy"],
)
def _slab_kernel(
    logits, labels, logps, lse, bias, coeffs, entropy, d_out,  # (C, S), (C,) each, (V,), (3, C), (C,), (C, S)
    num_rows, num_columns, first_token, logits_stride, d_stride, pre_scale, slope,
    SOFTCAP: tl.constexpr, IN_PLACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * logits_stride
    d_row = d_out + row.to(tl.int64) * d_stride
    label = tl.load(labels + row) - first_token
    label = tl.where((label >= 0) & (label < num_columns), label, -1).to(tl.int32)
    row_lse = tl.load(lse + row)
    others = -_expm1(tl.load(logps + row))  # 1 - p of the label
    for start in range(0, num_columns, TILE):
        columns = start + tl.arange(0, TILE)
        mask = columns < num_columns
        value = tl.load(x + columns, mask=mask, eviction_policy="evict_first")
        if bias is not None:
            value += tl.load(bias + first_token + columns, mask=mask, eviction_policy="evict_last")
        if pre_scale is not None:
            value *= pre_scale
        if SOFTCAP:
            value = _tanh(value)
        log_p = value * slope - row_lse
        p = tl.exp2(log_p * LOG2_E)
        is_label = columns == label
        if coeffs is None:
            grad = tl.where(is_label, others, -p)
        else:
            a = tl.load(coeffs + row)
            b = tl.load(coeffs + num_rows + row)
            grad = tl.where(is_label, a * others, 0.0)
            of_p = tl.where(is_label, b, b - a)
            if entropy is not None:
                c = tl.load(coeffs + 2 * num_rows + row)
                of_p -= c * (log_p + tl.load(entropy + row))
            grad += tl.where(p == 0.0, 0.0, p * of_p)
        if SOFTCAP:
            grad *= (1.0 - value) * (1.0 + value)
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(d_row + columns, grad.to(d_row.dtype.element_ty), mask=mask)


class Launch(NamedTuple):
    """One launch of the kernel."""

    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]


def slab_gradient(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    transform: LogitTransform,
    first_token: int,
    d_out: Tensor,
    *,
    coeffs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> None:
    """``slab.SlabGradient`` on CUDA tensors: fp32 logits, D in fp32, bf16 or fp16. No host synchronisation.

    Raises:
        RuntimeError: Triton does not run here.
        TypeError: logits that are not fp32.
        ValueError: D in place with rows further apart than those of logits, which would overlap other rows.
    """
    if (reason := unavailable_reason(logits.device)) is not None:
        raise RuntimeError(reason)
    if logits.dtype != torch.float32:
        raise TypeError(f"logits: got {logits.dtype}, want torch.float32")
    if logits.numel() == 0:
        return
    with torch.cuda.device_of(logits):
        launch = plan_launch(logits, labels, logps, lse, transform, first_token, d_out, coeffs, entropy)
        _slab_kernel[launch.grid](*launch.args, **launch.options)


def plan_launch(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    transform: LogitTransform,
    first_token: int,
    d_out: Tensor,
    coeffs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Launch:
    """What ``slab_gradient`` launches, so that a test can compile just that."""
    num_rows, num_columns = logits.shape
    in_place = d_out.data_ptr() == logits.data_ptr()
    pitch, d_pitch = (rows.stride(0) * rows.element_size() for rows in (logits, d_out))
    if in_place and num_rows > 1 and pitch != d_pitch:
        raise ValueError(f"d_out: in place, got {d_pitch} bytes a row, want logits' {pitch}")
    pre_scale, slope = value_and_slope(transform)
    args = (
        logits, labels, logps, lse, transform.bias, coeffs, entropy, d_out,
        num_rows, num_columns, first_token, logits.stride(0), d_out.stride(0), pre_scale, slope,
    )  # fmt: skip
    tile = min(MAX_TILE, max(256, triton.next_power_of_2(num_columns)))
    options = {
        "SOFTCAP": transform.softcap is not None,
        # A thread writes fp32 where it has read, and needs to wait for no other.
        "IN_PLACE": in_place and d_out.dtype != logits.dtype,
        "TILE": tile,
        "num_warps": tile // 256,  # 8 logits of a tile in each thread
        "enable_fp_fusion": False,
    }
    return Launch((num_rows,), args, options)
