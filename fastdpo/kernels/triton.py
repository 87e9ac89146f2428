"""The row kernel in Triton; ``contract.py`` has the maths and the rules.

A row is cut into tiles of groups of 8 logits, one a thread: 16 bytes of a 16-bit D. Pass one walks from the
last tile down to tile 0 and keeps for every group a running maximum and sums relative to it: one exp per
logit, one per group, no barrier. Pass two writes D from tile 0, which is still in registers, up, with two or
three tiles on their way from memory (with one a GPU waits half of the time): a row of one tile is read once,
a longer row again, first what was read last and is still in L2. Walking up is also what lets a 16-bit D
overwrite the front of its own fp32 row.

The label's logit is left out of the sum and added to it at the end: so 1 - p, the label's entry of D, is the
sum of the others, right to fp32 where p rounds to 1.

z = slope v with slope > 0 and v = +-(x + b), or v = tanh(s (x + b) / cap) with a softcap. Differences of v
are taken before anything is scaled, so that logits of +-1e4 lose nothing. Sums have one order for each V,
dtype and head: the compiler fuses no multiply-add, and no layout depends on what is asked for beside logp.

Runs on CUDA from sm_80 on, and for tests on the CPU (``TRITON_INTERPRET=1`` at import).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import LogitTransform, RowOutputs
from .slab import value_and_slope
from .triton_device import unavailable_reason
from .triton_parts import (
    LN_2,
    LOG2_E,
    MINUS_INF,
    _jit,
    _load,
    _load_tile,
    _rebase,
    _store_tile,
    _value,
)

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the module stays importable; unavailable_reason() says what is missing
    triton = None

__all__ = ["row_kernel", "unavailable_reason"]

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = 8  # logits: 16 bytes of a 16-bit D
ALIGNMENT = 16  # bytes of one access
SMALL_ROW_BYTES = 128 * 1024  # L2 holds two such rows for each SM of an A100, H100 or H200: two blocks an SM
MAX_TILE = 4096  # logits; larger tiles have spilled registers on some architecture, under some Triton


@_jit()
def _fold(value, columns, mask, label, sums, to_log2):
    """Add a tile (groups, width) to the maximum and the sums of e, e^2, e d and v of each group.

    The label's logit is left out but for the sum of v. What no output needs of them, the compiler drops.
    """
    maximum, sum_e, sum_ee, sum_ed, sum_v = sums
    sum_v += tl.sum(tl.where(mask, value, 0.0), axis=1)
    value = tl.where(mask & (columns != label), value, MINUS_INF)
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
def _grad(value, columns, softmax, coeffs, SOFTCAP: tl.constexpr, IN_PLACE: tl.constexpr):
    """D, or where coefficients are given the gradient of a logp + b lse + c entropy; to be stored next."""
    base, to_log2, log2_sum, entropy, label, others = softmax
    log2_p = (value - base) * to_log2 - log2_sum
    p = tl.exp2(log2_p)
    is_label = columns == label
    if coeffs is None:
        grad = tl.where(is_label, others, -p)
    else:
        a, b, c = coeffs
        of_p = tl.where(is_label, b, b - a) - c * (log2_p * LN_2 + entropy)
        grad = tl.where(is_label, a * others, 0.0) + tl.where(p == 0.0, 0.0, p * of_p)
    if SOFTCAP:
        grad *= (1.0 - value) * (1.0 + value)
    if IN_PLACE:
        # A 16-bit D lies over the neighbours' fp32 logits: no thread writes before all have read.
        tl.debug_barrier()
    return grad


PER_ROW = ("labels", "target_logits", "grad_coeffs", *RowOutputs._fields)


# Not compiled again for another number of rows, nor for a chunk that begins elsewhere.
@_jit(do_not_specialize=["num_rows", "vocab_size"], do_not_specialize_on_alignment=PER_ROW)
def _row_kernel(
    logits, labels, bias, target_logits, grad_coeffs, d_out,  # (C, V), (C,), (V,), (C,), (3, C), (C, V)
    logps, lse, entropy, log_sum_sq_probs, mean_logit, is_top1,  # (C,) each
    num_rows, vocab_size, logits_stride, d_stride,
    pre_scale, slope,
    SOFTCAP: tl.constexpr, IN_PLACE: tl.constexpr, RAGGED: tl.constexpr,
    NUM_TILES: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = NUM_TILES - 1
    KEEP: tl.constexpr = "evict_first" if d_out is None else "evict_last"
    starts = tl.arange(0, TILE // 8)[:, None] * 8
    lanes = starts + tl.arange(0, 8)[None, :]
    # One mask for a whole group keeps accesses 16 bytes wide; up to 7 logits are left after the last.
    whole = vocab_size // 8 * 8
    rest = whole + tl.arange(0, TILE // 8)[:, None]  # one a group
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
        label_bias = _load(bias, label, has_label)
        label_value = _value(_load(x, label, has_label), label, label, target, label_bias, pre_scale, SOFTCAP)
        label_value = tl.where(has_label, label_value, MINUS_INF)

        # Pass one, down to tile 0. A tile is loaded before the one above it is summed.
        raw = _load_tile(x, LAST * TILE + starts, whole, KEEP)
        zero = tl.zeros([TILE // 8], tl.float32)
        sums = (zero + MINUS_INF, zero, zero, zero, zero)
        if RAGGED:
            rest_bias = _load(bias, rest, rest_mask)
            rest_value = _value(_load(x, rest, rest_mask), rest, label, target, rest_bias, pre_scale, SOFTCAP)
            sums = _fold(rest_value, rest, rest_mask, label, sums, to_log2)
        for step in tl.range(0, LAST, loop_unroll_factor=UNROLL):
            tile = (LAST - step) * TILE
            ahead = _load_tile(x, tile - TILE + starts, None, KEEP)
            tile_bias = _load_tile(bias, tile + starts, whole, "evict_last")
            value = _value(raw, tile + lanes, label, target, tile_bias, pre_scale, SOFTCAP)
            mask = tl.broadcast_to(tile + starts < whole, lanes.shape)
            sums = _fold(value, tile + lanes, mask, label, sums, to_log2)
            raw = ahead
        first_bias = _load_tile(bias, starts, whole, "evict_last")
        value = _value(raw, lanes, label, target, first_bias, pre_scale, SOFTCAP)
        mask = tl.broadcast_to(starts < whole, lanes.shape)
        sums = _fold(value, lanes, mask, label, sums, to_log2)

        if d_out is not None:  # for pass two, while threads exchange their sums
            next1 = _load_tile(x, TILE + starts, whole, "evict_first")
            if AHEAD == 3:
                next2 = _load_tile(x, 2 * TILE + starts, whole, "evict_first")
        # With the label's: what threads exchange hangs on that load, so D cannot come to lie over it before.
        top = tl.max(tl.maximum(sums[0], label_value))
        sum_e, sum_ee, sum_ed = _rebase(sums[0], top, sums[1], sums[2], sums[3], to_log2)
        base = tl.where(top == MINUS_INF, 0.0, top)
        label_d = (label_value - base) * to_log2
        label_e = tl.exp2(label_d)
        others = tl.sum(sum_e)
        total = others + label_e
        log_sum = tl.log(total)
        label_ed = tl.where(label_e == 0.0, 0.0, label_e * label_d)
        row_entropy = log_sum - (tl.sum(sum_ed) + label_ed) / total * LN_2
        tl.store(logps + row, tl.where(has_label, (label_value - base) * slope - log_sum, float("nan")))
        tl.store(lse + row, base * slope + log_sum)
        if entropy is not None:
            tl.store(entropy + row, row_entropy)
        if log_sum_sq_probs is not None:
            tl.store(log_sum_sq_probs + row, tl.log(tl.sum(sum_ee) + label_e * label_e) - 2.0 * log_sum)
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
            softmax = (base, to_log2, log_sum * LOG2_E, row_entropy, label, others / total)
            # As many steps written out as tiles are ahead: to give a tile another name is to wait for it.
            for step in tl.range(0, LAST, loop_unroll_factor=AHEAD):
                tile = step * TILE
                ahead = _load_tile(x, tile + AHEAD * TILE + starts, whole, "evict_first")
                bias_again = _load_tile(bias, tile + starts, None, "evict_last")
                value = _value(raw, tile + lanes, label, target, bias_again, pre_scale, SOFTCAP)
                grad = _grad(value, tile + lanes, softmax, coeffs, SOFTCAP, IN_PLACE)
                _store_tile(d_row, tile + starts, None, grad)
                if AHEAD == 3:
                    raw, next1, next2 = next1, next2, ahead
                else:
                    raw, next1 = next1, ahead
            last_bias = _load_tile(bias, LAST * TILE + starts, whole, "evict_last")
            value = _value(raw, LAST * TILE + lanes, label, target, last_bias, pre_scale, SOFTCAP)
            grad = _grad(value, LAST * TILE + lanes, softmax, coeffs, SOFTCAP, IN_PLACE)
            _store_tile(d_row, LAST * TILE + starts, whole, grad)
            if RAGGED:
                rest_bias = _load(bias, rest, rest_mask)
                value = _value(_load(x, rest, rest_mask), rest, label, target, rest_bias, pre_scale, SOFTCAP)
                grad = _grad(value, rest, softmax, coeffs, SOFTCAP, IN_PLACE)
                tl.store(d_row + rest, grad.to(d_row.dtype.element_ty), mask=rest_mask)
        row += tl.num_programs(0)


class Launch(NamedTuple):
    """One launch of the row kernel."""

    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]


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
    if logits.data_ptr() % ALIGNMENT or _pitch(logits) % ALIGNMENT:
        logits, in_place = _aligned_copy(logits), False
    is_ragged = vocab_size % GROUP != 0
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
    pre_scale, slope = value_and_slope(transform)
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
        "AHEAD": 2 if grad_coeffs is not None else 3,  # which have no room in registers for a third
        "TILE": tile,
        "num_warps": tile // 256,  # 8 logits of a tile in each thread
        "maxnreg": max_registers,
        "enable_fp_fusion": False,
    }
    num_blocks = num_rows
    if d_out is not None and num_tiles > 1:
        # Each block takes one row after the other, so that what is read twice stays in L2 in between.
        num_blocks = min(num_rows, MAX_TILE // tile * _num_multiprocessors(logits.device))
    return Launch((num_blocks,), args, options)


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
    pad = -rows.shape[1] % (ALIGNMENT // rows.element_size())
    copy = rows.new_empty(rows.shape[0], rows.shape[1] + pad)[:, : rows.shape[1]]
    return copy.copy_(rows)
