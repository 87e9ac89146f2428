"""The most memory that one call of the head holds at once: pure arithmetic, as in `fastdpo.plan`."""

from __future__ import annotations

from fastdpo.schedule import MIB

# Bounds the (rows, H) product of a group. Large, because a product of few rows fills fewer of a GPU's waves.
HIDDEN_SCRATCH_MIB = 64


def hidden_scratch_rows(block_rows: int, row_bytes: int) -> int:
    """Rows of D whose product with W is made at a time."""
    return max(block_rows, HIDDEN_SCRATCH_MIB * MIB // max(row_bytes, 1), 1)


def peak_bytes(
    mode: str,
    *,
    workspace_bytes: int,
    kept_bytes: int,
    row_bytes: int,
    chunk_rows: int,
    group_rows: int,
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
        group_rows: rows of the longest group of D, gathered and scaled for its products.
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
    chunk = 2 * chunk_rows * row_bytes  # the rows of one are there until those of the next are
    forward = workspace_bytes + kept_bytes + chunk + weight_copy_bytes
    dweight = weight_sum_bytes or weight_grad_bytes
    results = hidden_grad_bytes + weight_grad_bytes
    if mode == "stash":
        # A chunk of D W times its fp32 coefficients, before it is rounded.
        return max(forward, kept_bytes + hidden_grad_bytes + 3 * chunk_rows * row_bytes + combined_bytes)
    if mode == "score" or not results:
        return forward
    scratch = group_rows * row_bytes
    cast = hidden_grad_bytes + dweight + bool(weight_sum_bytes) * weight_grad_bytes
    if mode == "pairs":
        return max(forward + hidden_grad_bytes + dweight + scratch, cast)
    held = workspace_bytes + chunk if recomputes else 0
    held += weight_copy_bytes if recomputes or hidden_grad_bytes else 0
    held += combined_bytes
    return max(forward, kept_bytes + held + hidden_grad_bytes + dweight + scratch, kept_bytes + cast)
