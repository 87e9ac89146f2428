"""What became of a data set's rows, in one line. Every message about data names rows as the file has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastdpo.training.data.row_numbers import row_list, row_name
from fastdpo.training.settings.row_checks import CHECKS


@dataclass(frozen=True)
class DataReport:
    """What became of the rows.

    Args:
        source: the data's name.
        rows, kept: how many there are, and are used.
        skipped: rows left out, by the message of the check.
        found: rows mended, named or allowed to stay, by the name of the check.
        details: more on the first row of a check, by its message.
        truncated, duplicates: rows cut to ``max_length``, and repeats of other rows.
        unit: of the rows.
        parts: rows of the loss, where a row of the file makes several.
        unscored: tokens in answers that are not the assistant's.
        unused: columns that nothing looks at.
    """

    source: str
    rows: int
    kept: int
    skipped: Mapping[str, Sequence[int]] = field(default_factory=dict)
    found: Mapping[str, Sequence[int]] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    truncated: int = 0
    duplicates: int = 0
    unit: str = "pairs"
    parts: int | None = None
    unscored: int = 0
    unused: Sequence[str] = ()

    @property
    def merged(self) -> Sequence[int]:
        """Rows whose prompt ends otherwise once an answer follows."""
        return self.found.get("merged", [])

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to look at."""
        return not (self.skipped or self.found or self.duplicates)

    @property
    def num_skipped(self) -> int:
        """Rows of which something is left out."""
        return len({row for rows in self.skipped.values() for row in rows})

    @property
    def share_skipped(self) -> float:
        """Of the rows, those of which something is left out."""
        return self.num_skipped / max(self.rows, 1)

    def __str__(self) -> str:
        line = f"{self.source}: {self.kept} of {self.rows} {self.unit} kept"
        if self.parts is not None and self.parts != self.kept:
            line += f", which make {self.parts}"
        for message, numbers in self.skipped.items():
            line += f"; skipped {self._rows_with(message, numbers)}"
        if self.truncated:
            line += f"; {self.truncated} truncated"
        for name, numbers in self.found.items():
            line += f"; {self._rows_with(CHECKS[name].message, numbers)}"
        if self.unscored:
            line += f"; {self.unscored} tokens of answers not scored"
        if self.duplicates:
            line += f"; {self.duplicates} repeated {self.unit} kept"
        if self.unused:
            line += f"; columns not used: {', '.join(self.unused)}"
        return line

    @staticmethod
    def row_name(number: int) -> str:
        """A row of the report's data as messages name it."""
        return row_name(number)

    def _rows_with(self, message: str, numbers: Sequence[int]) -> str:
        detail = ""
        if message in self.details:
            detail = f"{': ' if len(numbers) == 1 else '; the first: '}{self.details[message]}"
        return f"{len(numbers)} with {message} ({row_list(numbers)}{detail})"
