"""From labels and a layout to the tokens of a batch, row by row.

Whatever the layout and the losses, everything downstream sees one flat order. A **segment** has a
log-probability of its own: it is an answer, or a piece of one (``segment_ids``). A **row** is what the losses
judge: a pair, an answer, a list, a step. The segments of a row are neighbours, a pair's chosen answer before
its rejected one, so that a group of rows, as mode ``pairs`` needs it, is a range of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastdpo.ops.compaction import labelled_positions
from fastdpo.ops.sequence import sequence_sums_op
from fastdpo.plan.schedule import RowGroup
from fastdpo.types import PackedLayout, TokenLayout


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Where the caller's S segments stand, and which of them make a row.

    Args:
        num_segments: S.
        order: ``(S,)`` int64, the caller's number of the segment at each place; None: as they come.
        bounds: ``(rows + 1,)`` int64, row r has the places ``[bounds[r], bounds[r + 1])``; on the host but
            for lists, whose sizes are the device's to tell.
        in_pairs: whether rows are chosen and rejected answers.
    """

    num_segments: int
    order: Tensor | None
    bounds: Tensor
    in_pairs: bool = False

    @classmethod
    def of_answers(cls, num_segments: int) -> RowOrder:
        """Every segment is a row."""
        return cls(num_segments, None, torch.arange(num_segments + 1))

    @classmethod
    def of_pairs(cls, num_segments: int, device: torch.device) -> RowOrder:
        """Segments 0..P-1 are the chosen answers, P..2P-1 the rejected ones."""
        order = torch.arange(num_segments, device=device).view(2, -1).t().reshape(-1)
        return cls(num_segments, order, torch.arange(0, num_segments + 1, 2), in_pairs=True)

    @classmethod
    def of_lists(cls, group_ids: Tensor, num_lists: int) -> RowOrder:
        """Candidates by their list's number, in a list as they come."""
        order = group_ids.argsort(stable=True)
        lists = torch.arange(num_lists + 1, device=group_ids.device)
        return cls(len(group_ids), order, torch.searchsorted(group_ids.index_select(0, order), lists))

    def arranged(self, values: Tensor) -> Tensor:
        """``(S, ...)`` from the caller's order to this one."""
        return values if self.order is None else values.index_select(0, self.order)

    def as_given(self, values: Tensor) -> Tensor:
        """``(S,)`` from this order to the caller's."""
        return values if self.order is None else torch.empty_like(values).index_copy_(0, self.order, values)

    def places(self, segments: Tensor) -> Tensor:
        """The places of some of the caller's segments, by their numbers; S, that of none, is its own."""
        if self.order is None:
            return segments
        every = torch.arange(self.num_segments, device=segments.device)
        return F.pad(self.as_given(every), (0, 1), value=self.num_segments).index_select(0, segments)


