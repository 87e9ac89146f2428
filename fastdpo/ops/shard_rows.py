"""Rows that each rank has of its own, for a head of which each rank has a part: all rows go to all parts.

The weight stays where it is. Forward, labelled hidden states and labels are gathered from all ranks, every
part of the vocabulary sees them all, and a rank keeps the results of its own tokens. Backward, the gradients
of these are gathered, each part makes its share of dhidden for all rows, and the shares are summed where the
rows came from. So dW of a part is that of the sum of all ranks' losses. Ranks have unlike numbers of rows:
what moves is padded to the most of any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RankRows:
    """The rows and tokens of all ranks, as numbers on the host.

    Args:
        rows, tokens: of each rank.
    """

    group: Any
    rows: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def own_tokens(self) -> slice:
        first = sum(self.tokens[: self.rank])
        return slice(first, first + self.tokens[self.rank])


def rank_rows(num_rows: int, num_tokens: int, device: torch.device, group: Any) -> RankRows:
    """What every rank has; one exchange, which the host waits for."""
    mine = torch.tensor([num_rows, num_tokens], device=device)
    said = mine.new_empty(2 * dist.get_world_size(group))
    dist.all_gather_into_tensor(said, mine, group=group)
    rows, tokens = said.view(-1, 2).T.tolist()
    return RankRows(group, tuple(rows), tuple(tokens))


def all_rows(states: Tensor, of: RankRows) -> Tensor:
    """``(sum of rows, H)`` of each rank's ``(rows, H)``; the gradient is summed over the ranks."""
    gathered: Tensor = _AllRows.apply(states, of)
    return gathered


def all_tokens(values: Tensor, of: RankRows) -> Tensor:
    """``(sum of tokens, ...)`` of each rank's ``(tokens, ...)``, without a gradient."""
    return _gathered(values, of.tokens, of.group)


def own_tokens(values: Tensor, of: RankRows) -> Tensor:
    """A rank's tokens of ``(sum of tokens, k)``, which are the same on all; the gradient is all ranks'."""
    own: Tensor = _OwnTokens.apply(values, of)
    return own


def _gathered(values: Tensor, sizes: tuple[int, ...], group: Any) -> Tensor:
    """``(sum of sizes, ...)`` of each rank's first dimension of ``sizes``."""
    longest = max(sizes)
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    whole = values.new_empty(len(sizes) * longest, *values.shape[1:])
    if whole.numel():
        dist.all_gather_into_tensor(whole, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(whole.split(max(longest, 1)), sizes, strict=False)])


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, of: RankRows) -> Tensor:
        ctx.of = of
        return _gathered(states, of.rows, of.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        of: RankRows = ctx.of
        longest, size = max(of.rows), grad.shape[1]
        padded = grad.new_zeros(len(of.rows), longest, size)
        for part, piece in zip(padded, grad.split(of.rows), strict=True):
            part[: len(piece)] = piece
        summed = grad.new_empty(longest, size)
        if summed.numel():
            dist.reduce_scatter_tensor(summed, padded.view(-1, size), group=of.group)
        return summed[: of.rows[of.rank]], None


class _OwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, of: RankRows) -> Tensor:
        ctx.of = of
        return values[of.own_tokens].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.of.tokens, ctx.of.group), None
