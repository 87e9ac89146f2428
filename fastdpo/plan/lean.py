"""How a call in mode ``lean`` is cut up: blocks of rows by slabs of the vocabulary, within a budget.

A slab is a range of the vocabulary; its logits ``(R, S)`` are made for R rows at a time.

**Forward**, 16-bit operands want few rows and wide slabs: D W is summed over the slabs, and each further one
reads and writes that sum once more. Where the workspace is too small for that, Triton has a kernel that
stores no logits. Wider operands take the blocks of the backward pass: its logits are then the same bits.

**Backward**, where logits are made again, all rows at once is best: dW of a slab is then one product, written
once with the full sum over tokens behind it. Rows are cut into blocks only where even a narrow slab of all
of them would not fit.

Slabs and blocks depend on (N, H, V, dtypes, backend, device, workspace) and not on who needs gradients, so
that a policy that equals its reference gets the same bits (DESIGN section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdpo.plan import waves
from fastdpo.plan.schedule import (
    CHUNK_ROWS_MULTIPLE,
    LEADING_DIM_MULTIPLE,
    MIB,
    WANTED_CHUNK_ROWS,
    hidden_scratch_bytes,
)

# What makes a slab's sums and its D: plain torch; of 16-bit operands a row kernel, for which a slab is a
# vocabulary; or that, with a kernel that stores no logits beside it.
LEAN_KERNELS = ("torch", "rows", "triton")
# What makes it worth while to store logits: the sum of D W is then read and written in a seventh of the time
# of a slab's product at most (H200: 12 bytes for 16384 FLOP).
WIDE_SLAB = 8192
MOST_ROWS = 4096

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


def logit_bytes(kernel: str, operand_bytes: int) -> int:
    """``logit_bytes`` of `lean_blocks` for one of ``LEAN_KERNELS``."""
    if kernel == "triton":
        return KERNEL_LOGIT_BYTES
    return 2 * TORCH_LOGIT_BYTES if operand_bytes == 8 else TORCH_LOGIT_BYTES


@dataclass(frozen=True)
class LeanPlan:
    """What one call in mode ``lean`` does; bytes are predictions of what is allocated."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    # Of a pass that makes logits again: see `lean_blocks`.
    row_block: int
    slab: int
    # Of the forward pass; with a slab of 0 it stores no logits, only partial sums of so many rows.
    score_rows: int
    score_slab: int
    gemm_passes_forward: float
    gemm_passes_backward: float
    # Logits of a slab, what is made of them, converted or scaled copies of rows and of the slab's weights,
    # and dW of the slab, or sums of D W: what `workspace_mib` bounds.
    workspace_bytes: int
    # D W, where the forward pass makes it; else the fp32 sum of dhidden over the slabs, where the gradient's
    # own memory cannot hold it.
    kept_bytes: int


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
    kernel: str = "triton",
    operand_bytes: int = 2,
    needs_hidden: bool = True,
    needs_weight: bool = False,
    needs_bias: bool = False,
    keeps_product: bool = False,
    copies_weight: bool = False,
    workspace_mib: int = 512,
    num_multiprocessors: int = 0,
) -> LeanPlan:
    """The plan for mode ``lean``; sizes in elements, ``workspace_mib`` in MiB, the rest as in `lean_blocks`.

    ``kernel``: one of ``LEAN_KERNELS``. ``keeps_product``: hidden alone needs a gradient, and the forward
    pass makes D W wherever it has logits. ``copies_weight``: whether slabs of the weight are converted.

    Raises:
        ValueError: the workspace does not hold one row and one vocabulary entry.
    """
    logit = logit_bytes(kernel, operand_bytes)
    rows, slab = lean_blocks(
        num_tokens,
        hidden_size,
        vocab_size,
        logit_bytes=logit,
        operand_bytes=operand_bytes,
        workspace_mib=workspace_mib,
    )
    workspace_bytes = _block_bytes(rows, slab, hidden_size, logit, operand_bytes)
    score_rows, score_slab = rows, slab
    room = _Room(hidden_size, logit, operand_bytes, copies_weight * operand_bytes, workspace_mib)
    stores_none = kernel == "triton" and not room.is_wide(vocab_size)
    if stores_none:
        score_rows, score_slab = store_free_rows(num_tokens, vocab_size, workspace_mib), 0
        workspace_bytes = max(workspace_bytes, sums_bytes(score_rows, vocab_size))
    elif operand_bytes == 2 and num_tokens:
        score_rows, score_slab = room.best_slabs(num_tokens, vocab_size, num_multiprocessors)
        workspace_bytes = max(workspace_bytes, room.used_bytes(score_rows, score_slab))
    has_product = keeps_product and not stores_none
    needs_any = needs_hidden or needs_weight or needs_bias
    kept_bytes = num_tokens * hidden_size * operand_bytes
    if not has_product:
        # With a frozen head the slabs of one block of rows follow each other, and only its sum is held.
        summed_rows = num_tokens if needs_weight or needs_bias else rows
        has_sum = needs_hidden and slab < vocab_size
        kept_bytes = has_sum * summed_rows * hidden_size * max(operand_bytes, 4)
    return LeanPlan(
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        row_block=rows,
        slab=slab,
        score_rows=score_rows,
        score_slab=score_slab,
        gemm_passes_forward=1.0 + has_product,
        gemm_passes_backward=0.0 if has_product else float(needs_any + needs_hidden + needs_weight),
        workspace_bytes=workspace_bytes,
        kept_bytes=kept_bytes,
    )


