"""How a call in mode ``lean`` is cut up: vocabulary slabs over all labelled rows, within a budget.

Pure arithmetic, as in `fastdpo.plan`. A slab is a range of the vocabulary; its logits ``(R, S)`` are made
for R rows at a time. All rows at once is best: dW of a slab is then one product, written once with the full
sum over tokens behind it. Rows are cut into blocks only where even a narrow slab of all of them would not
fit.

Slabs and blocks depend on (N, H, V, dtypes, backend, workspace) and not on who needs gradients, so that a
policy that equals its reference gets the same bits (DESIGN section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdpo.schedule import CHUNK_ROWS_MULTIPLE, LEADING_DIM_MULTIPLE, MIB

# Rows are cut into blocks before a slab gets narrower than this: a product with a shorter side no longer
# fills a GPU, and every further slab reads and writes the sum of dhidden once more.
WANTED_SLAB = 1024

# Bytes of workspace for one logit of a slab: its own, and in plain torch half as much for temporaries.
KERNEL_LOGIT_BYTES = 4
TORCH_LOGIT_BYTES = 6

# The kernel that stores no logits leaves, for every row and split of the vocabulary, up to six fp32 sums, and
# what adds them up (`kernels.slab.combined`) has up to five matrices of their size at a time.
SPLIT = 2048  # vocabulary entries; a multiple of every tile's width
SUM_BYTES = (6 + 5) * 4


def sums_bytes(num_rows: int, vocab_size: int) -> int:
    """Bytes of the partial sums of some rows, and of adding them up."""
    return num_rows * -(-vocab_size // SPLIT) * SUM_BYTES


def store_free_rows(num_tokens: int, vocab_size: int, workspace_mib: int) -> int:
    """Rows whose partial sums fit the workspace, of which one launch of the kernel makes them.

    Raises:
        ValueError: the workspace does not hold those of one row.
    """
    limit = workspace_mib * MIB // sums_bytes(1, vocab_size)
    if limit < 1:
        raise ValueError(
            f"workspace_mib: sums of one row over {vocab_size} vocabulary entries need "
            f"{sums_bytes(1, vocab_size)} bytes, got {workspace_mib} MiB"
        )
    return _even(num_tokens, limit, CHUNK_ROWS_MULTIPLE)


def logit_bytes(is_store_free: bool, operand_bytes: int) -> int:
    """``logit_bytes`` of `lean_blocks`: with kernels whose forward pass stores no logits, or without."""
    if is_store_free:
        return KERNEL_LOGIT_BYTES
    return 2 * TORCH_LOGIT_BYTES if operand_bytes == 8 else TORCH_LOGIT_BYTES


@dataclass(frozen=True)
class LeanPlan:
    """What one call in mode ``lean`` does; bytes are predictions of what is allocated."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    row_block: int
    slab: int
    # Rows at a time in a forward pass that stores no logits, whose partial sums fit the workspace; else 0.
    score_rows: int
    gemm_passes_forward: float
    gemm_passes_backward: float
    # Logits of a slab, what is made of them, converted or scaled copies of rows and of the slab's weights,
    # and dW of the slab: what `workspace_mib` bounds.
    workspace_bytes: int
    # The fp32 sum of dhidden over the slabs, where the gradient's own memory cannot hold it.
    sum_bytes: int


