"""Mode ``pairs``: loss and gradients of a batch in one pass over its chunks, no autograd.

dweight needs each token's g = (s / tau) dL/dlogp before it sums over tokens, and the loss of a row, which is
a pair, an answer, a list or a step, needs the log-probabilities of all of its tokens. So the D of whole rows
is held, about 4096 tokens of it, until their loss is known; then D W and D^T (g h) are made and it is given
back:

    chunk of logits --row kernel--> logp, D --group complete--> loss, g --> dhidden, dweight

Chunks are those of every other mode. Where a group ends within a chunk, the row kernel runs on its rows, the
group is finished, and the kernel goes on with the chunk's other rows in the same buffer. What is
longer than the buffer is scored without D, and computed again once its g is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastdpo.kernels.contract import RowOutputs
from fastdpo.ops.gradients import DGroup, Gradients, TokenGrads
from fastdpo.ops.head_call import HeadCall, LogitChunks, empty_d, empty_outputs, slice_outputs
from fastdpo.plan.schedule import RowGroup

# The loss of some rows, given (logps (n,), reference's logps (n,) or None, their group):
# its share of the batch's loss (), and dL/dlogp of every token (n,).
GroupLoss: TypeAlias = Callable[[Tensor, Tensor | None, RowGroup], tuple[Tensor, Tensor]]


class GroupedResults(NamedTuple):
    """What ``grouped_chunks`` returns; gradients are those of the loss itself, None where not needed."""

    loss: Tensor  # ()
    outputs: RowOutputs  # (N,) each
    ref_logps: Tensor | None  # (N,)
    token_grads: Tensor  # (N,) dL/dlogp
    dhidden: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def grouped_chunks(
    call: HeadCall,
    statistics: tuple[str, ...],
    group_loss: GroupLoss,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> GroupedResults:
    """All of a batch whose labelled rows come group by group, as ``call.plan.groups`` has them."""
    outputs = empty_outputs(call, statistics)
    ref_outputs = None if call.ref_hidden is None else empty_outputs(call, ())
    grads = TokenGrads(torch.empty_like(outputs.logps))
    weight = call.slabbed_weight()
    total = Gradients(call, weight, hidden=needs_hidden, bias=needs_bias, dweight=needs_weight)
    loss = outputs.logps.new_zeros((), dtype=torch.float64)  # rounded once, as in every other mode

    def settle(group: RowGroup) -> None:
        rows = slice(group.start, group.stop)
        ref_logps = None if ref_outputs is None else ref_outputs.logps[rows]
        share, grads.logps[rows] = group_loss(outputs.logps[rows], ref_logps, group)
        loss.add_(share)

    recomputes = any(group.is_recomputed for group in call.plan.groups)
    _run(LogitChunks(call, weight, keeps_d=recomputes), outputs, ref_outputs, grads, settle, total)
    # Only now, with D and the logits given back: a sum in fp32 is cast to a second (V, H) matrix.
    dhidden, dweight, dbias = total.results()
    ref_logps = None if ref_outputs is None else ref_outputs.logps
    return GroupedResults(
        loss.to(grads.logps.dtype), outputs, ref_logps, grads.logps, dhidden, dweight, dbias
    )


def _run(
    chunks: LogitChunks,
    outputs: RowOutputs,
    ref_outputs: RowOutputs | None,
    grads: TokenGrads,
    settle: Callable[[RowGroup], None],
    total: Gradients,
) -> None:
    """All chunks and groups; nothing of the size of logits or D outlives it."""
    call, plan = chunks.call, chunks.call.plan
    held = empty_d(call, plan.group_rows)
    for start, stop in plan.chunks():
        if ref_outputs is not None:
            chunks.score_reference(start, stop, slice_outputs(ref_outputs, start, stop))
        chunks.fill(start, stop)
        ended_long_ones = []
        for group, first, last in _pieces(plan.groups, start, stop):
            d_out = None if group.is_recomputed else held[first - group.start : last - group.start]
            chunks.run_kernel(first, last, slice_outputs(outputs, first, last), d_out=d_out)
            if last < group.stop:
                continue
            settle(group)
            if group.is_recomputed:
                ended_long_ones.append(group)
            else:
                d = held[: group.stop - group.start]
                total.add_group(DGroup(group.start, group.stop, d), outputs, grads)
        for group in ended_long_ones:  # only now: they need the workspace
            _recompute(chunks, group, outputs, grads, total)


def _pieces(groups: tuple[RowGroup, ...], start: int, stop: int) -> Iterator[tuple[RowGroup, int, int]]:
    """The parts of rows ``[start, stop)`` that lie in one group each."""
    for group in groups:
        first, last = max(start, group.start), min(stop, group.stop)
        if first < last:
            yield group, first, last


def _recompute(
    chunks: LogitChunks, group: RowGroup, outputs: RowOutputs, grads: TokenGrads, total: Gradients
) -> None:
    """The gradients of a group whose D was not held, a block at a time."""
    scratch = empty_outputs(chunks.call, ())
    for block in chunks.call.plan.blocks(group.start, group.stop):
        d = chunks.gradient_block(block, scratch)
        total.add_group(DGroup(block[0][0], block[-1][1], d), outputs, grads)
