"""The most memory that one call of the head holds at once: pure arithmetic, as in `fastdpo.plan`."""

from __future__ import annotations

from typing import Protocol

from fastdpo.plan.schedule import MIB
from fastdpo.plan.waves import partial_sum_bytes

# Bounds the rows of D W that are scaled at a time, and on a CPU those that are made at a time.
HIDDEN_SCRATCH_MIB = 64


class HiddenSizes(Protocol):
    """What of a plan tells the size of D W."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def operand_bytes(self) -> int: ...
    @property
    def num_multiprocessors(self) -> int: ...


def hidden_scratch_rows(block_rows: int, row_bytes: int) -> int:
    """Rows of D whose product with W is made at a time, or of D W that are scaled at a time."""
    return max(block_rows, HIDDEN_SCRATCH_MIB * MIB // max(row_bytes, 1), 1)


def product_bytes(plan: HiddenSizes, rows: int, parts: int, *, is_kept: bool) -> int:
    """Bytes that D W of some rows takes beside the place where it is kept, or where the gradient goes.

    On a GPU from 16-bit operands: its fp32 sum, those of its parts, and what is rounded of it.
    """
    rounded = 0 if is_kept else rows * plan.hidden_size * plan.operand_bytes
    if plan.num_multiprocessors == 0 or plan.operand_bytes != 2:
        return rounded
    sums = partial_sum_bytes(rows, plan.hidden_size, parts) if parts > 1 else 0
    return partial_sum_bytes(rows, plan.hidden_size, 1) + max(sums, rounded)


def peak_bytes(
    mode: str,
    *,
    workspace_bytes: int,
    kept_bytes: int,
    row_bytes: int,
    chunk_rows: int,
    group_rows: int,
    product_bytes: int,
    hidden_grad_bytes: int,
    weight_grad_bytes: int,
    weight_sum_bytes: int,
    recomputes: bool,
    weight_copy_bytes: int = 0,
    combined_bytes: int = 0,
) -> int:
    """Bytes beyond the inputs in the forward or the backward pass, whichever holds more, results included.

    Args:
        mode: other than ``lean``.
        workspace_bytes, kept_bytes: of the plan.
        row_bytes: of one row of hidden in the operands' dtype.
        chunk_rows: rows of hidden that are gathered for a product of logits.
        group_rows: rows of the longest group of D, gathered and scaled for the product of dW; 0 without one.
        product_bytes: of the largest D W that is made at a time.
        hidden_grad_bytes, weight_grad_bytes: of the results; where unlabelled rows of hidden have a gradient
            too, that is more. 0 where there is none.
        weight_sum_bytes: of dW where it is summed in another dtype than it is returned in, else 0.
        recomputes: whether rows are recomputed: their logits are there beside the gradients.
        weight_copy_bytes: of the weight in the operands' dtype, where a copy of all of it is made; it lives
            as long as products with the weight do.
        combined_bytes: of what the backward pass makes of two that are kept, a piece at a time.

    What is small is left out: vectors of N or V numbers, and on a CPU slabs of at most 64 MiB in which
    16-bit operands are upcast.
    """
    chunk = chunk_rows * row_bytes
    forward = workspace_bytes + kept_bytes + chunk + weight_copy_bytes
    dweight = weight_sum_bytes or weight_grad_bytes
    results = hidden_grad_bytes + weight_grad_bytes
    if mode == "stash":
        # A piece of D W times its coefficients, before it is where it belongs.
        scaled = min(hidden_scratch_rows(1, row_bytes) * row_bytes, hidden_grad_bytes)
        return max(forward + product_bytes, kept_bytes + hidden_grad_bytes + scaled + combined_bytes)
    if mode == "score" or not results:
        return forward
    scratch = max(group_rows * row_bytes, product_bytes)
    cast = hidden_grad_bytes + dweight + bool(weight_sum_bytes) * weight_grad_bytes
    if mode == "pairs":
        return max(forward + hidden_grad_bytes + dweight + scratch, cast)
    held = workspace_bytes + chunk if recomputes else 0
    held += weight_copy_bytes if recomputes or hidden_grad_bytes else 0
    held += combined_bytes
    return max(forward, kept_bytes + held + hidden_grad_bytes + dweight + scratch, kept_bytes + cast)
