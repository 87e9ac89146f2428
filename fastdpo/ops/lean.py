"""Mode ``lean``, forward: the head in vocabulary slabs, when memory is all that counts; no autograd.

The other modes hold whole rows of logits, V wide. Here a block of rows meets one slab of the vocabulary at
a time, so that the workspace is bounded whatever V is, and what a slab gives is merged with the slabs before
(`fastdpo.ops.lean_merge`): maximum and sums, or a row kernel's results of the slab as a vocabulary. Where the
workspace is small, Triton makes the sums from 16-bit operands without storing a logit.

With a frozen head the slabs' D is at hand, relative to their own logsumexp. Their products with W add up to

    D W = sum over slabs of  e^(lse_slab - lse) D_slab W_slab  +  (1 - e^(lse_own - lse)) cf_y W_y

with the running lse in the place of lse, so that each further slab rescales what is there; ``own`` is the
slab of the label, and 1 - e^(lse_own - lse) the sum of the others' shares. That is all that the backward pass
needs, as in mode ``stash``: two products. Otherwise it makes the logits again (`fastdpo.ops.lean_backward`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.topk import merge_top, no_top, top_sums, write_top
from fastdpo.ops.checks import accumulation_dtype, fail
from fastdpo.ops.chunked import empty_kept
from fastdpo.ops.head_call import HeadCall, TopkOutputs, empty_outputs, empty_topk, slice_outputs
from fastdpo.ops.lean_merge import ProductSum, SlabLabels, load_block, slab_starts
from fastdpo.ops.lean_slabs import SlabWorkspace, check_logits_dtype, slabs, weight_slab
from fastdpo.plan.schedule import MIB


def forward_lean(
    call: HeadCall,
    statistics: tuple[str, ...],
    k: int = 0,
    *,
    keeps_entropy: bool = False,
    workspace_mib: int = 512,
) -> tuple[RowOutputs, TopkOutputs | None, Tensor, Tensor | None]:
    """As ``forward_chunks``; what is kept is D W ``(N, H)`` where the plan keeps it, or the entropy ``(N,)``
    where it needs a gradient, else nothing.

    The k largest logits of every token of a block are held, within ``workspace_mib`` beside the workspace.

    Raises:
        ValueError: logits of another dtype than the sums': there are none to be stored in it; or top-k
            statistics of logits that never leave the registers, or of too many tokens.
    """
    check_logits_dtype(call)
    _check_topk(call, k, workspace_mib)
    topk = empty_topk(call, k)
    kept = empty_kept(call)
    outputs = empty_outputs(call, statistics)
    score_rows(call, outputs, statistics, topk, kept if call.plan.keeps_product else None)
    if keeps_entropy and outputs.entropy is not None:
        kept = outputs.entropy.clone()  # an op may not return one tensor twice
    if call.ref_hidden is None:
        return outputs, topk, kept, None
    ref_outputs = empty_outputs(call, ())
    score_rows(replace(call, hidden=call.ref_hidden), ref_outputs, ())
    return outputs, topk, kept, ref_outputs.logps


def score_rows(
    call: HeadCall,
    outputs: RowOutputs,
    statistics: tuple[str, ...],
    topk: TopkOutputs | None = None,
    kept: Tensor | None = None,
) -> None:
    """Writes the results of all rows, and to ``kept (N, H)`` their D W; no logits in memory, or few."""
    plan = call.plan
    if plan.num_tokens == 0:
        return
    if plan.score_slab == 0:
        _score_store_free(call, outputs)
        return
    workspace = SlabWorkspace(call, plan.score_rows, plan.score_slab)
    starts = slab_starts(call)
    for start in range(0, plan.num_tokens, plan.score_rows):
        stop = min(start + plan.score_rows, plan.num_tokens)
        _score_block(
            call,
            workspace,
            starts,
            start,
            stop,
            slice_outputs(outputs, start, stop),
            statistics,
            None if topk is None else topk.slice(start, stop),
            None if kept is None else kept[start:stop],
        )


def _score_block(
    call: HeadCall,
    workspace: SlabWorkspace,
    starts: Tensor,
    start: int,
    stop: int,
    outputs: RowOutputs,
    statistics: tuple[str, ...],
    topk: TopkOutputs | None,
    kept: Tensor | None,
) -> None:
    """One block of rows against all slabs of the vocabulary, in order."""
    rows, labels = call.rows(start, stop), call.labels[start:stop]
    where = SlabLabels(call, labels, starts)
    block = load_block(call, labels, where, statistics)
    product = None if kept is None else ProductSum(call, kept, where)
    top = None if topk is None else no_top(outputs.lse, stop - start, topk.k, call.transform)
    for first, last in slabs(call, call.plan.score_slab):
        weight = weight_slab(call, first, last)
        logits = workspace.logits(rows, weight)
        if top is not None:  # first: a kernel may overwrite the logits
            merge_top(top, logits, call.transform, first)
        d = None if product is None else workspace.d_in_place(logits)
        lse = block.add(logits, first, d)
        if product is not None and d is not None:
            product.add(d, weight, lse)
    block.write(outputs)
    if product is not None:
        product.finish(outputs, call.safe_labels(start, stop))
    if topk is not None and top is not None:
        write_top(top_sums(top, call.transform), outputs.lse, topk.mass, topk.entropy)


def _score_store_free(call: HeadCall, outputs: RowOutputs) -> None:
    """By the kernel whose logits never leave the registers, some rows a launch."""
    from fastdpo.kernels.lean_triton import lean_logprobs

    hidden, weight = (
        matrix.to(call.compute_dtype) if matrix.dtype == torch.float64 else matrix
        for matrix in (call.hidden, call.weight)
    )
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()  # once, and not for every launch
    for start in range(0, call.plan.num_tokens, call.plan.score_rows):
        stop = min(start + call.plan.score_rows, call.plan.num_tokens)
        lean_logprobs(
            hidden if call.index is not None else hidden[start:stop],
            weight,
            None if call.index is None else call.index[start:stop],
            call.labels[start:stop],
            call.transform,
            slice_outputs(outputs, start, stop),
            call.compute_dtype,
        )


def _check_topk(call: HeadCall, k: int, workspace_mib: int) -> None:
    if k == 0 or call.plan.num_tokens == 0:
        return
    if call.plan.score_slab == 0:
        wanted = (
            "another mode, a larger workspace_mib, or backend 'reference': the kernel that mode 'lean' takes "
            f"in {workspace_mib} MiB stores no logits to look at"
        )
        raise fail("outputs", "a top-k statistic", wanted)
    num_rows = call.plan.score_rows
    num_bytes = num_rows * k * accumulation_dtype(call.compute_dtype).itemsize
    if num_bytes > workspace_mib * MIB:
        got = f"{k}, the logits of which are {num_bytes} bytes for {num_rows} tokens in mode 'lean'"
        raise fail("topk", got, f"no more than workspace_mib holds, {workspace_mib} MiB")