@dataclass(frozen=True, eq=False)
class RowTokens:
    """N tokens, segment by segment.

    Args:
        num_segments: S.
        positions: ``(N,)`` int64, where each token's numbers are in the caller's flattened tensors.
        segment_ids: ``(N,)`` int64, the place of its segment, never decreasing; S for a token of none.
        offsets: ``(S + 1,)`` int64, where the segments begin; one more where there are tokens of none.
        in_answer: ``(N,)`` bool, the tokens that count; None for all.
        in_nll: ``(N,)`` bool, the tokens of an NLL term; None for those that count of the chosen answers.
        host_offsets: ``offsets`` on the host; None: nobody has waited for the device yet.
        group: the ranks over which the sequences are split, each with its part of the tokens; None: whole.
    """

    num_segments: int
    positions: Tensor
    segment_ids: Tensor
    offsets: Tensor
    in_answer: Tensor | None = None
    in_nll: Tensor | None = None
    host_offsets: Tensor | None = None
    group: Any = None

    def pick(self, values: Tensor) -> Tensor:
        """A per-token tensor of the caller's in this order, ``(N,)``."""
        return values.reshape(-1).index_select(0, self.positions)

    def sums(self, values: Tensor, where: Tensor | None) -> Tensor:
        """``(S,)``: per-token values summed over each segment's tokens, all or those ``where``."""
        # The op itself: its offsets were made here and need no check.
        sums = sequence_sums_op(values, None, where, self.offsets, self.segment_ids, "auto")
        sums = sums if len(sums) == self.num_segments else sums.narrow(0, 0, self.num_segments)
        return sums if self.group is None else _SumOverRanks.apply(sums, self.group)

    def lengths(self, where: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``(S,)``: the number of tokens of each segment, all or those ``where``."""
        if where is not None:
            return self.sums(where.to(dtype), None)
        starts, stops = (self.offsets.narrow(0, first, self.num_segments) for first in (0, 1))
        lengths = (stops - starts).to(dtype)
        return lengths if self.group is None else _SumOverRanks.apply(lengths, self.group)

    def loss_rows(self, order: RowOrder) -> tuple[Tensor, Tensor]:
        """On the host: where the rows' tokens begin, and their segments, ``(rows + 1,)`` each."""
        segments = order.bounds.cpu()
        offsets = self.offsets.cpu() if self.host_offsets is None else self.host_offsets
        return offsets.index_select(0, segments), segments

    def of_group(self, group: RowGroup, first: int, last: int) -> RowTokens:
        """The tokens of a group of neighbouring rows, whose segments are ``[first, last)``."""
        rows = slice(group.start, group.stop)
        places, offsets = self.segment_ids[rows] - first, self.offsets[first : last + 1] - group.start
        masks = (None if mask is None else mask[rows] for mask in (self.in_answer, self.in_nll))
        return RowTokens(last - first, self.positions[rows], places, offsets, *masks)


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' values, of which each rank makes the same loss and differentiates its own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def all_tokens(
    like: Tensor, order: RowOrder, layout: PackedLayout | TokenLayout | None, segment_ids: Tensor | None
) -> RowTokens:
    """Every position of a batch shaped as ``like``, those of no segment last. Nothing here waits.

    Args:
        segment_ids: aligned with ``like``; None: a sequence is a segment.
    """
    num_segments = num_places = order.num_segments
    if segment_ids is None and not isinstance(layout, TokenLayout):
        # Whole sequences move, so that nothing has to be sorted.
        every = torch.arange(like.numel(), device=like.device)
        if layout is None:
            bounds = offsets = torch.arange(num_segments + 1, device=like.device) * like.shape[-1]
        else:
            bounds = offsets = layout.cu_seqlens.long()
        if order.order is not None:
            offsets = F.pad(order.arranged(bounds.diff()).cumsum(0), (1, 0))
        # The number of segments that end at or before a place is the segment it lies in.
        ids = torch.searchsorted(offsets.narrow(0, 1, num_segments), every, right=True)
        if order.order is not None:
            starts, moved = (each.narrow(0, 0, num_segments) for each in (offsets, bounds))
            every = every + (order.arranged(moved) - starts).index_select(0, ids)
        return RowTokens(num_segments, every, ids, offsets)
    if segment_ids is not None:  # one place more, for the tokens of none
        ids = segment_ids.reshape(-1).long()
        num_places, ids = num_segments + 1, ids.where(ids >= 0, num_segments)
    else:
        ids = layout.sequence_ids  # type: ignore[union-attr]
    ids = order.places(ids)
    positions = ids.argsort(stable=True)
    counts = torch.zeros(num_places + 1, dtype=torch.int64, device=like.device)
    offsets = counts.index_add_(0, ids + 1, torch.ones_like(ids)).cumsum(0)
    return RowTokens(num_segments, positions, ids.index_select(0, positions), offsets)


