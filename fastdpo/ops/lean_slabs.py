"""What both passes of mode ``lean`` share: blocks of rows, slabs of the vocabulary, and their products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdpo import plan_lean
from fastdpo.kernels.matmul import LOW_PRECISION, add_product
from fastdpo.ops.checks import accumulation_dtype, fail
from fastdpo.ops.head_call import HeadCall


def logit_bytes(backend: str, compute_dtype: torch.dtype) -> int:
    """``logit_bytes`` of `fastdpo.plan_lean.lean_blocks` for a resolved backend."""
    return plan_lean.logit_bytes(is_store_free(backend, compute_dtype), compute_dtype.itemsize)


def is_store_free(backend: str, compute_dtype: torch.dtype) -> bool:
    """Whether the passes are those of the Triton kernels.

    fp32 goes through the platform's product, which is faster there than products without tensor cores in
    Triton; and the backward pass, to be right to the last bits of fp32, needs the very logits that lse is of.
    """
    return backend == "triton" and compute_dtype in LOW_PRECISION


def check_logits_dtype(call: HeadCall) -> None:
    """A ValueError where logits of another dtype than the sums' are asked for."""
    wanted = accumulation_dtype(call.compute_dtype)
    if call.logits_dtype != wanted:
        raise fail("execution.logits_dtype", call.logits_dtype, "None with mode 'lean': it stores no logits")


def slabs(call: HeadCall) -> Iterator[tuple[int, int]]:
    """``(first, last)`` vocabulary entries of every slab."""
    vocab_size, step = call.plan.vocab_size, call.plan.leading_dim
    for first in range(0, vocab_size, step):
        yield first, min(first + step, vocab_size)


def weight_slab(call: HeadCall, first: int, last: int) -> Tensor:
    """A slab of the head ``(last - first, H)``, in the dtype that products are made in."""
    # Rounded to the compute dtype first: under autocast an fp32 weight counts as bf16.
    return call.weight[first:last].to(call.compute_dtype).to(call.operand_dtype)


class SlabWorkspace:
    """The one buffer that the logits of every block and slab are made in."""

    def __init__(self, call: HeadCall) -> None:
        plan = call.plan
        self._operand_dtype = call.operand_dtype
        shape = (plan.chunk_rows, min(plan.leading_dim, plan.vocab_size))
        # Rows of 16-bit D in place lie 4 bytes an element apart: aligned as rows of logits are.
        self._stride = -(-shape[1] // 16) * 16 if plan.chunk_rows else 0
        self._logits = call.hidden.new_empty((shape[0], self._stride), dtype=call.logits_dtype)

    def logits(self, rows: Tensor, slab_weight: Tensor) -> Tensor:
        out = self._logits[: len(rows), : len(slab_weight)]
        add_product(out, rows, slab_weight.t(), is_first=True)
        return out

    def d_in_place(self, logits: Tensor) -> Tensor:
        """D's place: the front of each row of logits, in the operands' dtype."""
        flat = self._logits.view(-1).view(self._operand_dtype)
        stride = self._stride * logits.element_size() // flat.element_size()
        return flat.as_strided(tuple(logits.shape), (stride, 1))
