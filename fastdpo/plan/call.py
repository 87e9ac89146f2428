"""How one call of the head will run: mode, chunks, what is kept, matrix products and bytes.

Pure arithmetic: no tensor, no torch. The ops follow the `Plan` they get from here, and `explain_plan`
(``plan_explain.py``) prints the same object, so what is printed is what runs. The chunks themselves come
from ``schedule.py``, and what a GPU makes of them from ``waves.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastdpo.plan.lean import LeanPlan, make_lean_plan
from fastdpo.plan.memory import peak_bytes, product_bytes
from fastdpo.plan.modes import LEAN_STASH
from fastdpo.plan.plan import Plan, ranges
from fastdpo.plan.schedule import (
    GROUP_ROWS,
    MIB,
    RowGroup,
    chunk_and_block_rows,
    group_loss_rows,
    leading_dim,
)

# Up to this many products may be summed in a 16-bit gradient: measured error 2.4 to 2.9e-3, against
# 1.7e-3 for a single rounding; more than that and the sum is fp32 (DESIGN section 3).
MAX_LOW_PRECISION_GROUPS = 5


def make_plan(
    mode: str,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    logits_bytes: int = 4,
    operand_bytes: int = 2,
    needs_hidden: bool = True,
    needs_weight: bool = False,
    workspace_mib: int = 512,
    cache_mib: int = 1024,
    num_multiprocessors: int = 0,
    loss_rows: Sequence[int] = (0,),
    needs_bias: bool = False,
    lean_kernel: str = "torch",
    joins_chunks: bool = False,
    hidden_bytes: int | None = None,
    weight_bytes: int | None = None,
    copies_weight: bool = False,
    num_kept: int = 1,
    largest_part: int = 0,
) -> Plan:
    """The plan for a mode that ``resolve_mode`` has settled; sizes in elements, budgets in MiB.

    ``num_multiprocessors``: of the GPU, 0 for a CPU. ``loss_rows``: for ``pairs``, row r of the loss
    fills labelled rows ``[loss_rows[r], loss_rows[r + 1])``. ``lean_kernel``: of ``plan_lean.LEAN_KERNELS``.
    ``joins_chunks``: whether D may stay in the workspace for several chunks. ``hidden_bytes`` and
    ``weight_bytes``: of an element of these and of their gradients; None: as of the operands.
    ``copies_weight``: whether products need the weight in another dtype, and all of it at once.
    ``num_kept``: D's, or products of them, that are kept for each row. ``largest_part``: where ranks have
    parts of a vocabulary, the most rows of the weight that one has: all plan the groups of that one.
    """
    hidden_bytes, weight_bytes = hidden_bytes or operand_bytes, weight_bytes or operand_bytes
    hidden_grad_bytes = needs_hidden * num_tokens * hidden_size * hidden_bytes
    weight_grad_bytes = needs_weight * vocab_size * hidden_size * weight_bytes
    if mode in ("lean", LEAN_STASH):
        lean = make_lean_plan(
            num_tokens,
            hidden_size,
            vocab_size,
            kernel=lean_kernel,
            operand_bytes=operand_bytes,
            needs_hidden=needs_hidden,
            needs_weight=needs_weight,
            needs_bias=needs_bias,
            keeps_product=mode == LEAN_STASH,
            copies_weight=copies_weight,
            workspace_mib=workspace_mib,
            num_multiprocessors=num_multiprocessors,
        )
        gradients = (hidden_grad_bytes, weight_grad_bytes)
        return _as_plan(lean, operand_bytes, num_multiprocessors, workspace_mib, *gradients)
    rows, block_rows = chunk_and_block_rows(
        num_tokens,
        vocab_size,
        logits_bytes,
        workspace_mib,
        hidden_size=hidden_size,
        num_multiprocessors=num_multiprocessors,
        joins_chunks=joins_chunks,
    )
    d_row_bytes = leading_dim(vocab_size) * operand_bytes  # padded, as rows of logits are
    cached = _cached_rows(num_tokens, rows, num_kept * d_row_bytes, cache_mib) if mode == "cache" else 0
    groups: tuple[RowGroup, ...] = ()
    if mode == "pairs":
        longest = leading_dim(max(largest_part, vocab_size)) * operand_bytes
        groups = group_loss_rows(loss_rows, min(GROUP_ROWS, cache_mib * MIB // longest))
    group_rows = max((group.stop - group.start for group in groups if not group.is_recomputed), default=0)
    # In pieces of what is recomputed at a time: the rest of a batch, or a row of the loss that is too long.
    again = [group.stop - group.start for group in groups if group.is_recomputed]
    if mode in ("cache", "recompute") and cached < num_tokens:
        again = [num_tokens - cached]
    share = sum(again) / num_tokens if num_tokens else 0.0

    forward, backward = _passes(mode, (num_tokens > 0) * (needs_hidden + needs_weight), share)
    num_groups = (
        (cached > 0)
        + sum(not group.is_recomputed and group.stop > group.start for group in groups)
        + sum(-(-piece // block_rows) for piece in again)
    )
    kept_bytes = {
        "stash": num_kept * num_tokens * hidden_size * operand_bytes,
        "cache": num_kept * cached * d_row_bytes,
        "pairs": group_rows * d_row_bytes,
    }.get(mode, 0)
    workspace_rows = block_rows if mode == "stash" or again else rows
    workspace_bytes = workspace_rows * leading_dim(vocab_size) * logits_bytes
    weight_copy_bytes = copies_weight * vocab_size * hidden_size * operand_bytes
    weight_sum_bytes = 0
    if needs_weight and sums_in_fp32(num_groups, weight_bytes):
        weight_sum_bytes = vocab_size * hidden_size * 4
    plan = Plan(
        mode=mode,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        chunk_rows=rows,
        block_rows=block_rows,
        leading_dim=leading_dim(vocab_size),
        cached_rows=cached,
        gemm_passes_forward=forward,
        gemm_passes_backward=backward,
        weight_grad_groups=num_groups,
        workspace_bytes=workspace_bytes,
        kept_bytes=kept_bytes,
        weight_copy_bytes=weight_copy_bytes,
        weight_sum_bytes=weight_sum_bytes,
        score_rows=0,
        score_slab=0,
        peak_bytes=0,
        groups=groups,
        group_rows=group_rows,
        operand_bytes=operand_bytes,
        num_multiprocessors=num_multiprocessors,
        logits_bytes=logits_bytes,
        workspace_mib=workspace_mib,
        joins_chunks=joins_chunks,
        keeps_product=mode == "stash",
    )
    return _with_products(plan, again, needs_hidden, needs_weight, hidden_grad_bytes, weight_grad_bytes)


def _passes(mode: str, num_gradients: int, recomputed: float) -> tuple[float, float]:
    """Products forward and backward, with a share of the rows recomputed."""
    if mode == "stash":
        return 2.0, 0.0
    if mode == "pairs":
        return 1.0 + num_gradients + recomputed, 0.0
    return 1.0, num_gradients + recomputed if mode in ("cache", "recompute") else 0.0


def _with_products(
    plan: Plan,
    again: Sequence[int],
    needs_hidden: bool,
    needs_weight: bool,
    hidden_grad_bytes: int,
    weight_grad_bytes: int,
) -> Plan:
    """The plan with its products of D W, and what it takes at once. ``again``: rows that are recomputed."""
    # Groups of D, or of recomputed rows, as there are.
    group_sizes = [plan.cached_rows] if plan.cached_rows else []
    group_sizes += [group.stop - group.start for group in plan.groups if not group.is_recomputed]
    group_sizes += [stop - start for piece in again for start, stop in ranges(piece, plan.block_rows)]
    products = _hidden_products(plan, group_sizes if needs_hidden else [])
    peak = peak_bytes(
        plan.mode,
        workspace_bytes=plan.workspace_bytes,
        kept_bytes=plan.kept_bytes,
        row_bytes=plan.hidden_size * plan.operand_bytes,
        chunk_rows=plan.chunk_rows,
        # Of dW's products, the rows that are scaled.
        group_rows=max(group_sizes, default=0) if needs_weight else 0,
        product_bytes=max(
            (product_bytes(plan, *product, is_kept=plan.keeps_product) for product in products), default=0
        ),
        hidden_grad_bytes=hidden_grad_bytes,
        weight_grad_bytes=weight_grad_bytes,
        weight_sum_bytes=plan.weight_sum_bytes,
        recomputes=bool(again),
        weight_copy_bytes=plan.weight_copy_bytes,
    )
    return replace(plan, peak_bytes=peak, hidden_products=products)


def _as_plan(
    lean: LeanPlan,
    operand_bytes: int,
    num_multiprocessors: int,
    workspace_mib: int,
    hidden_grad_bytes: int,
    weight_grad_bytes: int,
) -> Plan:
    """The plan of mode ``lean``. Slabs of the weight are converted within its workspace."""
    keeps_product = lean.gemm_passes_forward == 2
    return Plan(
        mode="lean",
        num_tokens=lean.num_tokens,
        hidden_size=lean.hidden_size,
        vocab_size=lean.vocab_size,
        chunk_rows=lean.row_block,
        block_rows=lean.row_block,
        leading_dim=lean.slab,
        cached_rows=0,
        gemm_passes_forward=lean.gemm_passes_forward,
        gemm_passes_backward=lean.gemm_passes_backward,
        weight_grad_groups=1,
        workspace_bytes=lean.workspace_bytes,
        kept_bytes=lean.kept_bytes,
        weight_copy_bytes=0,
        weight_sum_bytes=0,
        score_rows=lean.score_rows,
        score_slab=lean.score_slab,
        peak_bytes=lean.workspace_bytes + lean.kept_bytes + hidden_grad_bytes + weight_grad_bytes,
        groups=(),
        group_rows=0,
        operand_bytes=operand_bytes,
        num_multiprocessors=num_multiprocessors,
        logits_bytes=0,
        workspace_mib=workspace_mib,
        joins_chunks=False,
        keeps_product=keeps_product,
    )


def _hidden_products(plan: Plan, group_sizes: list[int]) -> tuple[tuple[int, int], ...]:
    """Rows and parts of every product of D W: of blocks where D stays in the workspace, else of groups."""
    if plan.mode == "stash":
        pieces = [block[-1][1] - block[0][0] for block in plan.blocks()]
    else:
        pieces = [
            stop - start for size in group_sizes for start, stop in ranges(size, plan.hidden_piece(size))
        ]
    return tuple((rows, plan.hidden_parts(rows)) for rows in pieces)


def sums_in_fp32(num_groups: int, weight_bytes: int) -> bool:
    """Whether dW of a 16-bit weight is summed in fp32: more roundings than its accuracy allows."""
    return weight_bytes == 2 and num_groups > MAX_LOW_PRECISION_GROUPS


def _cached_rows(num_tokens: int, rows: int, d_row_bytes: int, cache_mib: int) -> int:
    """Rows of D kept: all that fit, in whole chunks, so that the rest is recomputed as it was computed."""
    fit = cache_mib * MIB // d_row_bytes
    return num_tokens if fit >= num_tokens else fit // rows * rows