def is_store_free(
    kernel: str,
    hidden_size: int,
    vocab_size: int,
    operand_bytes: int,
    copies_weight: bool,
    workspace_mib: int,
) -> bool:
    """Whether the forward pass stores no logits, and so makes no D W: a matter of sizes, not of tokens."""
    room = _Room(hidden_size, KERNEL_LOGIT_BYTES, operand_bytes, copies_weight * operand_bytes, workspace_mib)
    return kernel == "triton" and not room.is_wide(vocab_size)


@dataclass(frozen=True)
class _Room:
    """What a workspace holds in a forward pass of 16-bit operands; a quarter of it is for sums of D W."""

    hidden_size: int
    logit_bytes: int  # as in `lean_blocks`
    operand_bytes: int
    weight_bytes: int  # of an entry of the weight's slab where that is converted, else 0
    workspace_mib: int

    @property
    def scratch_bytes(self) -> int:
        return hidden_scratch_bytes(self.workspace_mib)

    def used_bytes(self, rows: int, slab: int) -> int:
        """Of a block of rows and a slab: logits, rows and their sum, weights; and sums of parts."""
        sums = min(self.scratch_bytes, 4 * (waves.MAX_PARTS + 1) * rows * self.hidden_size)
        return self._block_bytes(rows, slab) + sums

    def _block_bytes(self, rows: int, slab: int) -> int:
        per_row = self.hidden_size * (self.operand_bytes + 4)
        logits = rows * slab * self.logit_bytes
        return logits + rows * per_row + slab * self.hidden_size * self.weight_bytes

    def widest(self, rows: int) -> int:
        """Vocabulary entries of the widest slab beside so many rows."""
        if 4 * rows * self.hidden_size > self.scratch_bytes:
            return 0
        fixed = self._block_bytes(rows, 0)
        free = self.workspace_mib * MIB - self.scratch_bytes - fixed
        return max(free // (self._block_bytes(rows, 1) - fixed), 0)

    def is_wide(self, vocab_size: int) -> bool:
        return self.widest(WANTED_CHUNK_ROWS) >= min(vocab_size, WIDE_SLAB)

    def best_slabs(self, num_tokens: int, vocab_size: int, num_multiprocessors: int) -> tuple[int, int]:
        """``(rows, slab)``: of a GPU the fastest by the model of ``waves.py``, of some hundred rows."""
        rows = fewest = min(num_tokens, WANTED_CHUNK_ROWS)
        if num_multiprocessors:
            candidates = range(fewest, min(num_tokens, MOST_ROWS) + 1, CHUNK_ROWS_MULTIPLE)
            wanted = min(vocab_size, WIDE_SLAB)
            fitting = [rows for rows in candidates if self.widest(rows) >= wanted]
            rows = min(fitting or [fewest], key=lambda r: self._cost(r, vocab_size, num_multiprocessors))
        while self.widest(rows) < min(vocab_size, WANTED_SLAB) and rows > 1:
            rows //= 2
        if self.widest(rows) < 1:
            needed = (self._block_bytes(1, 1) + 4 * self.hidden_size) * 4 // 3
            raise ValueError(
                f"workspace_mib: one row of hidden {self.hidden_size} and one vocabulary entry need {needed} "
                f"bytes, got {self.workspace_mib} MiB"
            )
        rows = _even(num_tokens, rows, CHUNK_ROWS_MULTIPLE)
        return rows, _even(vocab_size, self.widest(rows), LEADING_DIM_MULTIPLE)

    def _cost(self, rows: int, vocab_size: int, num_multiprocessors: int) -> float:
        """The time of a row and a vocabulary entry."""
        slab = min(max(self.widest(rows), 1), vocab_size)
        device = (self.hidden_size, slab, num_multiprocessors)
        sum_bytes = 4 * rows * self.hidden_size
        cost = waves.logits_cost(rows, *device)
        cost += waves.hidden_grad_cost(rows, *device, max(self.scratch_bytes - sum_bytes, 0))
        if slab < vocab_size:
            cost += waves.byte_cost(3 * sum_bytes, num_multiprocessors)
        return cost / (rows * slab)


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
