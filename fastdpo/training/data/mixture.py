"""Several sources as one: one after the other, or each with a share of the rows."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from fastdpo.training.data.row_numbers import file_index, number_in
from fastdpo.training.data.rows import NumberedRows, RowSource, RowStream

logger = logging.getLogger(__name__)


def joined(parts: Sequence[RowSource], name: str, weights: Sequence[float] | None = None) -> RowSource:
    """All rows of the parts, or so many that each part has its share of them and none repeats.

    Args:
        parts: the rows, at least one of each.
        weights: a share for each part, of any sum. As many rows are taken as the part allows that runs out
            first; those of the others are spread evenly over them.

    Raises:
        ValueError: a part without rows, or given twice, or weights that do not fit; names it.
    """
    _check_parts(parts, weights)
    for part in parts:
        if not len(part):
            raise ValueError(f"{part.name}: no rows, wanted some of every part of {name}")
    sizes = [len(part) for part in parts]
    counts = sizes if weights is None else _counts(parts, sizes, weights)
    if weights is not None:
        shares = [
            f"{count} of {len(part)} rows of {part.name}" for part, count in zip(parts, counts, strict=True)
        ]
        logger.info("%s: %s", name, ", ".join(shares))
    if len(parts) == 1:
        return parts[0]
    files = [file_index(part.name) for part in parts]
    numbers = _Joined([part.numbers for part in parts], counts, lambda place, n: number_in(files[place], n))
    prints = [part.fingerprint for part in parts]
    fingerprint = None if None in prints else f"{prints} {counts}"
    return RowSource(_Joined([part.rows for part in parts], counts), numbers, name, fingerprint)


def joined_streams(
    parts: Sequence[RowStream], name: str, weights: Sequence[float] | None = None
) -> RowStream:
    """The parts one after the other; or in turn, each as often as its weight says, until one has ended.

    Raises:
        ValueError: as ``joined``; a part without rows when it is reached.
    """
    _check_parts(parts, weights)
    if len(parts) == 1:
        return parts[0]
    files = [file_index(part.name) for part in parts]

    def start() -> NumberedRows:
        streams = [iter(part) for part in parts]
        if weights is None:
            for file, stream in zip(files, streams, strict=True):
                yield from ((number_in(file, number), row) for number, row in stream)
            return
        for place in _in_turn(weights):
            found = next(streams[place], None)
            if found is None:
                return
            yield number_in(files[place], found[0]), found[1]

    return RowStream(start, name)


def _check_parts(parts: Sequence[RowSource | RowStream], weights: Sequence[float] | None) -> None:
    names = [part.name for part in parts]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"dataset: got {twice[0]} twice, wanted it once; dataset_weights gives it a share")
    if weights is None:
        return
    if len(weights) != len(parts):
        raise ValueError(
            f"dataset_weights: got {len(weights)} for {len(parts)} sources ({', '.join(names)}), "
            "wanted one each"
        )
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"dataset_weights: got {weight!r} for {name}, wanted a number above 0")


def _counts(parts: Sequence[RowSource], sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows of each part make the largest mixture of these shares without a repeat."""
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [min(round(weight * scale), size) for size, weight in zip(sizes, weights, strict=True)]
    for part, count, weight in zip(parts, counts, weights, strict=True):
        if not count:
            raise ValueError(
                f"dataset_weights: got {weight:g} for {part.name}, which leaves none of its {len(part)} rows "
                f"in a mixture of {sum(counts)}: leave it out, or give it more"
            )
    return counts


def _in_turn(weights: Sequence[float]) -> Iterator[int]:
    """Places of parts without end: next comes the part that is furthest behind its share."""
    taken = [0] * len(weights)
    while True:
        place = min(range(len(weights)), key=lambda k: ((taken[k] + 0.5) / weights[k], k))
        taken[place] += 1
        yield place


class _Joined(Sequence[Any]):
    """Sequences one after the other, so many items of each, spread evenly over it.

    Args:
        made: of a sequence's place and an item, what is to be in the item's place.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Any]],
        counts: Sequence[int],
        made: Callable[[int, Any], Any] = lambda place, item: item,
    ) -> None:
        self.parts, self.counts, self.made = parts, counts, made
        self.ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]  # the IndexError of a list, and its count from the end
        place = bisect_right(self.ends, index)
        part, count = self.parts[place], self.counts[place]
        return self.made(place, part[(index - self.ends[place] + count) * len(part) // count])

    def __iter__(self) -> Iterator[Any]:
        for place, (part, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            # Whole parts are read in larger pieces than item by item.
            items = part if count == len(part) else (part[k * len(part) // count] for k in range(count))
            yield from (self.made(place, item) for item in items)