def labelled_tokens(
    labels: Tensor,
    wanted: Tensor | None,
    order: RowOrder,
    layout: PackedLayout | TokenLayout | None,
    segment_ids: Tensor | None,
) -> RowTokens:
    """Those that are ``wanted`` and lie in a segment; waits for the device once, to learn how many.

    Not for all tokens of a ``TokenLayout`` (``wanted`` None, no segments): these are as many as there are.
    """
    tokens = all_tokens(labels, order, layout, segment_ids)
    if segment_ids is not None:
        wanted = segment_ids >= 0 if wanted is None else wanted & (segment_ids >= 0)
    if wanted is None:
        assert isinstance(layout, TokenLayout)
        if layout.lengths is None or (order.order is not None and not order.in_pairs):
            return tokens
        lengths = torch.tensor(layout.lengths, dtype=torch.int64)
        if order.in_pairs:
            lengths = lengths.view(2, -1).t().reshape(-1)
        return replace(tokens, host_offsets=F.pad(lengths.cumsum(0), (1, 0)))
    num_places = len(tokens.offsets) - 1
    found = labelled_positions(wanted.reshape(-1), tokens.positions, tokens.segment_ids, num_places)
    positions, places, *both = found
    offsets, host_offsets = (bounds.narrow(0, 0, tokens.num_segments + 1) for bounds in both)
    return RowTokens(tokens.num_segments, positions, places, offsets, host_offsets=host_offsets)


def find_targets(
    labels: Tensor, nll_labels: Tensor | None, layout: PackedLayout | None, shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(targets, mask, nll_mask)``: what each state predicts, and which of it the losses look at.

    Args: as those of ``fused_dpo_loss``; labels of an NLL term count in the first half of the sequences.
    """
    if shift:
        labels = shift_labels(labels, layout=layout, ignore_index=ignore_index)
    mask = labels != ignore_index
    if nll_labels is None:
        return labels, mask, None
    if shift:
        nll_labels = shift_labels(nll_labels, layout=layout, ignore_index=ignore_index)
    num_pairs, position = num_sequences(labels, layout) // 2, torch.arange(len(labels), device=labels.device)
    is_chosen = position < (num_pairs if layout is None else layout.cu_seqlens.narrow(0, num_pairs, 1))
    nll_mask = (nll_labels != ignore_index) & (is_chosen.unsqueeze(1) if layout is None else is_chosen)
    return labels.where(mask, nll_labels.where(nll_mask, ignore_index)), mask, nll_mask


def shift_labels(labels: Tensor, *, layout: PackedLayout | None = None, ignore_index: int = -100) -> Tensor:
    """The token that each position predicts: ``labels`` moved left by one within each sequence.

    Args:
        labels: ``(B, T)``, or ``(N_all,)`` with a ``layout``; aligned with the input ids.

    Returns:
        The same shape; ``ignore_index`` at every sequence's last position.
    """
    return next_token(labels, ignore_index, layout)


def next_token(values: Tensor, fill: int, layout: PackedLayout | None) -> Tensor:
    """``values[t + 1]`` at t, and ``fill`` at every sequence's last position."""
    num_positions = values.shape[-1]
    following = F.pad(values, (0, 1), value=fill).narrow(-1, 1, num_positions)
    if layout is None:
        return following
    # An empty sequence starts where the next one does, so starts may repeat and may equal N_all.
    is_start = values.new_zeros(num_positions + 1, dtype=torch.bool)
    is_start.index_fill_(0, layout.cu_seqlens.long(), True)
    return following.masked_fill(is_start.narrow(0, 1, num_positions), fill)


def num_sequences(like: Tensor, layout: PackedLayout | TokenLayout | None) -> int:
    """B; of a ``TokenLayout`` without lengths read from its ids, which waits for the device."""
    if isinstance(layout, TokenLayout):
        if layout.lengths is not None:
            return len(layout.lengths)
        return count_ids(layout.sequence_ids)
    return len(like) if layout is None else len(layout.cu_seqlens) - 1


def count_ids(ids: Tensor) -> int:
    """The largest id and one, for which the device is waited for."""
    return int(ids.max()) + 1 if ids.numel() else 0
