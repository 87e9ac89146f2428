"""Rows of pairs, as TRL documents them: ``prompt``, ``chosen`` and ``rejected``, as texts and numbers.

Without ``prompt`` the part that chosen and rejected share at their start is the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastdpo.training.numbers import check_finite, read_columns
from fastdpo.training.row_texts import RowTexts, TextReader


def render_pair(
    row: Mapping[str, Any],
    number: int,
    reader: TextReader,
    columns: Mapping[str, str],
    gold_column: str | None = None,
) -> Iterator[RowTexts]:
    """Check one row and render it.

    Args:
        columns: per-pair numbers to read: name in the result -> name of the row's column.
        gold_column: of a third, gold answer.

    Raises:
        ValueError: the row has the wrong shape, or the tokenizer cannot render it; names the row.
        BadRow: nothing can be learnt from it.
    """
    where = reader.where(number)
    names = ("chosen", "rejected", *([] if gold_column is None else [gold_column]))
    for name in names:
        if name not in row:
            raise ValueError(
                f"{where}: no column {name!r}; got {sorted(row)}, wanted {', '.join(names)} and (unless it "
                "is their common start) prompt"
            )
    numbers = read_columns(row, columns, where)
    check_finite(numbers, columns)
    yield reader.read(row, number, {name: row[name] for name in names}, numbers)
