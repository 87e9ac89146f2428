"""The divergence kernel in Triton; ``divergence.py`` has the maths, ``contract.py`` the rules.

A block has one row of each head and walks over it some times, each time in tiles from the first to the last:

1. each head by itself: the maximum and the sum of exponentials, which make log p and log q of any logit;
2. with two teachers: their distance, which their combination hangs on, and then the combination's maximum
   and sum;
3. the divergences, sums of p, q and log q - log p;
4. where a gradient is wanted: D, which hangs on the divergences.

Where D needs no divergence (that of ``forward_kl``), the last two are one. Every lane of a tile keeps a
maximum and sums of its own, added up at the end: one exp a logit, no barrier, and one order of sums for each
V. What plain torch reads and writes some thirty times is read two or three times (the logits of two teachers
up to five times) and written once, and nothing is made beside it.

z = slope v, differences of v are taken before anything is scaled: see ``triton.py``, whose parts these are.
Runs on CUDA from sm_80 on, and for tests on the CPU (``TRITON_INTERPRET=1`` at import).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import LogitTransform
from .divergence import DivergenceOutputs
from .slab import value_and_slope
from .triton_device import unavailable_reason
from .triton_parts import LOG2_E, MINUS_INF, _expm1, _jit, _load, _log1p, _value

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the module stays importable; unavailable_reason() says what is missing
    triton = None

MAX_TILE = 2048  # logits of each head: 8 in each of 256 threads


@_jit()
def _values(head, columns, mask, SOFTCAP: tl.constexpr):
    """v of a head's raw products at `columns`; -inf where `mask` is False."""
    row, bias, pre_scale, slope = head
    x = tl.load(row + columns, mask=mask)
    v = _value(x, columns, 0, None, _load(bias, columns, mask), pre_scale, SOFTCAP)
    return tl.where(mask, v, MINUS_INF)


@_jit()
def _fold(v, is_label, sums, to_log2):
    """Add values to each lane's maximum and its sums of exponentials relative to that.

    The second sum, of all but the label's, only where `is_label` is not None.
    """
    maximum, total, others = sums
    e = tl.exp2(-tl.abs(v - maximum) * to_log2)
    e = tl.where(v == MINUS_INF, 0.0, e)  # whose difference from -inf would be NaN
    is_higher = v > maximum
    total = tl.where(is_higher, total * e + 1.0, total + e)
    if is_label is not None:
        others = tl.where(is_higher, others * e, others)
        others += tl.where(is_label, 0.0, tl.where(is_higher, 1.0, e))
    return tl.maximum(maximum, v), total, others


@_jit()
def _gather(sums, to_log2):
    """The row's maximum, the log of its sum, and the share in it of all but the label."""
    maximum, total, others = sums
    top = tl.max(maximum)
    factor = tl.where(maximum == MINUS_INF, 1.0, tl.exp2((maximum - top) * to_log2))  # 1: of 0, or of NaN
    whole = tl.sum(total * factor)
    return top, tl.log(whole), tl.sum(others * factor) / whole


@_jit()
def _softmax(head, vocab_size, label, NUM_TILES: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr):
    """What makes log-probabilities of a head's values: the row's largest, and the log of the sum.

    With a `label` also its 1 - p, as the sum of the others: so it is right where p rounds to 1.
    """
    lanes = tl.arange(0, TILE)
    zeros = tl.zeros([TILE], tl.float32)
    sums = (zeros + MINUS_INF, zeros, zeros)
    to_log2 = head[3] * LOG2_E
    for tile in range(0, NUM_TILES):
        columns = tile * TILE + lanes
        v = _values(head, columns, columns < vocab_size, SOFTCAP)
        if label is None:
            sums = _fold(v, None, sums, to_log2)
        else:
            sums = _fold(v, columns == label, sums, to_log2)
    return _gather(sums, to_log2)


@_jit()
def _log_probs(head, softmax, columns, mask, SOFTCAP: tl.constexpr):
    """Log-probabilities of a head, and its values."""
    v = _values(head, columns, mask, SOFTCAP)
    return (v - softmax[0]) * head[3] - softmax[1], v


