"""Batches of which each rank of a group computes a part of every row.

A batch is whole on each of the ranks. Which tokens predict which is settled before it is cut, so that nothing
is lost at a border. What the head makes of a rank's own tokens is added up to that of all tokens, of which
each rank differentiates its own: the gradients of the group add up to those of whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.integrations.backbone_config import why_no_neighbours
from fastdpo.integrations.forest.segments import Forest
from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.model import require_fused_output
from fastdpo.training.batches.batch import Padded, PaddedBatch
from fastdpo.types import LinearLogprobOutput, TokenLayout

_GROUPS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def split_sequences(model: nn.Module, group: Any) -> None:
    """From now on a model's tokens are scored in parts, by the ranks of a group together.

    Raises:
        ValueError: a model in which a token sees others than by attention, or by one of its own; says which.
    """
    reason = why_no_neighbours(model)
    if reason is not None:
        raise ValueError(f"sp_size: got {dist.get_world_size(group)}, and {reason}; wanted 1")
    _GROUPS[unwrap(model)] = group


def group_of(model: nn.Module) -> Any:
    """The ranks that score a model's tokens in parts; None where each scores whole rows."""
    return _GROUPS.get(unwrap(model)) if _GROUPS else None


def logps_in_parts(
    model: nn.Module, batch: Any, group: Any, statistics: tuple[str, ...]
) -> LinearLogprobOutput:
    """As `forward.token_logps`, of whole rows, each rank having computed a part of them."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    calls, tokens, mask = _rows_of(batch)
    parts, index = [], torch.zeros_like(tokens.token_index)
    is_own = torch.zeros_like(index, dtype=torch.bool)
    start = own_start = 0
    for call in calls:
        if others := call.keys() - {"input_ids", "position_ids", "forest"}:
            raise ValueError(f"sp_size: got {sorted(others)} beside a row's tokens, wanted 1")
        part, width = _part(call, size, rank, group)
        rows, length = call["input_ids"].shape
        row = (tokens.token_index - start).div(length, rounding_mode="floor")
        column = (tokens.token_index - start) % length
        is_here = (row >= 0) & (row < rows) & (column.div(width, rounding_mode="floor") == rank)
        index = index.where(~is_here, own_start + row * width + column - rank * width)
        is_own |= is_here
        parts.append(part)
        start, own_start = start + rows * length, own_start + rows * width
    (places,) = is_own.nonzero(as_tuple=True)
    layout = TokenLayout(index[places], tokens.target_ids[places], tokens.sequence_ids[places])
    out = require_fused_output(
        model(row_batches=parts, token_layout=layout, return_logps=True, logps_outputs=statistics)
    )
    found = {}
    for name in ("logps", *statistics):
        own = getattr(out, name)
        whole = _over_group(own.new_zeros(len(is_own)).index_put((places,), own), group)
        found[name] = whole if mask is None else whole.new_zeros(mask.shape).masked_scatter(mask, whole)
    return LinearLogprobOutput(**found)


def _over_group(own: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, each of which has the gradient of its own share."""
    total = own.detach().to(torch.uint8) if own.dtype == torch.bool else own.detach().clone()
    dist.all_reduce(total, group=group)
    return total.bool() if own.dtype == torch.bool else own + (total - own.detach())


def _rows_of(batch: Any) -> tuple[list[Mapping[str, Any]], TokenLayout, Tensor | None]:
    """A batch's calls, the tokens to score among their positions, and of padded ones where these stand."""
    if isinstance(batch, PaddedBatch):
        batch = batch.sequences
    if not isinstance(batch, Padded):  # rows without padding
        return list(batch.rows_of_calls), batch.tokens, None
    if batch.media is not None:
        raise ValueError("sp_size: got images in a batch, whose places in a row stay whole; wanted 1")
    ids, mask = batch.input_ids, batch.mask
    sequence, place = mask.nonzero(as_tuple=True)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    tokens = TokenLayout(sequence * ids.shape[1] + place - 1, batch.labels[mask], sequence)
    return [{"input_ids": ids, "position_ids": positions}], tokens, mask


def _part(call: Mapping[str, Any], size: int, rank: int, group: Any) -> tuple[dict[str, Any], int]:
    """This rank's part of a call's rows, and how many tokens of each it has."""
    length = call["input_ids"].shape[1]
    width = -(-length // size)
    more = width * size - length
    forest = call.get("forest") or Forest.of_sequences([length])
    if more:  # a sequence of its own, that nothing sees
        forest = Forest((*forest.lengths, more), (*forest.parents, -1))
    part: dict[str, Any] = {
        name: F.pad(call[name], (0, more))[:, rank * width : (rank + 1) * width]
        for name in ("input_ids", "position_ids")
    }
    return {**part, "forest": forest, "sequence_group": group}, width
