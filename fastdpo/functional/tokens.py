"""From labels and a layout to the labelled tokens of a batch, pair by pair.

Whatever the layout, everything downstream sees one flat order: the tokens of pair 0's chosen answer, of its
rejected answer, of pair 1's chosen answer, and so on. An answer is a segment of it, 2p for the chosen and
2p + 1 for the rejected one, and the tokens of a pair are neighbours, as mode ``pairs`` needs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.ops.compaction import labelled_positions
from fastdpo.plan.schedule import PairGroup
from fastdpo.types import PackedLayout, TokenLayout


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """Tokens of P pairs in pair order, N of them.

    Args:
        num_pairs: P.
        positions: ``(N,)`` int64, where each token's numbers are in the caller's flattened tensors.
        segment_ids: ``(N,)`` int64, 2p for pair p's chosen answer and 2p + 1 for its rejected one.
        offsets: ``(2P + 1,)`` int64, where the segments begin.
        in_answer: ``(N,)`` bool, the tokens that count; None for all.
        in_nll: ``(N,)`` bool, the tokens of an NLL term; None for those that count of the chosen answers.
    """

    num_pairs: int
    positions: Tensor
    segment_ids: Tensor
    offsets: Tensor
    in_answer: Tensor | None = None
    in_nll: Tensor | None = None

    def pick(self, values: Tensor) -> Tensor:
        """A per-token tensor of the caller's in this order, ``(N,)``."""
        return values.reshape(-1).index_select(0, self.positions)

    def of_group(self, group: PairGroup) -> AnswerTokens:
        """The tokens of a group of neighbouring pairs."""
        rows = slice(group.start, group.stop)
        segments = slice(2 * group.first_pair, 2 * group.last_pair + 1)
        return AnswerTokens(
            group.last_pair - group.first_pair,
            self.positions[rows],
            self.segment_ids[rows] - 2 * group.first_pair,
            self.offsets[segments] - group.start,
            None if self.in_answer is None else self.in_answer[rows],
            None if self.in_nll is None else self.in_nll[rows],
        )


@dataclass(frozen=True, eq=False)
class LabelledTokens(AnswerTokens):
    """The tokens that enter a matrix product, and what they are.

    Args:
        token_index: ``(N,)`` int64, rows of the flattened hidden states.
        target_ids: ``(N,)``, the tokens predicted.
        host_offsets: ``offsets`` on the host.
        index_kind: ``repeated`` where a row may predict several tokens, else ``tokens``.
    """

    token_index: Tensor = None  # type: ignore[assignment]
    target_ids: Tensor = None  # type: ignore[assignment]
    host_offsets: Tensor = None  # type: ignore[assignment]
    index_kind: str = "tokens"


def all_tokens(mask: Tensor, nll_mask: Tensor | None, layout: PackedLayout | None) -> AnswerTokens:
    """Every position of a padded ``(2P, T)`` or packed ``(N_all,)`` batch; the masks say which count.

    Nothing here waits for the device.
    """
    tokens = _pair_order(mask, layout)
    picked = None if nll_mask is None else tokens.pick(nll_mask)
    return replace(tokens, in_answer=tokens.pick(mask), in_nll=picked)


def labelled_tokens(
    labels: Tensor,
    nll_labels: Tensor | None,
    layout: PackedLayout | None,
    *,
    shift: bool,
    ignore_index: int,
) -> LabelledTokens:
    """The labelled tokens of a padded or packed batch; waits for the device once, to learn how many.

    Args: as those of ``fused_dpo_loss``, checked.
    """
    targets, mask, nll_mask = _targets(labels, nll_labels, layout, shift, ignore_index)
    order = _pair_order(labels, layout)
    wanted = mask if nll_mask is None else mask | nll_mask
    positions, segment_ids, offsets, host_offsets = labelled_positions(
        wanted.reshape(-1), order.positions, order.segment_ids, 2 * order.num_pairs
    )
    tokens = LabelledTokens(
        order.num_pairs,
        positions,
        segment_ids,
        offsets,
        token_index=positions,
        target_ids=targets.reshape(-1).index_select(0, positions),
        host_offsets=host_offsets,
    )
    if nll_mask is None:
        return tokens
    return replace(tokens, in_answer=tokens.pick(mask), in_nll=tokens.pick(nll_mask))


