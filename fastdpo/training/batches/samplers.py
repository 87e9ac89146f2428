"""Batches of so many rows in an order of their own."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LikeLengthSampler(LengthGroupedSampler):
    """Random groups of rows of like length; the order of an epoch depends on seed and epoch alone.

    Args:
        group_size: rows of one group, sorted by length within a larger random draw.
        lengths: of every row.
    """

    def __init__(self, group_size: int, lengths: list[int], *, seed: int) -> None:
        super().__init__(group_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch, of a resumed run too."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)
