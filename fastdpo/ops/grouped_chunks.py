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
from fastdpo.ops.head_call import (
    HeadCall,
    LogitChunks,
    TopkOutputs,
    empty_d,
    empty_outputs,
    empty_topk,
    slice_outputs,
)
from fastdpo.plan.schedule import RowGroup

# The loss of some rows, given (logps (n,), reference's logps (n,) or None, their group):
# its share of the batch's loss (), and dL/dlogp of every token (n,).
GroupLoss: TypeAlias = Callable[[Tensor, Tensor | None, RowGroup], tuple[Tensor, Tensor]]


# Where ranks have parts of the vocabulary: what a part has found, of policy and reference, with the largest
# logit's probability, and its labels, to results over the whole vocabulary by name, and to the part's weight.
Join: TypeAlias = Callable[[RowOutputs, RowOutputs | None, TopkOutputs | None, Tensor], dict[str, Tensor]]


class GroupedResults(NamedTuple):
    """What ``grouped_chunks`` returns; gradients are those of the loss itself, None where not needed."""

    loss: Tensor  # ()
    outputs: RowOutputs  # (N,) each
    ref_logps: Tensor | None  # (N,)
    token_grads: Tensor  # (N,) dL/dlogp; of a part (4, N), that, dL/dlse, and the part's own logps and lse
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
    join: Join | None = None,
) -> GroupedResults:
    """All of a batch whose labelled rows come group by group, as ``call.plan.groups`` has them.

    With ``join`` the weight is a part of the vocabulary: ranks meet once for each group, and ``dhidden`` is
    this part's share.
    """
    found = _Found(call, statistics, is_part=join is not None)
    outputs, grads = found.outputs, found.grads
    weight = call.slabbed_weight()
    total = Gradients(
        call,
        weight,
        hidden=needs_hidden,
        bias=needs_bias,
        dweight=needs_weight,
        adds_label_rows=join is not None,
    )
    loss = outputs.logps.new_zeros((), dtype=torch.float64)  # rounded once, as in every other mode

    def settle(group: RowGroup) -> None:
        rows = slice(group.start, group.stop)
        if join is not None:
            of_part = found.part(group.start, group.stop)
            made = join(*of_part, call.labels[rows])
            found.keep(rows, made)
        share, token_grads = group_loss(*found.logps(rows), group)
        loss.add_(share)
        if join is None:
            grads.logps[rows] = token_grads
        else:
            assert grads.lse is not None
            # The label's logit is its owner's logp + lse; of the whole lse each part has a share.
            grads.logps[rows] = token_grads.where(call.labels[rows] >= 0, 0)
            grads.lse[rows] = grads.logps[rows] - token_grads * made["weight"]

    recomputes = any(group.is_recomputed for group in call.plan.groups)
    _run(LogitChunks(call, weight, keeps_d=recomputes), found, settle, total)
    # Only now, with D and the logits given back: a sum in fp32 is cast to a second (V, H) matrix.
    dhidden, dweight, dbias = total.results()
    whole, ref_logps, token_grads = found.results()
    return GroupedResults(loss.to(grads.logps.dtype), whole, ref_logps, token_grads, dhidden, dweight, dbias)


class _Found:
    """What a pass over the chunks finds for each token; of a part of the vocabulary, and of all of it."""

    def __init__(self, call: HeadCall, statistics: tuple[str, ...], *, is_part: bool) -> None:
        self.outputs = self.whole = empty_outputs(call, statistics)
        self.ref_outputs = None if call.ref_hidden is None else empty_outputs(call, ())
        self.ref_logps = None if self.ref_outputs is None else self.ref_outputs.logps
        self.topk: TopkOutputs | None = None
        self.grads = TokenGrads(torch.empty_like(self.outputs.logps))
        if is_part:
            self.whole = empty_outputs(call, statistics)
            self.ref_logps = None if self.ref_logps is None else torch.empty_like(self.ref_logps)
            self.topk = empty_topk(call, int("is_top1" in statistics))
            self.grads = TokenGrads(*(torch.empty_like(self.outputs.logps) for _ in range(2)))

    def part(self, start: int, stop: int) -> tuple[RowOutputs, RowOutputs | None, TopkOutputs | None]:
        """Of labelled rows ``[start, stop)`` what the part has."""
        ref_outputs = None if self.ref_outputs is None else slice_outputs(self.ref_outputs, start, stop)
        topk = None if self.topk is None else self.topk.slice(start, stop)
        return slice_outputs(self.outputs, start, stop), ref_outputs, topk

    def keep(self, rows: slice, made: dict[str, Tensor]) -> None:
        """Results over the whole vocabulary."""
        for name, value in self.whole._asdict().items():
            if value is not None:
                value[rows] = made[name]
        if self.ref_logps is not None:
            self.ref_logps[rows] = made["ref_logps"]

    def logps(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.whole.logps[rows], None if self.ref_logps is None else self.ref_logps[rows]

    def results(self) -> tuple[RowOutputs, Tensor | None, Tensor]:
        grads, parts = self.grads, self.outputs
        if grads.lse is None:
            return self.whole, self.ref_logps, grads.logps
        return self.whole, self.ref_logps, torch.stack([grads.logps, grads.lse, parts.logps, parts.lse])


def _run(
    chunks: LogitChunks,
    found: _Found,
    settle: Callable[[RowGroup], None],
    total: Gradients,
) -> None:
    """All chunks and groups; nothing of the size of logits or D outlives it."""
    call, plan = chunks.call, chunks.call.plan
    outputs, grads = found.outputs, found.grads
    held = empty_d(call, plan.group_rows)
    for start, stop in plan.chunks():
        if found.ref_outputs is not None:
            chunks.score_reference(start, stop, slice_outputs(found.ref_outputs, start, stop))
        chunks.fill(start, stop)
        ended_long_ones = []
        for group, first, last in _pieces(plan.groups, start, stop):
            d_out = None if group.is_recomputed else held[first - group.start : last - group.start]
            of_piece, _, topk = found.part(first, last)
            chunks.run_kernel(first, last, of_piece, d_out=d_out, topk=topk)
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
