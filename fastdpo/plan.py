"""How one call of the head will run: mode, chunks, what is kept, matrix products and bytes.

Pure arithmetic: no tensor, no torch. The ops follow the `Plan` they get from here, and `explain_plan`
(``plan_explain.py``) prints the same object, so what is printed is what runs. The chunks themselves come
from ``schedule.py``, and what a GPU makes of them from ``waves.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastdpo.plan_lean import LeanPlan, make_lean_plan
from fastdpo.plan_memory import hidden_scratch_rows, peak_bytes, product_bytes
from fastdpo.plan_modes import LEAN_STASH
from fastdpo.plan_text import plan_text
from fastdpo.schedule import (
    GROUP_ROWS,
    MIB,
    PairGroup,
    chunk_and_block_rows,
    group_pairs,
    hidden_grad_piece,
    hidden_scratch_bytes,
    leading_dim,
)
from fastdpo.waves import Waves, hidden_grad_parts, hidden_grad_waves, logits_waves

# Up to this many products may be summed in a 16-bit gradient: measured error 2.4 to 2.9e-3, against
# 1.7e-3 for a single rounding; more than that and the sum is fp32 (DESIGN section 3).
MAX_LOW_PRECISION_GROUPS = 5


@dataclass(frozen=True)
class Plan:
    """What one call does. Bytes are predictions of what is allocated beyond inputs and outputs."""

    mode: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    chunk_rows: int
    block_rows: int  # of the chunks whose D, where it stays in the workspace, is one product's operand
    leading_dim: int
    cached_rows: int
    gemm_passes_forward: float
    gemm_passes_backward: float
    weight_grad_groups: int
    workspace_bytes: int
    kept_bytes: int
    weight_copy_bytes: int  # of the weight in the operands' dtype, on a GPU: made forward and again backward
    weight_sum_bytes: int  # of dW in the dtype it is summed in, where that is not the dtype it is returned in
    score_rows: int  # of `lean`: rows at a time in its forward pass
    score_slab: int  # and vocabulary entries; 0 with a kernel that stores no logits
    peak_bytes: int  # the most that is allocated at once, gradients included: see `fastdpo.plan_memory`
    groups: tuple[PairGroup, ...]  # of mode `pairs`
    group_rows: int  # of the longest of them that is not recomputed: the buffer for its D
    operand_bytes: int  # of an element of the products' operands
    num_multiprocessors: int  # of the GPU; 0 for a CPU
    # What its chunks were chosen by, beside the sizes: see ``schedule.gpu_choices``.
    logits_bytes: int
    workspace_mib: int
    joins_chunks: bool
    # Whether the forward pass keeps D W, from which the backward pass makes dhidden with no product.
    keeps_product: bool = False
    # Rows of every product D W, and the parts of the vocabulary over which it is summed.
    hidden_products: tuple[tuple[int, int], ...] = ()

    @property
    def gemm_passes(self) -> float:
        """Matrix products of 2 N H V FLOP, forward and backward together."""
        return self.gemm_passes_forward + self.gemm_passes_backward

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges ``[start, stop)`` of the chunks, in order."""
        return _ranges(self.num_tokens, self.chunk_rows)

    def blocks(self, start: int = 0, stop: int | None = None) -> list[list[tuple[int, int]]]:
        """Row ranges of the chunks of ``[start, stop)``, block by block; by default of all rows."""
        stop = self.num_tokens if stop is None else stop
        step = max(self.chunk_rows, 1)
        chunks = [(first, min(first + step, stop)) for first in range(start, stop, step)]
        joined = max(self.block_rows // step, 1)
        return [chunks[i : i + joined] for i in range(0, len(chunks), joined)]

    def hidden_piece(self, num_rows: int) -> int:
        """Rows of a compact D whose product with W is made at a time."""
        if self.num_multiprocessors == 0:
            return hidden_scratch_rows(self.block_rows, self.hidden_size * self.operand_bytes)
        return hidden_grad_piece(num_rows, *self._device)

    def hidden_parts(self, num_rows: int) -> int:
        """Parts of the vocabulary over which D W of some rows is summed, so that they fill a GPU."""
        if self.operand_bytes != 2:
            return 1  # a sum of wider operands is safe in the library's hands
        return hidden_grad_parts(num_rows, *self._device)

    def slab_parts(self, num_rows: int, slab: int) -> int:
        """The same of a slab of the vocabulary in mode ``lean``, beside the sum over the slabs."""
        scratch_bytes = max(self._device[-1] - 4 * num_rows * self.hidden_size, 0)
        return hidden_grad_parts(num_rows, self.hidden_size, slab, self.num_multiprocessors, scratch_bytes)

    @property
    def _device(self) -> tuple[int, int, int, int]:
        scratch_bytes = hidden_scratch_bytes(self.workspace_mib)
        return self.hidden_size, self.vocab_size, self.num_multiprocessors, scratch_bytes

    @property
    def waves(self) -> tuple[Waves, ...]:
        """Of 16-bit operands on a GPU: how logits and D W go over its multiprocessors, as predicted."""
        is_modelled = self.num_multiprocessors > 0 and self.operand_bytes == 2 and self.mode != "lean"
        if not is_modelled or self.num_tokens == 0:
            return ()
        rows = [stop - start for start, stop in self.chunks()]
        logits = logits_waves(rows, *self._device[:3])
        if not self.hidden_products:
            return (logits,)
        return logits, hidden_grad_waves(list(self.hidden_products), *self._device)

    def __str__(self) -> str:
        return plan_text(self)


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
    pair_rows: Sequence[int] = (0,),
    needs_bias: bool = False,
    lean_kernel: str = "torch",
    joins_chunks: bool = False,
    hidden_bytes: int | None = None,
    weight_bytes: int | None = None,
    copies_weight: bool = False,
    num_kept: int = 1,
) -> Plan:
    """The plan for a mode that ``resolve_mode`` has settled; sizes in elements, budgets in MiB.

    ``num_multiprocessors``: of the GPU, 0 for a CPU. ``pair_rows``: for ``pairs``, pair p fills labelled rows
    ``[pair_rows[p], pair_rows[p + 1])``. ``lean_kernel``: of ``plan_lean.LEAN_KERNELS``.
    ``joins_chunks``: whether D may stay in the workspace for several chunks. ``hidden_bytes`` and
    ``weight_bytes``: of an element of these and of their gradients; None: as of the operands.
    ``copies_weight``: whether products need the weight in another dtype, and all of it at once.
    ``num_kept``: D's, or products of them, that are kept for each row.
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
    groups: tuple[PairGroup, ...] = ()
    if mode == "pairs":
        groups = group_pairs(pair_rows, min(GROUP_ROWS, cache_mib * MIB // d_row_bytes))
    group_rows = max((group.stop - group.start for group in groups if not group.is_recomputed), default=0)
    # In pieces of what is recomputed at a time: the rest of a batch, or a pair that is too long.
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
    group_sizes += [stop - start for piece in again for start, stop in _ranges(piece, plan.block_rows)]
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
            stop - start for size in group_sizes for start, stop in _ranges(size, plan.hidden_piece(size))
        ]
    return tuple((rows, plan.hidden_parts(rows)) for rows in pieces)


def _ranges(total: int, step: int) -> list[tuple[int, int]]:
    step = max(step, 1)
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def sums_in_fp32(num_groups: int, weight_bytes: int) -> bool:
    """Whether dW of a 16-bit weight is summed in fp32: more roundings than its accuracy allows."""
    return weight_bytes == 2 and num_groups > MAX_LOW_PRECISION_GROUPS


def _cached_rows(num_tokens: int, rows: int, d_row_bytes: int, cache_mib: int) -> int:
    """Rows of D kept: all that fit, in whole chunks, so that the rest is recomputed as it was computed."""
    fit = cache_mib * MIB // d_row_bytes
    return num_tokens if fit >= num_tokens else fit // rows * rows
