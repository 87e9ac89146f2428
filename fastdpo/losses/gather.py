"""The pairs of all ranks as one batch, for losses whose scope is the batch (AOT)."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.losses.inputs import PairLogps


def gather_pairs(pair: PairLogps, group: dist.ProcessGroup | None = None) -> PairLogps:
    """Every rank's pairs; gradients flow to this rank's own. One collective for the counts, one for the rest.

    Ranks may have different numbers of pairs: the shorter are padded with pairs that have no token, which
    count nowhere. All ranks compute the same loss, and each gets the gradient of its own pairs, so gradients
    have to be summed over ranks; where they are averaged (DDP), multiply the loss by the number of ranks.

    Args:
        pair: this rank's pairs; the same fields are None on every rank.
        group: the process group; None: the default one.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    world = dist.get_world_size(group)
    names = [item.name for item in fields(pair) if getattr(pair, item.name) is not None]
    own = torch.stack([getattr(pair, name) for name in names])  # (F, P)
    count = torch.tensor([own.shape[1]], device=own.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group=group)
    largest = int(torch.cat(counts).max())
    padded = torch.nn.functional.pad(own, (0, largest - own.shape[1]))
    parts: list[Tensor] = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = padded  # with its gradient
    return replace(pair, **dict(zip(names, torch.cat(parts, 1), strict=True)))