@_jit()
def _teacher_logits(first, second, mix, columns, mask, CAP: tl.constexpr, SECOND_CAP: tl.constexpr):
    """Of two teachers, up to a constant of the row; a token that either masks is masked."""
    v, w = _values(first[0], columns, mask, CAP), _values(second[0], columns, mask, SECOND_CAP)
    c = mix[0] * ((v - first[1][0]) * first[0][3]) + mix[1] * ((w - second[1][0]) * second[0][3])
    return tl.where((v == MINUS_INF) | (w == MINUS_INF), MINUS_INF, c)


@_jit()
def _teacher_log_probs(first, second, mix, columns, mask, CAP: tl.constexpr, SECOND_CAP: tl.constexpr):
    """log q: of the one teacher, or of the combination."""
    if second is None:
        log_q, _ = _log_probs(first[0], first[1], columns, mask, CAP)
    else:
        c = _teacher_logits(first, second, mix, columns, mask, CAP, SECOND_CAP)
        log_q = c - mix[2][0] - mix[2][1]
    return log_q


@_jit()
def _difference(log_q, log_p):
    """log q - log p; of two masked tokens 0, where -inf - -inf would be NaN."""
    return tl.where(log_q == log_p, 0.0, log_q - log_p)


@_jit()
def _weighted(weight, value):
    """weight * value; 0 where the weight is, whatever the value."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@_jit()
def _log_mean(delta, b):
    """s of `divergence.py`: log m - log p is max(delta, 0) + s."""
    return _log1p(tl.where(delta > 0.0, 1.0 - b, b) * _expm1(-tl.abs(delta)))


@_jit()
def _store_d(d_row, d, v, columns, mask, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        d *= (1.0 - v) * (1.0 + v)
    tl.store(d_row + columns, d.to(d_row.dtype.element_ty), mask=mask)


PER_ROW = ("labels", "coefficients", "grad_coeffs", *DivergenceOutputs._fields)


@_jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=PER_ROW)
def _divergence_kernel(
    logits, first_logits, second_logits,  # (C, V) each; the last None with one teacher
    labels, bias, first_bias, second_bias,  # (C,), (V,) three times
    coefficients, grad_coeffs,  # (2, C), (4, C)
    forward_kl, reverse_kl, jsd, logps, l1_distance, ref_logps,  # (C,) each
    d_out, logps_d_out,  # (C, V) each
    num_rows, vocab_size, stride, first_stride, second_stride, d_stride, logps_d_stride,
    pre_scale, first_pre_scale, second_pre_scale, slope, first_slope, second_slope,
    first_by_distance, second_by_distance, jsd_beta,
    CAP: tl.constexpr, FIRST_CAP: tl.constexpr, SECOND_CAP: tl.constexpr, NEEDS_DISTANCE: tl.constexpr,
    IN_PLACE: tl.constexpr, NUM_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILE)
    label = None
    if logps is not None or ref_logps is not None:
        label = tl.load(labels + row)
        label = tl.where((label >= 0) & (label < vocab_size), label, -1).to(tl.int32)
    NEEDS_REST: tl.constexpr = logps is not None and (grad_coeffs is not None or logps_d_out is not None)
    policy = (logits + row * stride, bias, pre_scale, slope)
    of_policy = _softmax(policy, vocab_size, label if NEEDS_REST else None, NUM_TILES, TILE, CAP)
    head = (first_logits + row * first_stride, first_bias, first_pre_scale, first_slope)
    first = (head, _softmax(head, vocab_size, None, NUM_TILES, TILE, FIRST_CAP))
    second, mix = None, None
    if second_logits is not None:
        head = (second_logits + row * second_stride, second_bias, second_pre_scale, second_slope)
        second = (head, _softmax(head, vocab_size, None, NUM_TILES, TILE, SECOND_CAP))
        a, b = tl.load(coefficients + row), tl.load(coefficients + num_rows + row)
        if NEEDS_DISTANCE:
            distances = tl.zeros([TILE], tl.float32)
            for tile in range(0, NUM_TILES):
                columns = tile * TILE + lanes
                mask = columns < vocab_size
                log_q, _ = _log_probs(first[0], first[1], columns, mask, FIRST_CAP)
                log_r, _ = _log_probs(second[0], second[1], columns, mask, SECOND_CAP)
                distances += tl.abs(tl.exp2(log_q * LOG2_E) - tl.exp2(log_r * LOG2_E))
            distance = tl.sum(distances)
            if l1_distance is not None:
                tl.store(l1_distance + row, distance)
            a += first_by_distance * distance
            b += second_by_distance * distance
        zeros = tl.zeros([TILE], tl.float32)
        sums = (zeros + MINUS_INF, zeros, zeros)
        for tile in range(0, NUM_TILES):
            columns = tile * TILE + lanes
            mask = columns < vocab_size
            c = _teacher_logits(first, second, (a, b), columns, mask, FIRST_CAP, SECOND_CAP)
            sums = _fold(c, None, sums, LOG2_E)
        mix = (a, b, _gather(sums, LOG2_E))

    if label is not None:
        has_label = label >= 0
        if logps is not None:
            of_label, label_v = _log_probs(policy, of_policy, label, has_label, CAP)
            tl.store(logps + row, tl.where(has_label, of_label, float("nan")))
        if ref_logps is not None:
            of_label = _teacher_log_probs(first, second, mix, label, has_label, FIRST_CAP, SECOND_CAP)
            tl.store(ref_logps + row, tl.where(has_label, of_label, float("nan")))

    zero = tl.zeros([TILE], tl.float32)
    forward_sums, reverse_sums, teacher_sums, policy_sums = zero, zero, zero, zero
    IN_ONE: tl.constexpr = d_out is not None and reverse_kl is None and jsd is None
    for tile in range(0, 0 if IN_ONE else NUM_TILES):
        columns = tile * TILE + lanes
        mask = columns < vocab_size
        log_p, _ = _log_probs(policy, of_policy, columns, mask, CAP)
        log_q = _teacher_log_probs(first, second, mix, columns, mask, FIRST_CAP, SECOND_CAP)
        delta = _difference(log_q, log_p)
        p, q = tl.exp2(log_p * LOG2_E), tl.exp2(log_q * LOG2_E)
        if forward_kl is not None:
            forward_sums += _weighted(q, delta)
        if reverse_kl is not None:
            reverse_sums -= _weighted(p, delta)
        if jsd is not None:
            s = _log_mean(delta, jsd_beta)
            teacher_sums += _weighted(q, tl.minimum(delta, 0.0) - s)
            policy_sums -= _weighted(p, tl.maximum(delta, 0.0) + s)
    reverse = tl.sum(reverse_sums)
    to_mean = tl.sum(policy_sums)
    if reverse_kl is not None:
        tl.store(reverse_kl + row, reverse)
    if jsd is not None:
        tl.store(jsd + row, jsd_beta * tl.sum(teacher_sums) + (1.0 - jsd_beta) * to_mean)

    if d_out is not None:
        w_forward, w_reverse, w_jsd, w_logps = 1.0, 1.0, 1.0, 0.0
        if grad_coeffs is not None:
            at = grad_coeffs + row
            w_forward, w_reverse = tl.load(at), tl.load(at + num_rows)
            w_jsd, w_logps = tl.load(at + 2 * num_rows), tl.load(at + 3 * num_rows)
        d_row = d_out + row * d_stride
        # Upwards, so that a 16-bit D comes to lie over fp32 logits that have been read.
        for tile in range(0, NUM_TILES):
            columns = tile * TILE + lanes
            mask = columns < vocab_size
            log_p, v = _log_probs(policy, of_policy, columns, mask, CAP)
            log_q = _teacher_log_probs(first, second, mix, columns, mask, FIRST_CAP, SECOND_CAP)
            delta = _difference(log_q, log_p)
            p, q = tl.exp2(log_p * LOG2_E), tl.exp2(log_q * LOG2_E)
            d = zero
            if reverse_kl is not None:
                d -= _weighted(p, delta + reverse) * w_reverse
            if jsd is not None:
                log_ratio = -(tl.maximum(delta, 0.0) + _log_mean(delta, jsd_beta))  # log p - log m
                d += _weighted(p, log_ratio - to_mean) * ((1.0 - jsd_beta) * w_jsd)
            if forward_kl is not None:
                d += (p - q) * w_forward
                if IN_ONE:
                    forward_sums += _weighted(q, delta)
            if logps is not None:
                logps_d = tl.where(columns == label, of_policy[2], -p)
                if grad_coeffs is not None:
                    d += logps_d * w_logps
            if IN_PLACE:
                tl.debug_barrier()  # no thread writes before all have read the tile
            _store_d(d_row, d, v, columns, mask, CAP)
            if logps_d_out is not None:
                _store_d(logps_d_out + row * logps_d_stride, logps_d, v, columns, mask, CAP)
    if forward_kl is not None:
        tl.store(forward_kl + row, tl.sum(forward_sums))


class Launch(NamedTuple):
    """One launch of the divergence kernel."""

    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]


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
    """``divergence.DivergenceKernel`` on CUDA tensors, fp32 logits; one launch, no host synchronisation.

    Raises:
        RuntimeError: the backend does not run here.
        TypeError: logits of another dtype.
    """
    if (reason := unavailable_reason(logits.device)) is not None:
        raise RuntimeError(reason)
    for name, tensor in (("logits", logits), *(("teachers", teacher) for teacher in teachers)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: got {tensor.dtype}, want torch.float32")
    if len(logits) == 0:
        return
    with torch.cuda.device_of(logits):
        launch = plan_launch(
            logits, teachers, labels, transforms, outputs, coefficients, slopes, jsd_beta, d_out, logps_d_out,
            grad_coeffs,
        )  # fmt: skip
        _divergence_kernel[launch.grid](*launch.args, **launch.options)


def plan_launch(
    logits: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor,
    transforms: tuple[LogitTransform, ...],
    outputs: DivergenceOutputs,
    coefficients: Tensor | None = None,
    slopes: tuple[float, float] = (0.0, 0.0),
    jsd_beta: float = 0.5,
    d_out: Tensor | None = None,
    logps_d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> Launch:
    """What ``divergence_kernel`` launches, so that a test can compile just that."""
    num_rows, vocab_size = logits.shape
    first, second = (*teachers, None)[:2]
    every = (*transforms, LogitTransform())[:3]
    scales = [value_and_slope(transform) for transform in every]
    tile = max(256, min(triton.next_power_of_2(vocab_size), MAX_TILE))
    places = {matrix.data_ptr() for matrix in (logits, *teachers)}
    given = [matrix for matrix in (d_out, logps_d_out) if matrix is not None]
    args = (
        logits, first, second, labels, *(transform.bias for transform in every), coefficients, grad_coeffs,
        *outputs, d_out, logps_d_out, num_rows, vocab_size,
        *(0 if rows is None else rows.stride(0) for rows in (logits, first, second, d_out, logps_d_out)),
        *(pre_scale for pre_scale, _ in scales), *(slope for _, slope in scales), *slopes, jsd_beta,
    )  # fmt: skip
    # What training asks for of plain heads; more would spill.
    is_light = (
        all(transform.bias is None and transform.softcap is None for transform in every)
        and outputs.jsd is None
        and vocab_size % 16 == 0
    )
    options = {
        "CAP": every[0].softcap is not None,
        "FIRST_CAP": every[1].softcap is not None,
        "SECOND_CAP": every[2].softcap is not None,
        "NEEDS_DISTANCE": outputs.l1_distance is not None or any(slopes),
        "IN_PLACE": any(matrix.data_ptr() in places for matrix in given),
        "NUM_TILES": triton.cdiv(vocab_size, tile),
        "TILE": tile,
        "num_warps": tile // 256,
        "maxnreg": 80 if is_light else 128,  # three blocks on a multiprocessor, or two at the least
        "enable_fp_fusion": False,
    }
    return Launch((num_rows,), args, options)
