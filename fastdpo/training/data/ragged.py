"""Several numbers for each of many rows, in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """Several numbers for each of R rows: ``values`` ``(N,)``, those of row i at ``offsets[i:i + 2]``."""

    values: Tensor
    offsets: Tensor

    @classmethod
    def of_counts(cls, values: Tensor, counts: Tensor) -> Ragged:
        """Rows of ``counts`` ``(R,)`` numbers each, one row after the other."""
        return cls(values, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Ragged:
        """Rows as lists of numbers."""
        counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return cls.of_counts(torch.tensor([x for row in rows for x in row], dtype=dtype), counts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def counts(self) -> Tensor:
        """``(R,)`` numbers of each row."""
        return self.offsets.diff()

    def places(self, rows: Tensor) -> Tensor:
        """Where the numbers of ``rows`` stand, row after row."""
        counts = self.counts[rows]
        starts = counts.cumsum(0) - counts
        return torch.arange(int(counts.sum())) + (self.offsets[rows] - starts).repeat_interleave(counts)

    def subset(self, rows: Tensor) -> Ragged:
        """The rows named, in that order."""
        return Ragged.of_counts(self.values[self.places(rows)], self.counts[rows])

    def parted(self) -> tuple[Tensor, Ragged]:
        """Of rows of at least one number the first ``(R,)``, and the others."""
        is_first = torch.zeros(len(self.values), dtype=torch.bool)
        is_first[self.offsets[:-1]] = True
        return self.values[is_first], Ragged.of_counts(self.values[~is_first], self.counts - 1)

    def sums(self) -> Tensor:
        """``(R,)``."""
        total = torch.cat([self.values.new_zeros(1), self.values.cumsum(0)])
        return total[self.offsets].diff()

    def largest(self) -> Tensor:
        """``(R,)``; 0 for a row without numbers."""
        rows = torch.arange(len(self)).repeat_interleave(self.counts)
        return self.values.new_zeros(len(self)).scatter_reduce(0, rows, self.values, "amax")
