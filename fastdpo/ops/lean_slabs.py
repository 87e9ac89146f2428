"""What both passes of mode ``lean`` share: blocks of rows, slabs of the vocabulary, and their products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdpo.kernels.matmul import LOW_PRECISION, add_product, copies_weight, operand_dtype
from fastdpo.ops.backends import resolve_backend
from fastdpo.ops.checks import accumulation_dtype, fail
from fastdpo.ops.head_call import HeadCall
from fastdpo.plan.lean import is_store_free


def lean_kernel(backend: str, compute_dtype: torch.dtype) -> str:
    """Which of ``plan_lean.LEAN_KERNELS`` a resolved backend runs for operands of some dtype.

    fp32 goes through plain torch: its products are slow, and the backward pass, to be right to the last bits
    of fp32, needs the very logits and the very tanh that lse is of.
    """
    is_gpu_kernel = backend in ("triton", "cuda") and compute_dtype in LOW_PRECISION
    if not is_gpu_kernel:
        return "torch"
    return "triton" if backend == "triton" else "rows"


def makes_product(
    hidden: Tensor,
    weight: Tensor,
    backend: str,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    workspace_mib: int,
) -> bool:
    """Whether the forward pass stores logits, and so can make D W: known without the number of tokens."""
    operands = operand_dtype(compute_dtype, logits_dtype, hidden.device)
    kernel = lean_kernel(resolve_backend(backend, hidden.device, logits_dtype), compute_dtype)
    has_copy = copies_weight(weight, compute_dtype, operands)
    sizes = (hidden.shape[1], weight.shape[0], operands.itemsize)
    return not is_store_free(kernel, *sizes, has_copy, workspace_mib)


def check_logits_dtype(call: HeadCall) -> None:
    """A ValueError where logits of another dtype than the sums' are asked for."""
    wanted = accumulation_dtype(call.compute_dtype)
    if call.logits_dtype != wanted:
        raise fail("execution.logits_dtype", call.logits_dtype, "None with mode 'lean': it stores no logits")


def slabs(call: HeadCall, step: int) -> Iterator[tuple[int, int]]:
    """``(first, last)`` vocabulary entries of every slab of ``step``."""
    vocab_size = call.plan.vocab_size
    for first in range(0, vocab_size, step):
        yield first, min(first + step, vocab_size)


def weight_slab(call: HeadCall, first: int, last: int) -> Tensor:
    """A slab of the head ``(last - first, H)``, in the dtype that products are made in."""
    # Rounded to the compute dtype first: under autocast an fp32 weight counts as bf16.
    return call.weight[first:last].to(call.compute_dtype).to(call.operand_dtype)


class SlabWorkspace:
    """The one buffer that the logits of every block and slab are made in."""

    def __init__(self, call: HeadCall, rows: int, slab: int) -> None:
        self._operand_dtype = call.operand_dtype
        # Rows of 16-bit D in place lie 4 bytes an element apart: aligned as rows of logits are.
        self._stride = -(-min(slab, call.plan.vocab_size) // 16) * 16 if rows else 0
        self._logits = call.hidden.new_empty((rows, self._stride), dtype=call.logits_dtype)

    def logits(self, rows: Tensor, slab_weight: Tensor) -> Tensor:
        out = self._logits[: len(rows), : len(slab_weight)]
        add_product(out, rows, slab_weight.t(), is_first=True)
        return out

    def d_in_place(self, logits: Tensor) -> Tensor:
        """D's place: the front of each row of logits, in the operands' dtype."""
        flat = self._logits.view(-1).view(self._operand_dtype)
        stride = self._stride * logits.element_size() // flat.element_size()
        return flat.as_strided(tuple(logits.shape), (stride, 1))
