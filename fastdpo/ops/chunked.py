"""The chunk loops of the head: labelled rows in, log-probabilities and gradients out, no autograd.

One chunk goes  h (C, H) --GEMM--> x (C, V) --row kernel--> logp, lse, D  and, when asked for,  D W (C, H).
The logits live in one workspace that every chunk reuses. D stays there (``stash``, recomputation) or is
written into the cache. The algebra is in DESIGN section 2; what becomes of D is in ``gradients.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.matmul import SlabbedWeight, hidden_grad_into
from fastdpo.ops.gradients import DGroup, Gradients, TokenGrads, label_row_coeff, row_coeff
from fastdpo.ops.head_call import (
    HeadCall,
    LogitChunks,
    TopkOutputs,
    empty_d,
    empty_outputs,
    empty_topk,
    slice_outputs,
)
from fastdpo.plan.memory import hidden_scratch_rows


def forward_chunks(
    call: HeadCall, statistics: tuple[str, ...], k: int = 0
) -> tuple[RowOutputs, TopkOutputs | None, Tensor, Tensor | None]:
    """All chunks of the forward pass.

    Args:
        call: what to compute, and how.
        statistics: names of what the row kernel makes beside log-probabilities and lse.
        k: of the top-k statistics; 0 for none.

    Returns:
        The compact outputs, those of the k most likely tokens, what the mode keeps for the backward pass
        (``stash`` D W ``(N, H)``, ``cache`` the D of the first rows ``(cached, V)``, else an empty tensor),
        and the log-probabilities ``(N,)`` of the reference where the call has one.
    """
    plan = call.plan
    outputs = empty_outputs(call, statistics)
    topk = empty_topk(call, k)
    ref_outputs = None if call.ref_hidden is None else empty_outputs(call, ())
    is_stash = plan.mode == "stash"
    chunks = LogitChunks(call, keeps_d=is_stash)
    kept = empty_kept(call)
    for block in plan.blocks() if is_stash else [[chunk] for chunk in plan.chunks()]:
        first, last = block[0][0], block[-1][1]
        if is_stash:
            d = chunks.gradient_block(block, outputs, topk=topk)
            hidden_grad_into(kept[first:last], d, chunks.weight, plan.hidden_parts(last - first))
        else:
            chunks.process(
                first,
                last,
                slice_outputs(outputs, first, last),
                d_out=kept[first:last] if last <= plan.cached_rows else None,
                topk=None if topk is None else topk.slice(first, last),
            )
        if ref_outputs is not None:
            for start, stop in block:
                chunks.score_reference(start, stop, slice_outputs(ref_outputs, start, stop))
    return outputs, topk, kept, None if ref_outputs is None else ref_outputs.logps


def empty_kept(call: HeadCall, count: int = 1) -> Tensor:
    """Memory for what a forward pass keeps; rows of D are further apart than V where V is odd.

    ``(N, H)`` where D W is, ``(cached, V)`` in mode ``cache``, else ``(0,)``; with ``count`` above 1 as many
    of them, one behind the other in one tensor.
    """
    plan, several = call.plan, (count,) if count > 1 else ()
    if plan.mode == "cache":
        return empty_d(call, *several, plan.cached_rows)
    shape = (plan.num_tokens, plan.hidden_size) if plan.keeps_product else (0,)
    return call.hidden.new_empty((*several, *shape), dtype=call.operand_dtype)


def backward_chunks(
    call: HeadCall,
    kept: Tensor,
    outputs: RowOutputs,
    grads: TokenGrads,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    grad_weight_out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dhidden (M, H), dweight (V, H), dbias (V,))`` in their inputs' dtypes; None where not needed.

    ``kept`` is read, never written: a second backward pass finds it as the first did.
    """
    weight = call.slabbed_weight()
    total = Gradients(
        call,
        weight,
        hidden=needs_hidden,
        bias=needs_bias,
        dweight=needs_weight,
        weight_out=grad_weight_out,
        adds_label_rows=grads.lse is not None,
    )
    if call.plan.keeps_product:
        backward_stash(call, kept, outputs, grads, total)
    else:
        add_groups(total, d_groups(call, weight, kept, grads), outputs, grads)
    return total.results()


def add_groups(total: Gradients, groups: Iterable[DGroup], outputs: RowOutputs, grads: TokenGrads) -> None:
    """All groups of a call. On return nothing refers to their D: its memory is free for the results."""
    for group in groups:
        total.add_group(group, outputs, grads)


def backward_stash(
    call: HeadCall, kept: Tensor, outputs: RowOutputs, grads: TokenGrads, total: Gradients
) -> None:
    """dhidden = g (D W), with D W from the forward pass: no product at all, and few passes over the rows."""
    num_tokens = call.plan.num_tokens
    coeff = row_coeff(call, grads, 0, num_tokens)
    label_coeff = None if grads.lse is None else label_row_coeff(call, outputs, grads, 0, num_tokens)
    step = hidden_scratch_rows(1, kept.shape[1] * kept.element_size())
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        label_part = None if label_coeff is None else label_coeff[rows]
        total.put_scaled(rows.start, rows.stop, kept[rows], coeff[rows], label_part)


def d_groups(call: HeadCall, weight: SlabbedWeight, kept: Tensor, grads: TokenGrads) -> Iterator[DGroup]:
    """The rows in groups with their D: the cached ones first, then block by block what is recomputed."""
    plan = call.plan
    if plan.cached_rows:
        yield DGroup(0, plan.cached_rows, kept)
    if plan.cached_rows == plan.num_tokens:
        return
    chunks = LogitChunks(call, weight, keeps_d=True)
    scratch = empty_outputs(call, ("entropy",) if grads.entropy is not None else ())
    coeffs = None
    if grads.entropy is not None:
        lse = torch.zeros_like(grads.logps) if grads.lse is None else grads.lse
        coeffs = torch.stack((grads.logps, lse, grads.entropy)) * call.transform.grad_scale
    for block in plan.blocks(plan.cached_rows):
        d = chunks.gradient_block(block, scratch, grad_coeffs=coeffs)
        yield DGroup(block[0][0], block[-1][1], d, is_scaled=coeffs is not None)
