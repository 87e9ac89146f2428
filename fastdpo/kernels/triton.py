"""The row kernel in Triton; ``contract.py`` has the maths and the rules.

A row is cut into tiles of 16-byte groups. Pass one walks from the last tile down to tile 0 and keeps for
every group a running maximum and sums relative to it: one exp per logit, one per group, no barrier. Pass
two writes D from tile 0, which is still in registers, up: a row of one tile is read once, a longer row
again, first what was read last and is still in L2. Walking up is also what lets a 16-bit D overwrite the
front of its own fp32 row.

z = slope v with slope > 0 and v = +-(x + b), or v = tanh(s (x + b) / cap) with a softcap. Differences of v
are taken before anything is scaled, so that logits of +-1e4 lose nothing. Sums have one order for each V,
dtype and head: the compiler fuses no multiply-add, and no layout depends on what is asked for beside logp.

Runs on CUDA from sm_80 on, and for tests on the CPU (``TRITON_INTERPRET=1`` at import).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import LogitTransform, RowOutputs

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the module stays importable; unavailable_reason() says what is missing
    triton = None

MIN_CAPABILITY = (8, 0)
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_BYTES = 16  # what one thread loads at once
SMALL_ROW_BYTES = 128 * 1024  # L2 holds two such rows for each SM of an A100, H100 or H200: two blocks an SM
MAX_TILE = 4096  # logits; larger tiles have spilled registers on some architecture, under some Triton


def _jit(**options: Any) -> Any:
    return (lambda function: function) if triton is None else triton.jit(**options)


def _constexpr(value: float) -> Any:
    return value if triton is None else tl.constexpr(value)


LOG2_E = _constexpr(math.log2(math.e))
LN_2 = _constexpr(math.log(2.0))
MINUS_INF = _constexpr(-math.inf)


@_jit()
def _tanh(x):
    """tanh to fp32 rounding: libdevice's has no interpreter, and tanh.approx keeps 11 bits."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - decay) / (1.0 + decay)
    # Where 1 - decay cancels: a least-squares fit of (tanh(x) / x - 1) / x^2 for |x| < 0.55.
    square = x * x
    fit = tl.fma(square, 0.01634263, -0.052621946)
    fit = tl.fma(square, tl.fma(square, fit, 0.1331994), -0.3333291)
    small = tl.fma(x * square, fit, x)
    return tl.where(tl.abs(x) < 0.55, small, tl.where(x < 0.0, -large, large))


@_jit()
def _value(x, columns, mask, label, target, bias, pre_scale, SOFTCAP: tl.constexpr):
    """v of the raw products x at `columns`; anything where `mask` is False."""
    x = x.to(tl.float32)
    if target is not None:
        x = tl.where(columns == label, target, x)
    if bias is not None:
        x += tl.load(bias + columns, mask=mask, eviction_policy="evict_last")
    if pre_scale is not None:
        x *= pre_scale
    if SOFTCAP:
        x = _tanh(x)
    return x


@_jit()
def _rebase(old_max, new_max, sum_e, sum_ee, sum_ed, to_log2):
    """Move sums of e = 2^d, d = (v - max) to_log2, to a larger maximum; that of nothing yet is -inf."""
    shift = tl.where(old_max == MINUS_INF, 0.0, (old_max - new_max) * to_log2)
    factor = tl.exp2(shift)
    return sum_e * factor, sum_ee * factor * factor, (sum_ed + shift * sum_e) * factor


@_jit()
def _fold(value, mask, sums, to_log2):
    """Add a tile (groups, width) to the maximum and the sums of e, e^2, e d and v of each group.

    What no output needs of them, the compiler drops.
    """
    maximum, sum_e, sum_ee, sum_ed, sum_v = sums
    sum_v += tl.sum(tl.where(mask, value, 0.0), axis=1)
    value = tl.where(mask, value, MINUS_INF)
    new_max = tl.maximum(maximum, tl.max(value, axis=1))
    sum_e, sum_ee, sum_ed = _rebase(maximum, new_max, sum_e, sum_ee, sum_ed, to_log2)
    base = tl.where(new_max == MINUS_INF, 0.0, new_max)  # -inf - -inf would be NaN
    d = (value - base[:, None]) * to_log2
    e = tl.exp2(d)
    sum_e += tl.sum(e, axis=1)
    sum_ee += tl.sum(e * e, axis=1)
    sum_ed += tl.sum(tl.where(e == 0.0, 0.0, e * d), axis=1)
    return new_max, sum_e, sum_ee, sum_ed, sum_v


