"""A plan in words, line by line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdpo.schedule import CHUNK_ROWS_MULTIPLE, MIB, WANTED_CHUNK_ROWS, gpu_choices, leading_dim

if TYPE_CHECKING:
    from fastdpo.plan import Plan

_KEPT = {
    "cache": "D for the backward pass",
    "pairs": "D of one group of pairs, until its gradient is known",
    "lean": "the fp32 sum of dhidden in the backward pass",
}


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
            f"groups        {len(plan.groups)} of whole pairs, up to {plan.group_rows} rows; "
            f"{again} pairs too long for that are recomputed"
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
