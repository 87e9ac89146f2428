"""From a mask over positions to the labelled ones, segment by segment: the one wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("fastdpo::labelled_positions", mutates_args=())
def labelled_positions(
    mask: Tensor, positions: Tensor, segment_ids: Tensor, num_segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The positions whose mask is set, in the order given, and where each segment of them begins.

    Args:
        mask: ``(M,)`` bool, by position.
        positions: ``(M,)`` int64, a permutation of 0..M-1 in which segments are contiguous and in order.
        segment_ids: ``(M,)`` int64, the segment of ``positions[i]``; never decreasing.
        num_segments: S.

    Returns:
        ``positions (N,)`` and ``segment_ids (N,)`` of the labelled ones, ``offsets (S + 1,)`` int64 on the
        device and the same on the host. N is known from the host's copy, so there is one synchronisation.
    """
    kept = mask.index_select(0, positions)
    counts = torch.zeros(num_segments + 1, dtype=torch.int64, device=mask.device)
    offsets = counts.index_add_(0, segment_ids + 1, kept.long()).cumsum(0)
    host_offsets = offsets.cpu()
    if host_offsets is offsets:
        host_offsets = offsets.clone()  # an op may not return one tensor twice
    found = torch.nonzero_static(kept, size=int(host_offsets[-1])).squeeze(1)
    return positions.index_select(0, found), segment_ids.index_select(0, found), offsets, host_offsets


@labelled_positions.register_fake
def _(
    mask: Tensor, positions: Tensor, segment_ids: Tensor, num_segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens = torch.library.get_ctx().new_dynamic_size()
    index = positions.new_empty(num_tokens)
    offsets = positions.new_empty(num_segments + 1)
    return index, torch.empty_like(index), offsets, torch.empty_like(offsets, device="cpu")
