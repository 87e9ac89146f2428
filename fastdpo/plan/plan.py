"""What one call of the head will do, and how that reads."""

from __future__ import annotations

from dataclasses import dataclass

from fastdpo.plan.memory import hidden_scratch_rows
from fastdpo.plan.schedule import (
    CHUNK_ROWS_MULTIPLE,
    MIB,
    WANTED_CHUNK_ROWS,
    RowGroup,
    gpu_choices,
    hidden_grad_piece,
    hidden_scratch_bytes,
    leading_dim,
)
from fastdpo.plan.waves import Waves, hidden_grad_parts, hidden_grad_waves, logits_waves

_KEPT = {
    "cache": "D for the backward pass",
    "pairs": "D of one group of pairs, or of other rows of the loss, until its gradient is known",
    "lean": "the fp32 sum of dhidden in the backward pass",
}


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
    peak_bytes: int  # the most that is allocated at once, gradients included: see `fastdpo.plan.memory`
    groups: tuple[RowGroup, ...]  # of mode `pairs`
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
        return ranges(self.num_tokens, self.chunk_rows)

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


def plan_text(plan: Plan) -> str:
    """What ``explain_plan`` prints."""
    is_lean = plan.mode == "lean"
    kept = "D W for the backward pass" if plan.keeps_product else _KEPT.get(plan.mode, "nothing")
    lines = [
        f"mode          {plan.mode}",
        f"tokens        {plan.num_tokens} labelled",
        f"head          hidden {plan.hidden_size}, vocabulary {plan.vocab_size}",
    ]
    lines += lean_lines(plan) if is_lean else chunk_lines(plan)
    lines += [f"GPU waves     {product} (predicted)" for product in plan.waves]
    lines += [
        f"GEMM passes   {plan.gemm_passes:.2f} (forward {plan.gemm_passes_forward:.2f}, "
        f"backward {plan.gemm_passes_backward:.2f})",
        f"workspace     {plan.workspace_bytes / MIB:.1f} MiB of logits",
        f"kept          {plan.kept_bytes / MIB:.1f} MiB ({kept})",
    ]
    if plan.weight_copy_bytes:
        lines.append(f"weight copy   {plan.weight_copy_bytes / MIB:.1f} MiB, in the products' dtype")
    if plan.weight_sum_bytes:
        lines.append(f"fp32 sum      {plan.weight_sum_bytes / MIB:.1f} MiB of dweight, cast at the end")
    lines.append(f"peak          {plan.peak_bytes / MIB:.1f} MiB at once, gradients included")
    if plan.mode == "cache":
        lines.append(f"cached rows   {plan.cached_rows} of {plan.num_tokens}; the rest is recomputed")
    if plan.mode == "pairs":
        again = sum(group.is_recomputed for group in plan.groups)
        lines.append(
            f"groups        {len(plan.groups)} of whole pairs, or lists, up to {plan.group_rows} rows; "
            f"{again} too long for that are recomputed"
        )
    return "\n".join(lines)


def lean_lines(plan: Plan) -> list[str]:
    """How mode ``lean`` cuts rows and vocabulary, forward and, where it makes logits again, backward."""
    forward = f"forward {plan.score_rows} rows by {plan.score_slab} vocabulary entries"
    if plan.score_slab == 0:
        forward = (
            f"forward {plan.score_rows} rows a launch, no logits stored: {plan.workspace_mib} MiB hold no "
            "slab wide enough to sum D W on the way"
        )
    lines = [f"slabs         {forward}"]
    if plan.gemm_passes_backward:
        lines.append(
            f"              backward {plan.chunk_rows} rows by {plan.leading_dim} vocabulary entries"
        )
    return lines


def chunk_lines(plan: Plan) -> list[str]:
    """The chunks, and of a GPU what the best of the smaller and of the larger ones would cost or gain."""
    rows = plan.chunk_rows
    lines = [f"chunks        {len(plan.chunks())} of up to {rows} rows"]
    if not plan.waves or not CHUNK_ROWS_MULTIPLE <= rows < plan.num_tokens:
        return lines
    sizes = (plan.num_tokens, plan.vocab_size, plan.logits_bytes, plan.workspace_mib)
    device = (plan.hidden_size, plan.num_multiprocessors)
    costs = gpu_choices(*sizes, *device, plan.joins_chunks)
    best = {chunk: min(cost for sizes, cost in costs.items() if sizes[0] == chunk) for chunk, _ in costs}
    fewer = [chunk for chunk in best if chunk < rows and chunk <= max(rows // 2, WANTED_CHUNK_ROWS)]
    more = [chunk for chunk in best if chunk > rows]
    for others in filter(None, (fewer, more)):
        other = min(others, key=best.__getitem__)
        change = best[other] / best[rows] - 1
        mib = abs(other - rows) * leading_dim(plan.vocab_size) * plan.logits_bytes / MIB
        lines.append(
            f"              of {other} rows: {abs(change):.1%} {'slower' if change > 0 else 'faster'}, "
            f"{mib:.0f} MiB {'less' if other < rows else 'more'} (predicted)"
        )
    return lines


def ranges(total: int, step: int) -> list[tuple[int, int]]:
    step = max(step, 1)
    return [(start, min(start + step, total)) for start in range(0, total, step)]