def layout_tokens(layout: TokenLayout, num_pairs: int) -> LabelledTokens:
    """The tokens of a ``TokenLayout`` of P pairs; without its ``lengths`` this waits for the device."""
    segments = _segment_of(layout.sequence_ids, num_pairs)
    positions = segments.argsort(stable=True)
    counts = torch.zeros(2 * num_pairs + 1, dtype=torch.int64, device=segments.device)
    offsets = counts.index_add_(0, segments + 1, torch.ones_like(segments)).cumsum(0)
    if layout.lengths is None:
        host_offsets = offsets.cpu()
    else:
        chosen, rejected = layout.lengths[:num_pairs], layout.lengths[num_pairs:]
        by_pair = (count for both in zip(chosen, rejected, strict=True) for count in both)
        host_offsets = torch.tensor(list(accumulate(by_pair, initial=0)))
    return LabelledTokens(
        num_pairs,
        positions,
        segments.index_select(0, positions),
        offsets,
        token_index=layout.token_index.index_select(0, positions),
        target_ids=layout.target_ids.index_select(0, positions),
        host_offsets=host_offsets,
        index_kind="repeated",
    )


def layout_pairs(layout: TokenLayout) -> int:
    """P; read from the sequence ids, which waits for the device, where the lengths do not tell it."""
    if layout.lengths is not None:
        return len(layout.lengths) // 2
    num_sequences = int(layout.sequence_ids.max()) + 1 if len(layout.sequence_ids) else 0
    return -(-num_sequences // 2)


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


def batch_pairs(tokens: Tensor, layout: PackedLayout | None) -> int:
    """P of a padded or packed batch."""
    return (len(tokens) if layout is None else len(layout.cu_seqlens) - 1) // 2


def _targets(
    labels: Tensor, nll_labels: Tensor | None, layout: PackedLayout | None, shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(targets, mask, nll_mask)``: what each state predicts, and which of it the losses look at."""
    if shift:
        labels = shift_labels(labels, layout=layout, ignore_index=ignore_index)
    mask = labels != ignore_index
    if nll_labels is None:
        return labels, mask, None
    if shift:
        nll_labels = shift_labels(nll_labels, layout=layout, ignore_index=ignore_index)
    position = torch.arange(len(labels), device=labels.device)
    num_pairs = batch_pairs(labels, layout)
    if layout is None:
        is_chosen = (position < num_pairs).unsqueeze(1)
    else:
        is_chosen = position < layout.cu_seqlens.narrow(0, num_pairs, 1)
    nll_mask = (nll_labels != ignore_index) & is_chosen
    return labels.where(mask, nll_labels.where(nll_mask, ignore_index)), mask, nll_mask


def _pair_order(tokens: Tensor, layout: PackedLayout | None) -> AnswerTokens:
    """All positions of a padded or packed batch in pair order."""
    num_pairs = batch_pairs(tokens, layout)
    every = torch.arange(tokens.numel(), device=tokens.device)
    if layout is None:
        length = tokens.shape[1]
        positions = every.view(2, num_pairs, length).transpose(0, 1).reshape(-1)
        offsets = torch.arange(2 * num_pairs + 1, device=tokens.device) * length
        return AnswerTokens(num_pairs, positions, every // max(length, 1), offsets)
    bounds = layout.cu_seqlens.long()
    # The number of sequences that end at or before a position is the sequence it lies in.
    sequence = torch.searchsorted(bounds.narrow(0, 1, len(bounds) - 1), every, right=True)
    segments = _segment_of(sequence, num_pairs)
    positions = segments.argsort(stable=True)
    lengths = bounds.diff().view(2, num_pairs).t().reshape(-1)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    return AnswerTokens(num_pairs, positions, segments.index_select(0, positions), offsets)


def _segment_of(sequence: Tensor, num_pairs: int) -> Tensor:
    """Sequence s, chosen 0..P-1 and rejected P..2P-1, to its segment in pair order."""
    return 2 * (sequence % max(num_pairs, 1)) + sequence // max(num_pairs, 1)
