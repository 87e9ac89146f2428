"""Per-token numbers -> one number per sequence, for padded and packed batches.

``sequence_sums``, ``sequence_means``, ``weighted_sums`` and ``segment_sums`` add up; ``ld_weights`` and
``suffix_weights`` are weights for the third. All are linear: dL/dl_t is a_t dL/ds.

Deterministic (no atomics) and without a host synchronisation. The sums are taken in fp64 and rounded
once: ``torch.segment_reduce`` adds one token after the other, which over 100,000 tokens of -0.1 nats
loses 1.4 nats in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.stable import token_mean


def sequence_sums(values: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum ``values`` over the masked tokens of each sequence.

    Args:
        values: ``(B, T)`` padded, or ``(N_all,)`` packed; floating point. May be NaN where masked away.
        mask: bool, the shape of ``values``: the tokens that count.
        cu_seqlens: None for padded, else ``(B + 1,)`` integers on the same device, from 0 to N_all and
            never decreasing. Not validated here: reading them would synchronise.

    Returns:
        ``(B,)`` in the dtype of ``values``; an empty sequence gives 0.
    """
    kept = values.where(mask, 0)
    if cu_seqlens is None:
        sums = kept.sum(-1, dtype=torch.float64)
    else:
        sums = torch.segment_reduce(kept.double(), "sum", offsets=cu_seqlens.long(), unsafe=True)
    return sums.to(values.dtype)


def check_cu_seqlens(cu_seqlens: Tensor, lengths: tuple[int, ...] | None, tokens: Tensor) -> None:
    """Raise ValueError unless the bounds are B + 1 integers that fit ``tokens`` ``(N_all,)``.

    Their values are checked where that is free: against ``lengths``, or on the CPU. On a device they are
    taken on trust.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"layout.cu_seqlens: got shape {tuple(cu_seqlens.shape)}, wanted (B + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"layout.cu_seqlens: got {cu_seqlens.dtype}, wanted int32 or int64")
    if cu_seqlens.device != tokens.device:
        raise ValueError(
            f"layout.cu_seqlens: got {cu_seqlens.device}, wanted {tokens.device}, the batch's device"
        )
    if lengths is not None:
        got, wanted = (len(lengths), sum(lengths)), (len(cu_seqlens) - 1, len(tokens))
        if got != wanted or min(lengths, default=0) < 0:
            raise ValueError(f"layout.lengths: got (count, sum) {got}, wanted {wanted}, none negative")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != len(tokens) or bounds != sorted(bounds):
            raise ValueError(f"layout.cu_seqlens: got {bounds}, wanted it to rise from 0 to {len(tokens)}")


def sequence_means(values: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The mean of ``values`` over the masked tokens of each sequence, ``(B,)``; 0 for an empty one."""
    counts = sequence_sums(mask.to(values.dtype), mask, cu_seqlens)
    return token_mean(sequence_sums(values, mask, cu_seqlens), counts)


