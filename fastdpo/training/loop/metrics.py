"""Metrics as sums and counts: exact means over micro-batches of unequal size, and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class MetricSums:
    """Running (sum, count) per metric name, on the device of what is added, without a synchronisation.

    fp64 where the device has it, so that the mean of a long evaluation is right to the last digit.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add_mean(self, name: str, mean: Tensor, count: Tensor | int, *, is_share: bool = False) -> None:
        """Add ``count`` items whose mean is ``mean``, ``()``; ``is_share``: each item is 0 or 1."""
        dtype = _sum_dtype(mean.device)
        # Not as_tensor: that copies a number from the host, which waits for the device.
        if isinstance(count, int):
            items = mean.new_full((), count, dtype=dtype)
        else:
            items = count.to(mean.device, dtype)
        total = mean.detach().to(dtype) * items
        item = torch.stack([total.round() if is_share else total, items])
        self._sums[name] = item if name not in self._sums else self._sums[name] + item

    def means(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each metric over all ranks, whose sums ``over_ranks`` adds up; none without items.

        Every rank must have added the same names, of no items perhaps: ranks wait for each other.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = over_ranks(torch.stack([self._sums[name] for name in names])).tolist()
        return {name: total / count for name, (total, count) in zip(names, table, strict=True) if count > 0}

    def clear(self) -> None:
        """Forget everything."""
        self._sums.clear()

    def state(self) -> dict[str, list[float]]:
        """The sums as plain numbers, which JSON keeps to the last bit."""
        return {name: item.tolist() for name, item in self._sums.items()}

    def load(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Go on from what ``state`` returned."""
        dtype = _sum_dtype(device)
        self._sums = {name: torch.tensor(item, dtype=dtype, device=device) for name, item in state.items()}


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
