"""The plan of ``token_divergence``: a head's, with the products and the memory of its teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.kernels.matmul import copies_weight, operand_dtype
from fastdpo.ops.backends import num_multiprocessors
from fastdpo.ops.checks import accumulation_dtype
from fastdpo.ops.divergence_chunks import combined_rows, tile_rows, workspace_units
from fastdpo.plan.call import make_plan, sums_in_fp32
from fastdpo.plan.memory import peak_bytes, product_bytes
from fastdpo.plan.plan import Plan


def divergence_plan(
    hidden: Tensor,
    weight: Tensor,
    teachers: Sequence[tuple[Tensor, torch.dtype]],
    mode: str,
    *,
    num_tokens: int,
    num_kept: int,
    compute_dtype: torch.dtype,
    backend: str,
    workspace_mib: int,
    cache_mib: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Plan:
    """The plan for a mode that is settled. Products are counted head by head, whatever the teachers' sizes.

    Args:
        hidden: ``(M, H)``; only shapes, dtypes and devices are looked at, here and of the weights.
        weight: ``(V, H)``, the policy's.
        teachers: the weight ``(V, H')`` and the compute dtype of one teacher, or of two.
        mode: what runs.
        num_tokens: N, labelled tokens.
        num_kept: D's, or products of them, that are kept: see ``divergence_chunks.num_kept``.
        compute_dtype: the policy's.
        backend: of the divergence kernel, resolved.
        workspace_mib, cache_mib: as in ``Execution``.
        needs_hidden, needs_weight, needs_bias: which gradients the backward pass makes.
    """
    vocab_size, hidden_size = weight.shape
    acc = accumulation_dtype(compute_dtype)
    operands = operand_dtype(compute_dtype, acc, hidden.device)
    plan = make_plan(
        mode,
        num_tokens,
        hidden_size,
        vocab_size,
        logits_bytes=acc.itemsize * workspace_units(len(teachers), backend),
        operand_bytes=operands.itemsize,
        num_kept=max(num_kept, 1),
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
        workspace_mib=workspace_mib,
        cache_mib=cache_mib,
        num_multiprocessors=num_multiprocessors(hidden.device),
    )
    again = num_tokens - plan.cached_rows if mode in ("cache", "recompute") else 0
    pieces = plan.cached_rows  # rows of D that are one operand
    groups, combined_bytes = plan.weight_grad_groups, 0
    if num_kept == 2 and plan.cached_rows:
        # The kept rows are one group no more: they are combined piece by piece, tile by tile in fp32.
        pieces = min(combined_rows(plan, operands.itemsize), plan.cached_rows)
        groups += -(-plan.cached_rows // pieces) - 1
        tile = min(tile_rows(plan, acc, hidden.device), pieces)
        combined_bytes = pieces * plan.leading_dim * operands.itemsize + 3 * tile * vocab_size * acc.itemsize
    elif num_kept == 2:  # two products in fp32 and their sum, where else one is
        combined_bytes = 3 * plan.chunk_rows * hidden_size * (acc.itemsize - operands.itemsize)
    weight_sum_bytes = 0
    if needs_weight and sums_in_fp32(groups, weight.element_size()):
        weight_sum_bytes = vocab_size * hidden_size * 4
    copy_bytes = 0
    for its_weight, its_dtype in ((weight, compute_dtype), *teachers):
        its_operands = operand_dtype(its_dtype, accumulation_dtype(its_dtype), hidden.device)
        if copies_weight(its_weight, its_dtype, its_operands):
            copy_bytes += its_weight.numel() * its_operands.itemsize
    is_differentiable = needs_hidden or needs_weight or needs_bias
    return replace(
        plan,
        gemm_passes_forward=1.0 + len(teachers) + (num_kept if mode == "stash" else 0),
        gemm_passes_backward=plan.gemm_passes_backward + len(teachers) * again / max(num_tokens, 1),
        weight_grad_groups=groups,
        weight_copy_bytes=copy_bytes,
        weight_sum_bytes=weight_sum_bytes,
        peak_bytes=peak_bytes(
            mode,
            workspace_bytes=plan.workspace_bytes,
            kept_bytes=plan.kept_bytes,
            row_bytes=hidden_size * operands.itemsize,
            chunk_rows=plan.chunk_rows,
            group_rows=max(pieces, min(plan.chunk_rows, again)) if needs_weight else 0,
            product_bytes=_product_bytes(plan, mode, max(pieces, min(plan.chunk_rows, again)), needs_hidden),
            hidden_grad_bytes=needs_hidden * num_tokens * hidden_size * hidden.element_size(),
            weight_grad_bytes=needs_weight * weight.numel() * weight.element_size(),
            weight_sum_bytes=weight_sum_bytes,
            recomputes=is_differentiable and again > 0,
            weight_copy_bytes=copy_bytes,
            combined_bytes=combined_bytes,
        ),
    )


def _product_bytes(plan: Plan, mode: str, group_rows: int, needs_hidden: bool) -> int:
    """Bytes of the largest D W that is made at a time."""
    if mode == "stash":
        return product_bytes(plan, plan.chunk_rows, plan.hidden_parts(plan.chunk_rows), is_kept=True)
    rows = min(plan.hidden_piece(group_rows), group_rows)
    return needs_hidden * product_bytes(plan, rows, plan.hidden_parts(rows), is_kept=False)
