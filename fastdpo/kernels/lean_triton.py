"""Store-free logits in Triton: product, cap and the softmax's sums in one kernel, nothing of size N x V.

A program has a block of labelled rows and one split of the vocabulary. For each tile of the split it makes
the products on the tensor cores and folds them, still in registers, into a running maximum and sums for
every row: a `SlabSums` for each row and split is all that reaches memory. ``slab.combined`` adds the splits
up in order.

Splits have a fixed width, so that the order of a row's sums hangs on V, the dtype, the transform and the
GPU, and on nothing beside the row; there are no atomics. Rows are gathered and operands converted inside
the kernel: it makes no copy of hidden or of the weight. Programs go through 16 blocks of rows for one split
before the next split: those rows stay in L2, and each tile of the weight is read from there by all 16.

Runs on CUDA from sm_80 on, and for tests on the CPU (``TRITON_INTERPRET=1`` at import; the interpreter's
``tl.dot`` is wrong for bf16).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.plan.lean import SPLIT

from .contract import LogitTransform, RowOutputs
from .slab import SlabSums, combined, value_and_slope, write_outputs
from .triton_device import unavailable_reason
from .triton_parts import LN_2, LOG2_E, MINUS_INF, _jit, _rebase, _tanh

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # `unavailable_reason` says so
    triton = None

OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_BLOCKS = 16  # blocks of rows that share a split's tiles of the weight in L2
# Products summed at a time for fp32: one long chain of roundings would pass 1e-5 nats at H = 4096.
FP32_SPAN = 256


class Tile(NamedTuple):
    """Rows, vocabulary entries and hidden units of one step, and how it is run."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


FP32_TILE = Tile(64, 32, 16, 4, 2)
NARROW_TILE = Tile(128, 128, 64, 8, 3)  # 96 KiB of shared memory, which every GPU from sm_80 on has
WIDE_TILE = Tile(128, 256, 64, 8, 3)  # nearly all registers of a Hopper SM
SLIM_TILE = Tile(128, 64, 64, 8, 3)  # masks over H as well take the registers of half a tile
UNALIGNED_TILE = Tile(64, 64, 32, 8, 2)  # loads of one element each take addresses and masks of their own
MAX_WEIGHT_STRIDE = 2**31 // WIDE_TILE.columns - 1  # offsets within a tile have 32 bits
ALIGNMENT = 16  # elements of which H must be a multiple for 16-byte loads


def tile_for(
    compute_dtype: torch.dtype,
    is_rounded: bool,
    capability: tuple[int, int],
    vocab_size: int,
    hidden_size: int,
    is_plain: bool,
) -> Tile:
    """The tile by dtypes, GPU, V, H and transform; no tuning, because the order of sums hangs on it.

    ``is_rounded``: both operands come in fp32 and are rounded to 16 bits, at twice the shared memory.
    ``is_plain``: logits have neither a bias nor a cap.
    """
    if compute_dtype == torch.float32:
        return FP32_TILE
    if hidden_size % ALIGNMENT != 0:
        return UNALIGNED_TILE
    if is_rounded:
        return NARROW_TILE._replace(num_stages=2)
    # What an uneven V or H takes in masks, a bias or a cap, has no room in registers beside a wide tile.
    if hidden_size % NARROW_TILE.depth != 0 and not is_plain:
        return SLIM_TILE
    is_even = vocab_size % WIDE_TILE.columns == 0 and hidden_size % WIDE_TILE.depth == 0
    return WIDE_TILE if is_even and is_plain and capability[0] == 9 else NARROW_TILE


@_jit()
def _fold_tile(value, mask, is_label, sums, to_log2):
    """Add a tile (rows, columns) of v to each row's maximum and sums of e = 2^d, e^2, e d and v.

    The label's v is left out but of the last. What no output needs of them, the compiler drops.
    """
    maximum, sum_e, sum_ee, sum_ed, sum_v = sums
    if mask is None:
        sum_v += tl.sum(value, axis=1)
    else:
        sum_v += tl.sum(tl.where(mask, value, 0.0), axis=1)
        value = tl.where(mask, value, MINUS_INF)
    value = tl.where(is_label, MINUS_INF, value)
    new_max = tl.maximum(maximum, tl.max(value, axis=1))
    sum_e, sum_ee, sum_ed = _rebase(maximum, new_max, sum_e, sum_ee, sum_ed, to_log2)
    base = tl.where(new_max == MINUS_INF, 0.0, new_max)
    d = (value - base[:, None]) * to_log2
    e = tl.exp2(d)
    sum_e += tl.sum(e, axis=1)
    sum_ee += tl.sum(e * e, axis=1)
    sum_ed += tl.sum(tl.where(e == 0.0, 0.0, e * d), axis=1)
    return new_max, sum_e, sum_ee, sum_ed, sum_v


