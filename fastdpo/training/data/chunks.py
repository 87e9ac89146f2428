"""Numbers of many rows one after the other, in chunks that may be memory-mapped."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Chunks:
    """A few tensors one after the other, asked for as if they were one. No row spans two of them.

    Args:
        chunks: ``(n,)`` each, all of one dtype.
    """

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        self.chunks = [chunk for chunk in chunks if len(chunk)] or list(chunks[:1])
        self.starts = [0, *accumulate(map(len, self.chunks))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, place: slice) -> Tensor:
        k = min(bisect_right(self.starts, place.start), len(self.chunks)) - 1
        return self.chunks[k][place.start - self.starts[k] : place.stop - self.starts[k]]

    def largest(self) -> int:
        """Of all numbers."""
        return max(int(chunk.max()) for chunk in self.chunks)

    def sums(self, starts: Tensor, sizes: Tensor) -> Tensor:
        """Of each range ``(R,)``, which lies in one chunk, the sum of its numbers."""
        which = torch.bucketize(starts, torch.tensor(self.starts[1:]), right=True).clamp(
            max=len(self.chunks) - 1
        )
        found = torch.zeros_like(starts)
        ranges = which.argsort().split(which.bincount(minlength=len(self.chunks)).tolist())
        for first, chunk, rows in zip(self.starts, self.chunks, ranges, strict=False):
            before = torch.cat([torch.zeros(1, dtype=torch.int64), chunk.cumsum(0)])
            at = starts[rows] - first
            found[rows] = before[at + sizes[rows]] - before[at]
        return found