@_jit()
def _store_grad(d_row, value, columns, mask, softmax, coeffs, SOFTCAP: tl.constexpr, IN_PLACE: tl.constexpr):
    """Write D, or the gradient of a logp + b lse + c entropy where the coefficients are given."""
    base, to_log2, log2_sum, entropy, label = softmax
    log2_p = (value - base) * to_log2 - log2_sum
    p = tl.exp2(log2_p)
    is_label = columns == label
    if coeffs is None:
        grad = tl.where(is_label, 1.0, 0.0) - p
    else:
        a, b, c = coeffs
        of_p = b - a - c * (log2_p * LN_2 + entropy)
        grad = tl.where(is_label, a, 0.0) + tl.where(p == 0.0, 0.0, p * of_p)
    if SOFTCAP:
        grad *= (1.0 - value) * (1.0 + value)
    if IN_PLACE:
        # A 16-bit D lies over the neighbours' fp32 logits: no thread writes before all have read.
        tl.debug_barrier()
    tl.store(d_row + columns, grad.to(d_row.dtype.element_ty), mask=mask, eviction_policy="evict_first")


PER_ROW = ("labels", "target_logits", "grad_coeffs", *RowOutputs._fields)


# Not compiled again for another number of rows, nor for a chunk that begins elsewhere.
@_jit(do_not_specialize=["num_rows", "vocab_size"], do_not_specialize_on_alignment=PER_ROW)
def _row_kernel(
    logits, labels, bias, target_logits, grad_coeffs, d_out,  # (C, V), (C,), (V,), (C,), (3, C), (C, V)
    logps, lse, entropy, log_sum_sq_probs, mean_logit, is_top1,  # (C,) each
    num_rows, vocab_size, logits_stride, d_stride,
    pre_scale, slope,
    SOFTCAP: tl.constexpr, IN_PLACE: tl.constexpr, RAGGED: tl.constexpr,
    NUM_TILES: tl.constexpr, UNROLL: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = TILE // WIDTH
    LAST: tl.constexpr = NUM_TILES - 1
    KEEP: tl.constexpr = "evict_first" if d_out is None else "evict_last"
    starts = tl.arange(0, GROUPS)[:, None] * WIDTH
    lanes = starts + tl.arange(0, WIDTH)[None, :]
    last_lanes = LAST * TILE + lanes
    # One mask for a whole group keeps accesses 16 bytes wide; up to WIDTH - 1 logits are left after the last.
    whole = vocab_size // WIDTH * WIDTH
    last_mask = tl.broadcast_to(LAST * TILE + starts < whole, lanes.shape)
    rest = whole + tl.arange(0, GROUPS)[:, None]  # one a group
    rest_mask = rest < vocab_size
    to_log2 = slope * LOG2_E

    row = tl.program_id(0)
    while row < num_rows:
        x = logits + row.to(tl.int64) * logits_stride
        label = tl.load(labels + row)
        has_label = (label >= 0) & (label < vocab_size)
        label = tl.where(has_label, label, -1).to(tl.int32)
        target = target_logits
        if target_logits is not None:
            target = tl.load(target_logits + row)
        label_x = tl.load(x + label, mask=has_label, other=0.0)
        label_value = _value(label_x, label, has_label, label, target, bias, pre_scale, SOFTCAP)

        # Pass one, down to tile 0. A tile is loaded before the one above it is summed.
        raw = tl.load(x + last_lanes, mask=last_mask, eviction_policy=KEEP)
        zero = tl.zeros([GROUPS], tl.float32)
        sums = (zero + MINUS_INF, zero, zero, zero, zero)
        if RAGGED:
            x_rest = tl.load(x + rest, mask=rest_mask)
            rest_value = _value(x_rest, rest, rest_mask, label, target, bias, pre_scale, SOFTCAP)
            sums = _fold(rest_value, rest_mask, sums, to_log2)
        for step in tl.range(0, LAST, loop_unroll_factor=UNROLL):
            tile = (LAST - step) * TILE
            ahead = tl.load(x + (tile - TILE) + lanes, eviction_policy=KEEP)
            mask = tl.broadcast_to(tile + starts < whole, lanes.shape)
            value = _value(raw, tile + lanes, mask, label, target, bias, pre_scale, SOFTCAP)
            sums = _fold(value, mask, sums, to_log2)
            raw = ahead
        mask = tl.broadcast_to(starts < whole, lanes.shape)
        value = _value(raw, lanes, mask, label, target, bias, pre_scale, SOFTCAP)
        sums = _fold(value, mask, sums, to_log2)

        top = tl.max(sums[0])
        sum_e, sum_ee, sum_ed = _rebase(sums[0], top, sums[1], sums[2], sums[3], to_log2)
        total = tl.sum(sum_e)
        log_sum = tl.log(total)
        base = tl.where(top == MINUS_INF, 0.0, top)
        row_entropy = log_sum - tl.sum(sum_ed) / total * LN_2
        tl.store(logps + row, tl.where(has_label, (label_value - base) * slope - log_sum, float("nan")))
        tl.store(lse + row, base * slope + log_sum)
        if entropy is not None:
            tl.store(entropy + row, row_entropy)
        if log_sum_sq_probs is not None:
            tl.store(log_sum_sq_probs + row, tl.log(tl.sum(sum_ee)) - 2.0 * log_sum)
        if mean_logit is not None:
            tl.store(mean_logit + row, tl.sum(sums[4]) / vocab_size * slope)
        if is_top1 is not None:
            tl.store(is_top1 + row, has_label & (label_value == top) & (total == total))

        # Pass two, up from the tile still in registers.
        if d_out is not None:
            coeffs = grad_coeffs
            if grad_coeffs is not None:
                at = grad_coeffs + row
                coeffs = (tl.load(at), tl.load(at + num_rows), tl.load(at + 2 * num_rows))
            d_row = d_out + row.to(tl.int64) * d_stride
            softmax = (base, to_log2, log_sum * LOG2_E, row_entropy, label)
            for step in range(0, LAST):
                columns = step * TILE + lanes
                mask = tl.broadcast_to((step + 1) * TILE + starts < whole, lanes.shape)
                ahead = tl.load(x + TILE + columns, mask=mask, eviction_policy="evict_first")
                value = _value(raw, columns, None, label, target, bias, pre_scale, SOFTCAP)
                _store_grad(d_row, value, columns, None, softmax, coeffs, SOFTCAP, IN_PLACE)
                raw = ahead
            value = _value(raw, last_lanes, last_mask, label, target, bias, pre_scale, SOFTCAP)
            _store_grad(d_row, value, last_lanes, last_mask, softmax, coeffs, SOFTCAP, IN_PLACE)
            if RAGGED:
                x_rest = tl.load(x + rest, mask=rest_mask)
                rest_value = _value(x_rest, rest, rest_mask, label, target, bias, pre_scale, SOFTCAP)
                _store_grad(d_row, rest_value, rest, rest_mask, softmax, coeffs, SOFTCAP, IN_PLACE)
        row += tl.num_programs(0)


class Launch(NamedTuple):
    """One launch of the row kernel."""

    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot run here (on ``device``), with the remedy, or None."""
    if triton is None:
        return "triton is not installed; pip install triton"
    if not isinstance(_row_kernel, triton.JITFunction):
        return None  # interpreted
    for_tests = "TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests"
    if device is not None and device.type != "cuda":
        return f"it runs on CUDA tensors, got {device}; {for_tests}"
    if not torch.cuda.is_available():
        return f"no CUDA device is available to torch; {for_tests}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"it needs a GPU of compute capability {MIN_CAPABILITY} or newer, got {capability}"
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
    """``contract.RowKernel`` on CUDA tensors: fp32, bf16 or fp16 logits, D in any of these.

    Rows that do not start at multiples of 16 bytes are copied to ones that do first. No host synchronisation.

    Raises:
        RuntimeError: the backend does not run here.
        TypeError: logits of another dtype.
        ValueError: D in place with rows further apart than those of logits, which would overlap other rows.
    """
    if (reason := unavailable_reason(logits.device)) is not None:
        raise RuntimeError(reason)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits: got {logits.dtype}, want one of {LOGITS_DTYPES}")
    if len(logits) == 0:
        return
    with torch.cuda.device_of(logits):
        launch = plan_launch(logits, labels, transform, outputs, target_logits, d_out, grad_coeffs)
        _row_kernel[launch.grid](*launch.args, **launch.options)


def plan_launch(
    logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    outputs: RowOutputs,
    target_logits: Tensor | None = None,
    d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> Launch:
    """What ``row_kernel`` launches, so that a test can compile just that."""
    num_rows, vocab_size = logits.shape
    in_place = d_out is not None and d_out.data_ptr() == logits.data_ptr()
    if d_out is not None and in_place and num_rows > 1 and _pitch(logits) != _pitch(d_out):
        raise ValueError(f"d_out: in place, got {_pitch(d_out)} bytes a row, want logits' {_pitch(logits)}")
    if logits.data_ptr() % GROUP_BYTES or _pitch(logits) % GROUP_BYTES:
        logits, in_place = _aligned_copy(logits), False
    width = GROUP_BYTES // logits.element_size()
    is_ragged = vocab_size % width != 0
    # What is asked for beside logp, lse and D takes registers, which fewer tiles in flight give back.
    num_extras = (
        is_ragged
        + (transform.bias is not None or transform.softcap is not None)
        + any(output is not None for output in outputs[2:])
        + (grad_coeffs is not None)
    )
    unroll, max_registers = max(1, 4 >> num_extras), 128
    if d_out is None and num_extras == 0:
        unroll, max_registers = 2, 64
    tile = _tile_size(vocab_size, logits.element_size())
    pre_scale, slope = value_scales(transform)
    num_tiles = triton.cdiv(vocab_size, tile)
    args = (
        logits, labels, transform.bias, target_logits, grad_coeffs, d_out, *outputs,
        num_rows, vocab_size, logits.stride(0), 0 if d_out is None else d_out.stride(0), pre_scale, slope,
    )  # fmt: skip
    options = {
        "SOFTCAP": transform.softcap is not None,
        "IN_PLACE": in_place,
        "RAGGED": is_ragged,
        "NUM_TILES": num_tiles,
        "UNROLL": unroll,
        "TILE": tile,
        "WIDTH": width,
        "num_warps": tile // 256,  # 8 logits of a tile in each thread
        "maxnreg": max_registers,
        "enable_fp_fusion": False,
    }
    num_blocks = num_rows
    if d_out is not None and num_tiles > 1:
        # Each block takes one row after the other, so that what is read twice stays in L2 in between.
        num_blocks = min(num_rows, MAX_TILE // tile * _num_multiprocessors(logits.device))
    return Launch((num_blocks,), args, options)


def value_scales(transform: LogitTransform) -> tuple[float | None, float]:
    """What x + b is multiplied by to give v (or the argument of tanh), None for 1; and the slope."""
    if transform.softcap is None:
        return (None if transform.scale > 0 else -1.0), abs(transform.grad_scale)
    return transform.scale / transform.softcap, transform.softcap / transform.temperature


def _tile_size(vocab_size: int, itemsize: int) -> int:
    """Logits a tile, by V and dtype alone: the order of sums hangs on it."""
    if vocab_size <= MAX_TILE:
        return max(256, triton.next_power_of_2(vocab_size))
    return MAX_TILE if vocab_size * itemsize > SMALL_ROW_BYTES else MAX_TILE // 2


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pitch(rows: Tensor) -> int:
    """Bytes from one row to the next."""
    return rows.stride(0) * rows.element_size()


def _aligned_copy(rows: Tensor) -> Tensor:
    pad = -rows.shape[1] % (GROUP_BYTES // rows.element_size())
    copy = rows.new_empty(rows.shape[0], rows.shape[1] + pad)[:, : rows.shape[1]]
    return copy.copy_(rows)
