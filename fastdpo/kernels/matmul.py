"""The three matrix products of the head, written into memory the caller owns.

    logits   x  = h W^T          (C, V)
    dhidden  D W                 (C, H)
    dweight  sum of D^T (g h)    (V, H)

They are the platform's own GEMMs. What this file adds is precision: sums are fp32 even where the
operands have 16 bits. On a GPU the GEMM does that itself (``out_dtype``); on a CPU, whose ``mm`` has no
such option, operands are upcast to fp32, the weight one vocabulary slab at a time so that no second
(V, H) matrix ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fastdpo.plan.waves import part_size

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Bounds the upcast copy of a piece of the weight; large enough that each slab is a full-sized GEMM.
SLAB_MIB = 64


def operand_dtype(compute_dtype: torch.dtype, logits_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which operands enter a GEMM: fp32 where 16-bit operands could not give fp32 logits."""
    needs_upcast = compute_dtype in LOW_PRECISION and logits_dtype == torch.float32 and not is_gpu(device)
    return torch.float32 if needs_upcast else compute_dtype


def copies_weight(weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a `SlabbedWeight` makes a copy of the whole weight: a conversion that is not made in slabs."""
    return weight.device.type != "cpu" and not weight.dtype == compute_dtype == dtype


class SlabbedWeight:
    """A ``(V, H)`` weight in the operands' dtype, handed out in slabs of the vocabulary.

    Without a conversion there is one slab, the weight itself. A conversion on a CPU is made slab by slab;
    on a GPU it is made once, because slabs there would cost GEMM efficiency.
    """

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._compute_dtype = compute_dtype
        self._weight = weight
        self._in_slabs = weight.device.type == "cpu" and not (weight.dtype == compute_dtype == dtype)

    @cached_property
    def _whole(self) -> Tensor:
        return self._converted(self._weight)  # on first use: a call may need single rows only

    def _converted(self, rows: Tensor) -> Tensor:
        # The rounding to the compute dtype comes first: under autocast an fp32 weight counts as bf16.
        return rows.to(self._compute_dtype).to(self.dtype)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        vocab_size, hidden_size = self._weight.shape
        if not self._in_slabs:
            yield 0, vocab_size, self._whole
            return
        step = max(SLAB_MIB * 2**20 // (hidden_size * self.dtype.itemsize), 64)
        for start in range(0, vocab_size, step):
            stop = min(start + step, vocab_size)
            yield start, stop, self._converted(self._weight[start:stop])

    def rows(self, index: Tensor) -> Tensor:
        """``(N, H)`` rows of the weight by token id, in the operands' dtype."""
        return self._converted(self._weight.index_select(0, index))


def logits_into(out: Tensor, rows: Tensor, weight: SlabbedWeight) -> None:
    """``out (C, V) = rows (C, H) @ weight^T``; ``out`` may have any row stride."""
    for start, stop, slab in weight:
        add_product(out[:, start:stop], rows, slab.t(), is_first=True)


def add_logits(out: Tensor, rows: Tensor, weight: SlabbedWeight) -> None:
    """``out (C, V) += rows (C, r) @ weight^T``, summed in ``out``'s dtype; it may have any row stride."""
    for start, stop, slab in weight:
        add_product(out[:, start:stop], rows, slab.t(), is_first=False)


def bf16_parts(value: Tensor, count: int) -> list[Tensor]:
    """``count`` bf16 tensors that add up to fp32 ``value``, each 8 bits more of it: three are all 24."""
    parts = []
    for _ in range(count):
        parts.append(value.bfloat16())
        value = value - parts[-1].float()
    return parts


# Of bf16 parts that a value of some dtype has.
NUM_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def exact_operands(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 ``(M, K)`` and ``(V, K)`` whose product is that of fp32 ``rows (M, r)`` and ``weight (V, r)``.

    A GPU multiplies fp32 operands with 11 bits of each where TF32 is allowed, and slowly where it is not. The
    parts' products up to 2^-24 of the whole stand side by side: K is 3 r for a bf16 weight, 5 r for an fp16
    and 6 r for an fp32 one, and up to 7 zeros for its alignment.
    """
    left = bf16_parts(rows.float(), 3)
    right = bf16_parts(weight.float(), NUM_PARTS[weight.dtype])
    pairs = [(i, j) for j in range(len(right)) for i in range(len(left) - j)]
    padding = -len(pairs) * rows.shape[1] % 8
    operands = (torch.cat([left[i] for i, _ in pairs], 1), torch.cat([right[j] for _, j in pairs], 1))
    if padding == 0:
        return operands
    return torch.nn.functional.pad(operands[0], (0, padding)), torch.nn.functional.pad(
        operands[1], (0, padding)
    )


def hidden_grad_into(out: Tensor, d: Tensor, weight: SlabbedWeight, parts: int = 1) -> None:
    """``out (C, H) = d (C, V) @ weight``, rounded once, to the operands' dtype or to fp32.

    Where the device sums 16-bit operands in fp32, the sum is fp32 whatever ``out`` is: a GEMM library that
    splits a long sum into a 16-bit result may add up rounded pieces of it. ``parts``: of the vocabulary,
    whose sums are made side by side, for as many times the tiles; see `fastdpo.plan.waves`.
    """
    wide = sum_dtype(d)
    if wide == d.dtype:
        for start, stop, slab in weight:
            add_product(out, d[:, start:stop], slab, is_first=start == 0)
        return
    total = out if out.dtype == wide else out.new_empty(out.shape, dtype=wide)
    for _, _, whole in weight:  # one slab: only conversions on a CPU come in several
        _sum_in_parts(total, d, whole, parts)
    if total is not out:
        out.copy_(total)


def _sum_in_parts(total: Tensor, d: Tensor, weight: Tensor, parts: int) -> None:
    """``total (C, H) = d (C, V) @ weight (V, H)`` in fp32 from 16 bits, as the sum of ``parts`` products."""
    num_rows, (vocab_size, hidden_size) = len(d), weight.shape
    size = part_size(vocab_size, parts)
    if parts == 1:
        add_product(total, d, weight, is_first=True)
        return
    sums = total.new_empty((parts, num_rows, hidden_size))
    pieces = d.as_strided((parts, num_rows, size), (size, d.stride(0), 1), d.storage_offset())
    torch.bmm(pieces, weight[: parts * size].view(parts, size, hidden_size), out_dtype=total.dtype, out=sums)
    torch.sum(sums, 0, out=total)
    if parts * size < vocab_size:
        add_product(total, d[:, parts * size :], weight[parts * size :], is_first=False)


def add_weight_grad(total: Tensor, d: Tensor, scaled_rows: Tensor, *, is_first: bool) -> None:
    """``total (V, H) (+)= d (C, V)^T @ scaled_rows (C, H)``; the first product writes, so no zero-fill.

    ``total`` has the operands' dtype, or is fp32 over 16-bit operands on a GPU, where the GEMM sums so.
    Every other pair goes through a product in the wider dtype, slab by slab, rounded once per call.
    """
    if total.dtype == d.dtype or has_wide_sums(total, d.dtype):
        add_product(total, d.t(), scaled_rows, is_first=is_first)
        return
    wide = torch.promote_types(total.dtype, d.dtype)
    rows = scaled_rows.to(wide)
    step = max(SLAB_MIB * 2**20 // (max(total.shape[1], d.shape[0]) * wide.itemsize), 64)
    for start in range(0, total.shape[0], step):
        slab = total[start : start + step]
        product = torch.mm(d[:, start : start + step].to(wide).t(), rows)
        if is_first:
            slab.copy_(product)
        else:
            slab.add_(product)


def add_in_slabs(total: Tensor, wide: Tensor) -> None:
    """``total += wide``, both (V, H), rounded once; a slab at a time, for what is made of it on the way."""
    step = max(SLAB_MIB * 2**20 // (wide.shape[1] * wide.element_size()), 1)
    for start in range(0, wide.shape[0], step):
        total[start : start + step].add_(wide[start : start + step])


def is_gpu(device: torch.device) -> bool:
    """Whether the device's GEMM gives fp32 results of 16-bit operands (``out_dtype``)."""
    return device.type == "cuda"


def sum_dtype(operand: Tensor) -> torch.dtype:
    """The dtype in which this device's GEMM gives sums of such operands: fp32 of 16 bits on a GPU."""
    return torch.float32 if sums_16_bits(operand.dtype, operand.device) else operand.dtype


def sums_16_bits(operand: torch.dtype, device: torch.device) -> bool:
    """Whether operands have 16 bits, and this device's GEMM gives fp32 results of them."""
    return operand in LOW_PRECISION and is_gpu(device)


def has_wide_sums(out: Tensor, operand: torch.dtype) -> bool:
    """Whether this device's GEMM sums such operands into ``out``: 16-bit ones into fp32."""
    return out.dtype == torch.float32 and sums_16_bits(operand, out.device)


def add_bias_grad(total: Tensor, d: Tensor, coeff: Tensor) -> None:
    """``total (V,) += d (C, V)^T @ coeff (C,)`` with the sum in ``total``'s dtype, fp32 or fp64."""
    if d.dtype == total.dtype:
        total.addmv_(d.t(), coeff)
    elif has_wide_sums(total, d.dtype):
        column = coeff.to(d.dtype)[:, None]
        torch.addmm(total[:, None], d.t(), column, out_dtype=total.dtype, out=total[:, None])
    else:
        step = max(SLAB_MIB * 2**20 // (d.shape[1] * total.dtype.itemsize), 1)
        for start in range(0, d.shape[0], step):
            block = slice(start, start + step)
            total.addmv_(d[block].to(total.dtype).t(), coeff[block])


def add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """``total (+)= left @ right``, in ``total``'s dtype: the operands', or fp32 over 16 bits on a GPU."""
    if total.dtype == left.dtype:
        if is_first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif is_first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