@_jit()
def _add_products(
    acc, a, b, start, stop, hidden_size,
    DOT_DTYPE: tl.constexpr, RAGGED: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """acc += the product of rows a (rows, depth) and columns b (depth, columns) over [start, stop) of H."""
    units = tl.arange(0, DEPTH)
    for k in range(start, stop, DEPTH):
        if RAGGED:
            mask = k + units < hidden_size
            left = tl.load(a + k, mask=mask[None, :], other=0.0)
            right = tl.load(b + k, mask=mask[:, None], other=0.0)
        else:
            left = tl.load(a + k)
            right = tl.load(b + k)
        acc = tl.dot(left.to(DOT_DTYPE), right.to(DOT_DTYPE), acc, input_precision="ieee")
    return acc


@_jit(do_not_specialize=["num_rows", "vocab_size"], do_not_specialize_on_alignment=["index", "labels"])
def _lean_kernel(
    hidden, weight, index, labels, bias,  # (M, H), (V, H), (N,), (N,), (V,)
    out_max, out_exp, out_label, out_exp_sq, out_exp_log, out_value,  # (N, splits) each
    num_rows, vocab_size, hidden_size, hidden_stride, weight_stride, num_splits,
    pre_scale, slope,
    DOT_DTYPE: tl.constexpr, SOFTCAP: tl.constexpr, RAGGED: tl.constexpr, EVEN_V: tl.constexpr,
    SPAN: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_blocks = tl.cdiv(num_rows, ROWS)
    group = program // (GROUP * num_splits)
    group_size = min(num_blocks - group * GROUP, GROUP)
    within = program - group * (GROUP * num_splits)
    block = group * GROUP + within % group_size
    split = within // group_size

    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    has_row = row < num_rows
    row = tl.where(has_row, row, num_rows - 1)  # reads a row twice instead of none
    source = row
    if index is not None:
        source = tl.load(index + row)
    label = tl.load(labels + row)
    label = tl.where((label >= 0) & (label < vocab_size), label, -1).to(tl.int32)
    units = tl.arange(0, DEPTH)
    a = hidden + source[:, None] * hidden_stride + units[None, :]

    zero = tl.zeros([ROWS], tl.float32)
    sums = (zero + MINUS_INF, zero, zero, zero, zero)
    label_value = zero
    to_log2 = slope * LOG2_E
    first = split * SPLIT
    for start in range(first, min(first + SPLIT, vocab_size), COLUMNS):
        # Within a tile offsets have 32 bits, which leaves registers for the products.
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < vocab_size
        safe = tl.where(mask, columns, vocab_size - 1)
        b = weight + tl.cast(start, tl.int64) * weight_stride
        b += (safe - start)[None, :] * weight_stride + units[:, None]
        value = tl.zeros([ROWS, COLUMNS], tl.float32)
        if SPAN == 0:
            value = _add_products(value, a, b, 0, hidden_size, hidden_size, DOT_DTYPE, RAGGED, DEPTH)
        else:
            for low in range(0, hidden_size, SPAN):
                high = min(low + SPAN, hidden_size)
                part = tl.zeros([ROWS, COLUMNS], tl.float32)
                value += _add_products(part, a, b, low, high, hidden_size, DOT_DTYPE, RAGGED, DEPTH)
        if bias is not None:
            value += tl.load(bias + safe)[None, :]
        if pre_scale is not None:
            value *= pre_scale
        if SOFTCAP:
            value = _tanh(value)
        is_label = columns[None, :] == label[:, None]
        label_value += tl.sum(tl.where(is_label, value, 0.0), axis=1)
        if EVEN_V:
            sums = _fold_tile(value, None, is_label, sums, to_log2)
        else:
            sums = _fold_tile(value, mask[None, :], is_label, sums, to_log2)

    at = row * num_splits + split
    tl.store(out_max + at, sums[0], mask=has_row)
    tl.store(out_exp + at, sums[1], mask=has_row)
    tl.store(out_label + at, label_value, mask=has_row)
    if out_exp_sq is not None:
        tl.store(out_exp_sq + at, sums[2], mask=has_row)
    if out_exp_log is not None:
        tl.store(out_exp_log + at, sums[3] * LN_2, mask=has_row)
    if out_value is not None:
        tl.store(out_value + at, sums[4], mask=has_row)


class Launch(NamedTuple):
    """One launch of the kernel, and the sums it writes."""

    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]
    sums: SlabSums


def lean_logprobs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    outputs: RowOutputs,
    compute_dtype: torch.dtype,
) -> None:
    """Log-probabilities and statistics of N tokens, straight from hidden states and the weight.

    Args:
        hidden: ``(M, H)`` fp32, bf16 or fp16, as all operands; copied only where H is not innermost.
        weight: ``(V, H)``, the same.
        index: ``(N,)`` int64 rows of hidden; None for all of them.
        labels: ``(N,)`` int64 token ids; one outside 0..V-1 makes its log-probability NaN.
        transform: from products to logits; its bias fp32.
        outputs: ``(N,)`` each, fp32; those that are not None are written.
        compute_dtype: what operands are rounded to before they are multiplied; sums are fp32.

    Raises:
        RuntimeError: Triton does not run here.
        TypeError: operands of another dtype.
    """
    if (reason := unavailable_reason(hidden.device)) is not None:
        raise RuntimeError(reason)
    for name, dtype in (("hidden", hidden.dtype), ("weight", weight.dtype), ("compute_dtype", compute_dtype)):
        if dtype not in OPERAND_DTYPES:
            raise TypeError(f"{name}: got {dtype}, want one of {OPERAND_DTYPES}")
    if len(labels) == 0:
        return
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (8, 0)
    statistics = tuple(name for name, out in outputs._asdict().items() if out is not None)
    with torch.cuda.device_of(hidden):
        launch = plan_launch(hidden, weight, index, labels, transform, statistics, compute_dtype, capability)
        _lean_kernel[launch.grid](*launch.args, **launch.options)
    _, slope = value_and_slope(transform)
    write_outputs(combined(launch.sums, slope), labels, weight.shape[0], slope, outputs)


