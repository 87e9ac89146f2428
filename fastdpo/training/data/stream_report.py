"""What became of a stream's rows so far: counts, and the first row numbers of each, however many rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from fastdpo.training.data.encode import check_share
from fastdpo.training.data.report import DataReport

_SHOWN = 10


class FirstNumbers(Sequence[int]):
    """How many numbers there were, and the first ten of them."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.total = 0

    def add(self, numbers: Sequence[int]) -> None:
        """Count some more."""
        self.first += numbers[: _SHOWN - len(self.first)]
        self.total += len(numbers)

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: Any) -> Any:
        return self.first[place]


class StreamReport:
    """Of one pass of a stream, as far as it has come.

    Args:
        source: the stream's name.
        unit: of its rows.
    """

    def __init__(self, source: str, unit: str) -> None:
        self.source, self.unit = source, unit
        self.rows = self.kept = self.parts = self.truncated = self.unscored = self.num_skipped = 0
        self.skipped: dict[str, FirstNumbers] = {}
        self.found: dict[str, FirstNumbers] = {}
        self.details: dict[str, str] = {}

    def add(self, part: DataReport) -> None:
        """Count the next rows."""
        for name in ("rows", "kept", "truncated", "unscored", "num_skipped"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.parts += part.kept if part.parts is None else part.parts
        for counts, more in ((self.skipped, part.skipped), (self.found, part.found)):
            for name, numbers in more.items():
                counts.setdefault(name, FirstNumbers()).add(numbers)
        self.details = {**part.details, **self.details}

    def check(self, limit: float | None, rows: int) -> None:
        """Raise ValueError where more than ``limit``, a share, is left out, once ``rows`` rows are read."""
        if self.rows >= rows:
            check_share(self, self.num_skipped / max(self.rows, 1), limit)

    def __str__(self) -> str:
        counts: Iterable[str] = ("rows", "kept", "skipped", "found", "details", "truncated", "unscored")
        said = {name: getattr(self, name) for name in counts}
        return str(DataReport(self.source, **said, unit=self.unit, parts=self.parts))
