"""Mode ``lean``, forward: the head in vocabulary slabs, when memory is all that counts; no autograd.

The other modes hold whole rows of logits, V wide. Here a block of rows meets one slab of the vocabulary at
a time, so that the workspace is bounded whatever V is. Forward pass: each slab's maximum and sums are
merged in order (``kernels/slab.py``), or, in Triton from 16-bit operands, the logits never leave the
registers. Backward pass (`fastdpo.ops.lean_backward`): with lse known, a slab's logits are recomputed, become
the slab's part of D where they are, and

    dhidden += D W_slab        dweight[slab] = D^T (g h)        dbias[slab] = sum of g D

so that each row of dweight is one full sum, written once, and dhidden is summed in fp32 over the slabs.

Only the row's coefficients a, b, c of (logp, lse, entropy) are left when there are gradients of lse or
entropy too: D is then the gradient of a logp + b lse + c entropy, with a, b, c divided by the largest of
them, and that takes the place of g. So D stays of order 1 in 16 bits whatever the loss is scaled by.

The plan gives the blocks: ``chunk_rows`` rows, ``leading_dim`` vocabulary entries (`fastdpo.plan_lean`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.kernels import slab as torch_slab
from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.slab import SlabSums
from fastdpo.kernels.topk import merge_top, no_top, top_sums, write_top
from fastdpo.ops.checks import accumulation_dtype, fail
from fastdpo.ops.head_call import HeadCall, TopkOutputs, empty_outputs, empty_topk, slice_outputs
from fastdpo.ops.lean_slabs import SlabWorkspace, check_logits_dtype, is_store_free, slabs, weight_slab
from fastdpo.schedule import MIB


def forward_lean(
    call: HeadCall,
    statistics: tuple[str, ...],
    k: int = 0,
    *,
    keeps_entropy: bool = False,
    workspace_mib: int = 512,
) -> tuple[RowOutputs, TopkOutputs | None, Tensor, Tensor | None]:
    """As ``forward_chunks``; what is kept is the entropy ``(N,)`` where it needs a gradient, else nothing.

    The k largest logits of every token are held, within ``workspace_mib`` beside the workspace itself.

    Raises:
        ValueError: logits of another dtype than the sums': there are none to be stored in it; or top-k
            statistics of logits that never leave the registers, or of too many tokens.
    """
    _check_topk(call, k, workspace_mib)
    topk = empty_topk(call, k)
    outputs = _score(call, statistics, topk)
    kept = call.hidden.new_empty(0, dtype=call.operand_dtype)
    if keeps_entropy and outputs.entropy is not None:
        kept = outputs.entropy.clone()  # an op may not return one tensor twice
    if call.ref_hidden is None:
        return outputs, topk, kept, None
    return outputs, topk, kept, _score(replace(call, hidden=call.ref_hidden), ()).logps


def _score(call: HeadCall, statistics: tuple[str, ...], topk: TopkOutputs | None = None) -> RowOutputs:
    """Log-probabilities, lse and the statistics asked for, compact ``(N,)``; no logits in memory, or few."""
    check_logits_dtype(call)
    outputs = empty_outputs(call, statistics)
    if call.plan.num_tokens == 0:
        return outputs
    if is_store_free(call.backend, call.compute_dtype):
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
        return outputs

    _, slope = torch_slab.value_and_slope(call.transform)
    blocks = call.plan.chunks()
    sums = [torch_slab.no_sums(outputs.lse, stop - start, statistics) for start, stop in blocks]
    top = None if topk is None else no_top(outputs.lse, call.plan.num_tokens, topk.k, call.transform)
    workspace = SlabWorkspace(call)
    for first, last in slabs(call):
        weight = weight_slab(call, first, last)
        for i, (start, stop) in enumerate(blocks):
            logits = workspace.logits(call.rows(start, stop), weight)
            if top is not None:
                merge_top(top[start:stop], logits, call.transform, first)
            labels = call.labels[start:stop]
            part = torch_slab.slab_sums(logits, labels, call.transform, first, statistics)
            sums[i] = torch_slab.merged(sums[i], part, slope)
    whole = _concatenated(sums)
    torch_slab.write_outputs(whole, call.labels, call.plan.vocab_size, slope, outputs)
    if topk is not None and top is not None:
        for start, stop in blocks:  # one at a time, for what is made of the k values
            part_of, best = topk.slice(start, stop), top_sums(top[start:stop], call.transform)
            write_top(best, outputs.lse[start:stop], part_of.mass, part_of.entropy)
    return outputs


def _concatenated(sums: list[SlabSums]) -> SlabSums:
    columns = zip(*sums, strict=True)
    whole = (None if column[0] is None else torch.cat(column) for column in columns)
    return SlabSums(*whole)  # type: ignore[arg-type]


def _check_topk(call: HeadCall, k: int, workspace_mib: int) -> None:
    if k == 0:
        return
    if is_store_free(call.backend, call.compute_dtype):
        wanted = "another mode, or backend 'reference': the kernel of mode 'lean' stores no logits to look at"
        raise fail("outputs", "a top-k statistic", wanted)
    num_bytes = call.plan.num_tokens * k * accumulation_dtype(call.compute_dtype).itemsize
    if num_bytes > workspace_mib * MIB:
        got = f"{k}, the logits of which are {num_bytes} bytes for all tokens in mode 'lean'"
        raise fail("topk", got, f"no more than workspace_mib holds, {workspace_mib} MiB")