def plan_launch(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    statistics: tuple[str, ...],
    compute_dtype: torch.dtype,
    capability: tuple[int, int],
) -> Launch:
    """What ``lean_logprobs`` launches, so that a test can compile just that."""
    num_rows, (vocab_size, hidden_size) = len(labels), weight.shape
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    if weight.stride(1) != 1 or weight.stride(0) > MAX_WEIGHT_STRIDE:
        weight = weight.contiguous()
    is_rounded = compute_dtype != torch.float32 and hidden.dtype == weight.dtype == torch.float32
    is_plain = transform.bias is None and transform.softcap is None
    tile = tile_for(compute_dtype, is_rounded, capability, vocab_size, hidden_size, is_plain)
    assert SPLIT % tile.columns == 0, "a tile belongs to one split"
    num_splits = triton.cdiv(vocab_size, SPLIT)

    def buffer(is_wanted: bool = True) -> Tensor | None:
        return hidden.new_empty((num_rows, num_splits), dtype=torch.float32) if is_wanted else None

    sums = SlabSums(
        buffer(),  # type: ignore[arg-type]
        buffer(),  # type: ignore[arg-type]
        buffer(),  # type: ignore[arg-type]
        buffer("log_sum_sq_probs" in statistics),
        buffer("entropy" in statistics),
        buffer("mean_logit" in statistics),
    )
    pre_scale, slope = value_and_slope(transform)
    args = (
        hidden, weight, index, labels, transform.bias, *sums,
        num_rows, vocab_size, hidden_size, hidden.stride(0), weight.stride(0), num_splits, pre_scale, slope,
    )  # fmt: skip
    options = {
        "DOT_DTYPE": {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
            compute_dtype
        ],
        "SOFTCAP": transform.softcap is not None,
        "RAGGED": hidden_size % tile.depth != 0,
        "SPAN": FP32_SPAN if compute_dtype == torch.float32 and hidden_size > FP32_SPAN else 0,
        "EVEN_V": vocab_size % tile.columns == 0,
        "SPLIT": SPLIT,
        "GROUP": GROUP_BLOCKS,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }
    return Launch((triton.cdiv(num_rows, tile.rows) * num_splits,), args, options, sums)