def weighted_sums(values: Tensor, weights: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """sum_t a_t values_t over the masked tokens of each sequence, ``(B,)``; no gradient for the weights.

    Values and weights may be NaN where masked away.
    """
    return sequence_sums(values * weights.detach().where(mask, 0), mask, cu_seqlens)


def segment_sums(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Sum ``values`` over the tokens of each segment, several to a sequence: items of a list, steps.

    Deterministic, unlike ``index_add``: a stable sort by segment, then sums of consecutive tokens.

    Args:
        values: any shape; floating point.
        segment_ids: the same shape, integers below ``num_segments``; a negative one belongs to no segment,
            and its value may be NaN.
        num_segments: how many sums to return; a segment without a token gives 0.

    Returns:
        ``(num_segments,)`` in the dtype of ``values``.

    Raises:
        ValueError: shapes that differ, or (on the CPU, where reading them is free) an id that is too large.
    """
    if values.shape != segment_ids.shape:
        raise ValueError(
            f"segment_ids: got shape {tuple(segment_ids.shape)}, wanted {tuple(values.shape)}, as values"
        )
    ids = segment_ids.reshape(-1).long()
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= num_segments:
        raise ValueError(f"segment_ids: got {int(ids.max())}, wanted less than {num_segments}")
    # What belongs to no segment sorts into one behind the others, which is then left out.
    ids = ids.where(ids >= 0, num_segments)
    order = torch.argsort(ids, stable=True)
    bounds = torch.searchsorted(ids[order], torch.arange(num_segments + 2, device=ids.device))
    kept = values.reshape(-1).where(ids < num_segments, 0).double()[order]
    sums = torch.segment_reduce(kept, "sum", offsets=bounds, unsafe=True)
    return sums.narrow(0, 0, num_segments).to(values.dtype)


def ld_weights(mask: Tensor, alpha: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """LD-DPO's token weights: 1 up to the shorter answer's length, ``alpha`` on the longer one's excess.

    For ``token_weights``: reference and policy are weighted alike, so the reference is needed per token.

    Args:
        mask: bool ``(2P, T)``, or ``(N_all,)`` with ``cu_seqlens``: the answers' tokens, chosen first.
        alpha: in [0, 1]: 1 is DPO, 0 cuts both answers to their shared length; the paper has 0.3 to 0.6.
        cu_seqlens: ``(2P + 1,)`` or None.

    Returns:
        fp32, the shape of ``mask``; 0 where masked away.

    Raises:
        ValueError: ``alpha`` out of range, or an odd number of sequences.

    Source: arXiv:2409.06411.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha!r}, wanted a number in [0, 1]")
    position = _Positions(mask, cu_seqlens)
    shared = torch.minimum(*position.counts.view(2, -1)).repeat(2)
    weights = torch.where(position.rank < shared[position.sequence], 1.0, float(alpha))
    return weights.where(position.mask, 0.0).view(mask.shape)


def suffix_weights(labels: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """1 from the first token in which the two answers of a pair differ, 0 before: step-level preferences.

    The shared beginning cancels in a difference of sums; this also takes it out of lengths and means.

    Args:
        labels: integers, the shape of ``mask``: the tokens.
        mask: bool ``(2P, T)``, or ``(N_all,)`` with ``cu_seqlens``: the answers' tokens, chosen first.
        cu_seqlens: ``(2P + 1,)`` or None.

    Returns:
        fp32, the shape of ``mask``; all 0 for an answer that the other one begins with.
    """
    if labels.shape != mask.shape:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, wanted {tuple(mask.shape)}, as mask")
    position = _Positions(mask, cu_seqlens)
    num_pairs = len(position.counts) // 2
    starts = position.counts.cumsum(0) - position.counts
    # The answers' tokens one behind the other, so that the k-th of any sequence can be looked up. What is
    # masked away is written to a place of its own, which nobody reads.
    slot = (starts[position.sequence] + position.rank).where(position.mask, len(position.mask))
    compact = torch.zeros(len(position.mask) + 1, dtype=torch.long, device=mask.device)
    compact.scatter_(0, slot, labels.reshape(-1).long())
    partner = (position.sequence + num_pairs) % max(2 * num_pairs, 1)
    has_partner = position.rank < position.counts[partner]
    other = compact[(starts[partner] + position.rank).where(has_partner, 0)]
    differs = position.mask & ~(has_partner & (other == labels.reshape(-1)))
    never = len(position.mask)
    first = torch.full((max(num_pairs, 1),), never, device=mask.device)
    pair = position.sequence % max(num_pairs, 1)
    first = first.scatter_reduce(0, pair, position.rank.where(differs, never), "amin")
    return (position.mask & (position.rank >= first[pair])).float().view(mask.shape)


class _Positions:
    """Where each token stands: its sequence, and its rank among the masked tokens there; flattened."""

    def __init__(self, mask: Tensor, cu_seqlens: Tensor | None) -> None:
        self.mask = mask.reshape(-1)
        if cu_seqlens is None:
            cu_seqlens = torch.arange(len(mask) + 1, device=mask.device) * mask.shape[-1]
        bounds = cu_seqlens.long()
        if len(bounds) % 2 == 0:
            raise ValueError(f"mask: got {len(bounds) - 1} sequences, wanted chosen and rejected answers")
        position = torch.arange(len(self.mask), device=mask.device)
        self.sequence = torch.searchsorted(bounds, position, right=True) - 1
        before = F.pad(self.mask.long().cumsum(0), (1, 0))  # masked tokens before each position
        self.rank = before[:-1] - before[bounds][self.sequence]
        self.counts = before[bounds].diff()