def lean_blocks(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    logit_bytes: int = 4,
    operand_bytes: int = 2,
    workspace_mib: int = 512,
) -> tuple[int, int]:
    """``(row_block, slab)``: rows and vocabulary entries whose logits are in the workspace at a time.

    Args:
        num_tokens, hidden_size, vocab_size: N, H, V.
        logit_bytes: workspace for one logit of a slab. A kernel makes D in place, in 4 bytes; plain torch
            takes half as much again for temporaries: 6 bytes, 12 in fp64.
        operand_bytes: bytes of one element of the products' operands.
        workspace_mib: the budget in MiB.

    Raises:
        ValueError: the workspace does not hold one row and one vocabulary entry.
    """
    if num_tokens == 0:
        return 0, vocab_size
    sizes = (hidden_size, logit_bytes, operand_bytes)
    budget = workspace_mib * MIB
    slab = min(WANTED_SLAB, vocab_size)
    fewest_rows = min(num_tokens, CHUNK_ROWS_MULTIPLE)
    while _block_bytes(fewest_rows, slab, *sizes) > budget and slab * fewest_rows > 1:
        if slab >= fewest_rows:
            slab = -(-slab // 2)
        else:
            fewest_rows = -(-fewest_rows // 2)
    rows = _rows_that_fit(slab, budget, *sizes)
    if rows < 1:
        raise ValueError(
            f"workspace_mib: one row of hidden {hidden_size} and one vocabulary entry need "
            f"{_block_bytes(1, 1, *sizes)} bytes, got {workspace_mib} MiB"
        )
    rows = _even(num_tokens, rows, CHUNK_ROWS_MULTIPLE)
    # What fewer rows leave free makes the slabs wider.
    per_entry = _block_bytes(rows, 2, *sizes) - _block_bytes(rows, 1, *sizes)
    slab = (budget - _block_bytes(rows, 0, *sizes)) // per_entry
    return rows, _even(vocab_size, slab, LEADING_DIM_MULTIPLE)


def make_lean_plan(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    logit_bytes: int = 4,
    operand_bytes: int = 2,
    needs_hidden: bool = True,
    needs_weight: bool = False,
    needs_bias: bool = False,
    workspace_mib: int = 512,
) -> LeanPlan:
    """The plan for mode ``lean``; sizes in elements, ``workspace_mib`` in MiB, the rest as in `lean_blocks`.

    Raises:
        ValueError: the workspace does not hold one row and one vocabulary entry.
    """
    rows, slab = lean_blocks(
        num_tokens,
        hidden_size,
        vocab_size,
        logit_bytes=logit_bytes,
        operand_bytes=operand_bytes,
        workspace_mib=workspace_mib,
    )
    # A kernel's logits take less memory than plain torch's: that tells which of the two it is.
    is_store_free = logit_bytes == KERNEL_LOGIT_BYTES
    score_rows = store_free_rows(num_tokens, vocab_size, workspace_mib) if is_store_free else 0
    needs_any = needs_hidden or needs_weight or needs_bias
    # With a frozen head the slabs of one block of rows follow each other, and only its sum is held.
    summed_rows = num_tokens if needs_weight or needs_bias else rows
    has_sum = needs_hidden and slab < vocab_size
    return LeanPlan(
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        row_block=rows,
        slab=slab,
        score_rows=score_rows,
        gemm_passes_forward=1.0,
        gemm_passes_backward=float(needs_any + needs_hidden + needs_weight),
        workspace_bytes=max(
            _block_bytes(rows, slab, hidden_size, logit_bytes, operand_bytes),
            sums_bytes(score_rows, vocab_size),
        ),
        sum_bytes=has_sum * summed_rows * hidden_size * max(operand_bytes, 4),
    )


def _block_bytes(rows: int, slab: int, hidden_size: int, logit_bytes: int, operand_bytes: int) -> int:
    """Scratch for a block of rows and a slab: logits, rows plain and scaled, weights, their gradient."""
    logits = rows * slab * logit_bytes
    copies = 2 * rows * hidden_size * operand_bytes
    # 16-bit operands are the caller's own weights as a rule, and their gradient may still be summed in fp32.
    weights = slab * hidden_size * (operand_bytes + max(operand_bytes, 4))
    return logits + copies + weights


def _rows_that_fit(slab: int, budget: int, hidden_size: int, logit_bytes: int, operand_bytes: int) -> int:
    sizes = (hidden_size, logit_bytes, operand_bytes)
    fixed = _block_bytes(0, slab, *sizes)
    return (budget - fixed) // (_block_bytes(1, slab, *sizes) - fixed)


def _even(total: int, limit: int, multiple: int) -> int:
    """``total`` in as few parts of at most ``limit`` as it takes: even ones, in multiples that fit."""
    if limit >= total:
        return total
    if limit >= multiple:
        limit -= limit % multiple
    even = -(-total // -(-total // limit))
    return min(limit, -(-even // multiple) * multiple) if limit >= multiple else even
