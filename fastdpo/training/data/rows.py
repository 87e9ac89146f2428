"""Raw rows as the rest of the room takes them: all of them at hand, or as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NumberedRows = Iterator[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class RowSource:
    """Raw rows that are at hand.

    Args:
        numbers: of the rows, for messages; from 1.
        name: of the place they come from.
        fingerprint: says which rows these are; None where nothing does but they themselves.
    """

    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]
    name: str
    fingerprint: str | None = None

    def __iter__(self) -> NumberedRows:
        return zip(self.numbers, self.rows, strict=True)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class RowStream:
    """Raw rows that are read as they are used, in their order, from the start each time; with their numbers.

    Args:
        start: begins to read.
        name: of the place they come from.
    """

    start: Callable[[], NumberedRows]
    name: str

    def __iter__(self) -> NumberedRows:
        return self.start()


def numbered(rows: Sequence[Mapping[str, Any]], name: str, fingerprint: str | None = None) -> RowSource:
    """Rows counted from 1."""
    return RowSource(rows, range(1, len(rows) + 1), name, fingerprint)


def counted(rows: Callable[[], Iterable[Mapping[str, Any]]], name: str) -> RowStream:
    """What can be gone through, counted from 1. Raises ValueError where that fails, and for no rows."""

    def start() -> NumberedRows:
        number = 0
        try:
            for number, row in enumerate(rows(), start=1):
                yield number, row
        except Exception as error:
            if str(error).startswith(name):  # says it all
                raise
            raise ValueError(f"{name}, after row {number}: the stream ends early: {error}") from error
        if not number:
            raise ValueError(f"{name}: no rows")

    return RowStream(start, name)


def is_stream(data: Any) -> bool:
    """Whether rows can be gone through, but not counted: a ``RowStream``, a ``datasets.IterableDataset``; or
    splits whose ``train`` is one."""
    if isinstance(data, Mapping):
        return "train" in data and is_stream(data["train"])
    is_countable = hasattr(data, "__len__") or hasattr(data, "__next__")
    return isinstance(data, RowStream) or (hasattr(data, "__iter__") and not is_countable)
