"""Rows that are made into tokens as they are read, and forgotten: for data that do not fit on a disk.

What has to be known of the data at the start comes from the stream's first rows, its *head*: which columns
it has, whether prompts are repeated, how long rows are. One part of the rows after the other then goes the
way that rows at hand go, so every check, message and number is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

from torch import Tensor

from fastdpo.training.data.columns import ColumnSelection, check_object
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import RowEncoder
from fastdpo.training.data.mismatched import with_mismatched
from fastdpo.training.data.model_fit import StreamFit
from fastdpo.training.data.report import DataReport
from fastdpo.training.data.row import Answer, Row
from fastdpo.training.data.row_numbers import row_name
from fastdpo.training.data.rows import RowSource, RowStream
from fastdpo.training.data.stream_report import StreamReport

logger = logging.getLogger(__name__)

HEAD_ROWS = 1000
# Rows that are tokenised at once.
PART_ROWS = 256


def head_of(stream: RowStream) -> RowSource:
    """The first rows of a stream. Raises ValueError where it has none, or breaks."""
    first = list(islice(stream, HEAD_ROWS))
    if not first:
        raise ValueError(f"{stream.name}: no rows")
    return RowSource([row for _, row in first], [number for number, _ in first], stream.name)


@dataclass(eq=False)
class StreamDataset:
    """Rows of a stream, tokenised as they come; gone through as often as they are asked for.

    Args:
        stream: of raw rows.
        head: its first rows, tokenised.
        encoder: tokenises rows as those of the head.
        selection: of their columns.
        check: holds some of them to the settings.
        num_head: raw rows that the head was made of.
    """

    stream: RowStream
    head: RowDataset
    encoder: RowEncoder
    selection: ColumnSelection
    check: Callable[[RowDataset], None]
    num_head: int
    epoch: float = field(default=0.0, init=False)
    """How often the rows were trained on: 0 until it is known how many there are."""
    num_rows: int | None = field(default=None, init=False)
    """Of a pass, without those left out; None until one has come to the end."""
    report: StreamReport | DataReport = field(init=False)
    """Of the first pass, so far; before it the head's."""

    def __post_init__(self) -> None:
        self.report = self.head.report
        if self.num_head < HEAD_ROWS:
            self.num_rows = len(self.head)

    @property
    def has_reference(self) -> bool:
        """Whether the rows carry reference log-probabilities."""
        return self.head.has_reference

    @cached_property
    def _encoder(self) -> RowEncoder:
        # A part ends where the next begins, so mismatched answers are put in behind it.
        return replace(self.encoder, wanted=replace(self.encoder.wanted, has_mismatched=False))

    def rows(self, fit: StreamFit | None = None) -> Iterator[Row]:
        """One pass: the rows in their order, without those that are left out.

        Args:
            fit: holds them to the models.

        Raises:
            ValueError: a row that ``encode_rows``, the settings or the models refuse; more left out than
                ``max_bad_rows``; the stream breaks, or gives nothing. Names the row.
        """
        rows = self._tokenised(fit)
        if not self.head.has_mismatched:
            yield from rows
            return
        for row in with_mismatched(rows, self.encoder.options.max_length, self.stream.name):
            if fit is not None:
                fit.check_row(row, self.stream.name)
            yield row

    def _tokenised(self, fit: StreamFit | None) -> Iterator[Row]:
        report = StreamReport(self.stream.name, self.head.report.unit)
        if self.num_rows is None:
            self.report = report
        said, next_word = 0, 2 * HEAD_ROWS
        for source in self._parts():
            part, found = self._encoder.part(source)
            report.add(found)
            report.check(self.encoder.options.max_bad_rows, self.num_head)
            # Rarer and rarer, and only where there is something new.
            if report.rows >= next_word:
                next_word = 2 * report.rows
                if report.num_skipped > said:
                    said = report.num_skipped
                    logger.warning("so far: %s", str(report))
            if part is not None:
                self._check(part)
                if fit is not None:
                    fit.check_part(part)
                yield from (_by_itself(part[place]) for place in range(len(part)))
        if not report.parts:
            raise ValueError(f"{report}: no {report.unit.removesuffix('s')} left")
        if self.num_rows is None:
            logger.log(
                logging.WARNING if report.num_skipped else logging.INFO, "the whole stream: %s", report
            )
        self.num_rows = report.parts

    def _parts(self) -> Iterator[RowSource]:
        numbered = iter(self.stream)
        while part := list(islice(numbered, PART_ROWS)):
            numbers = [number for number, _ in part]
            yield RowSource([self._selected(*item) for item in part], numbers, self.stream.name)

    def _selected(self, number: int, row: Any) -> Mapping[str, Any]:
        check_object(row, self.stream.name, number)
        return self.selection(row)

    def _check(self, part: RowDataset) -> None:
        try:
            self.check(part)
        except ValueError as error:
            first, last = (row_name(number) for number in part.rows[[0, -1]].tolist())
            raise ValueError(f"{self.stream.name}, rows {first} to {last}: {error}") from error


def _by_itself(row: Row) -> Row:
    """The row in memory of its own: a part stays as long as anything of it is held."""

    def own(values: Tensor | None) -> Any:
        return None if values is None else values.clone()

    answers = tuple(Answer(own(answer.ids), own(answer.scored)) for answer in row.answers)
    numbers = {
        name: own(value) if isinstance(value, Tensor) else value for name, value in row.numbers.items()
    }
    return replace(row, prompt=own(row.prompt), answers=answers, numbers=numbers)


def has_images(*data: Any) -> bool:
    """Whether any of some data sets has rows with images, as far as is known."""
    rows = map(known_rows, data)
    return any(one is not None and one.images is not None for one in rows)


def may_have_images(train: Any, evaluation: Any) -> bool:
    """Whether rows of a run may have images: of a stream, which may have them later, always."""
    held_out = evaluation.values() if isinstance(evaluation, Mapping) else [evaluation]
    return isinstance(train, StreamDataset) or has_images(train, *held_out)


def known_rows(data: Any) -> Any:
    """The rows that are at hand: all, or the head of a stream."""
    return data.head if isinstance(data, StreamDataset) else data
