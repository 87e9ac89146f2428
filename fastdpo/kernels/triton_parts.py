"""What the Triton kernels are made of: arithmetic to fp32 rounding, and tiles of rows in one layout."""

from __future__ import annotations

import math
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # `triton_device.unavailable_reason` says so
    triton = None


def _jit(**options: Any) -> Any:
    return (lambda function: function) if triton is None else triton.jit(**options)


def _constexpr(value: float) -> Any:
    return value if triton is None else tl.constexpr(value)


LOG2_E = _constexpr(math.log2(math.e))
LN_2 = _constexpr(math.log(2.0))
MINUS_INF = _constexpr(-math.inf)
SMALL = _constexpr(0.5)


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
def _value(x, columns, label, target, bias, pre_scale, SOFTCAP: tl.constexpr):
    """v of the raw products x at `columns`; `bias` is theirs."""
    x = x.to(tl.float32)
    if target is not None:
        x = tl.where(columns == label, target, x)
    if bias is not None:
        x += bias
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
def _expm1(x):
    """e^x - 1 for x <= 0, to fp32 rounding: where 1 cancels, the series."""
    series = tl.fma(x, 1.0 / 40320.0, 1.0 / 5040.0)
    series = tl.fma(x, series, 1.0 / 720.0)
    series = tl.fma(x, series, 1.0 / 120.0)
    series = tl.fma(x, series, 1.0 / 24.0)
    series = tl.fma(x, series, 1.0 / 6.0)
    series = tl.fma(x, series, 0.5)
    series = tl.fma(x * x, series, x)
    return tl.where(x > -SMALL, series, tl.exp2(x * LOG2_E) - 1.0)


@_jit()
def _log1p(x):
    """log(1 + x) for -1 <= x <= 0, to fp32 rounding: where 1 swallows x, 2 atanh(x / (2 + x))."""
    t = x / (2.0 + x)
    square = t * t
    series = tl.fma(square, 1.0 / 11.0, 1.0 / 9.0)
    series = tl.fma(square, series, 1.0 / 7.0)
    series = tl.fma(square, series, 1.0 / 5.0)
    series = tl.fma(square, series, 1.0 / 3.0)
    series = 2.0 * tl.fma(t * square, series, t)
    return tl.where(x > -SMALL, series, tl.log(1.0 + x))


@_jit()
def _load(row, columns, mask):
    """0 where `mask` is False."""
    if row is None:
        values = None
    else:
        values = tl.load(row + columns, mask=mask, other=0.0)
    return values


# A thread has whole groups of a tile (groups, 8), whatever is loaded or stored beside: layouts decide the
# order of sums. So 32-bit elements go in halves of a group, 16 bytes each.
@_jit()
def _group_mask(starts, whole, WIDTH: tl.constexpr):
    if whole is None:
        mask = None
    else:
        mask = tl.broadcast_to(starts < whole, [starts.shape[0], WIDTH])
    return mask


@_jit()
def _load_tile(row, starts, whole, POLICY: tl.constexpr):
    """The groups that begin at columns `starts` (groups, 1) and before `whole`, None for all of them."""
    if row is None:
        tile = None
    elif row.dtype.element_ty.primitive_bitwidth == 32:
        at = row + (starts + tl.arange(0, 4)[None, :])
        mask = _group_mask(starts, whole, 4)
        low = tl.load(at, mask=mask, eviction_policy=POLICY)
        high = tl.load(at + 4, mask=mask, eviction_policy=POLICY)
        tile = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [starts.shape[0], 8])
    else:
        at = row + (starts + tl.arange(0, 8)[None, :])
        tile = tl.load(at, mask=_group_mask(starts, whole, 8), eviction_policy=POLICY)
    return tile


@_jit()
def _store_tile(row, starts, whole, tile):
    """As `_load_tile`."""
    tile = tile.to(row.dtype.element_ty)
    if row.dtype.element_ty.primitive_bitwidth == 32:
        at = row + (starts + tl.arange(0, 4)[None, :])
        mask = _group_mask(starts, whole, 4)
        low, high = tl.split(tl.permute(tl.reshape(tile, [starts.shape[0], 2, 4]), (0, 2, 1)))
        tl.store(at, low, mask=mask, eviction_policy="evict_first")
        tl.store(at + 4, high, mask=mask, eviction_policy="evict_first")
    else:
        at = row + (starts + tl.arange(0, 8)[None, :])
        tl.store(at, tile, mask=_group_mask(starts, whole, 8), eviction_policy="evict_first")
