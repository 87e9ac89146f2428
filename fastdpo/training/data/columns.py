"""Which columns a data set has, and which of them are read under which name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastdpo.training.data.prompts import repeats_prompt
from fastdpo.training.data.row_numbers import row_place
from fastdpo.training.data.rows import RowSource

# Columns of other names that hold prompts.
_PROMPTS = frozenset(
    "context input inputs instruction instructions problem prompt_text prompts query question questions user "
    "user_input user_prompt user_query".split()
)


@dataclass(frozen=True)
class Survey:
    """What one look at all rows says.

    Args:
        names: columns that any row has.
        filled: those that are not null in some row.
        prompts_repeated: whether at least half of the rows that have a prompt repeat its text in their
            answers.
    """

    names: tuple[str, ...]
    filled: frozenset[str]
    prompts_repeated: bool

    def unused(self, used: Collection[str]) -> tuple[str, ...]:
        """Columns that nothing looks at."""
        return tuple(name for name in self.names if name not in used)


def survey(source: RowSource) -> Survey:
    """Look at all rows once."""
    names: dict[str, None] = {}
    filled: set[str] = set()
    prompts = repeated = 0
    row: Any
    for number, row in source:
        check_object(row, source.name, number)
        names |= dict.fromkeys(row)
        filled |= {name for name in row if name not in filled and row[name] is not None}
        prompts += row.get("prompt") is not None
        repeated += repeats_prompt(row)
    return Survey(tuple(names), frozenset(filled), 2 * repeated >= prompts > 0)


def check_object(row: Any, source: str, number: int) -> None:
    """Raise ValueError for a row without columns."""
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise ValueError(f"{row_place(source, number)}: got {kind}, wanted an object with columns")


def select_columns(source: RowSource, names: Mapping[str, str], ignored: Sequence[str]) -> RowSource:
    """The rows with columns renamed, and without those ignored.

    Args:
        names: of a row's text or number -> the column to read it from, which takes the place of one of its
            name.

    Raises:
        ValueError: no row has such a column; names it.
    """
    if not names and not ignored or not len(source):
        return source
    found = survey(source).names
    for setting, column in [
        *((f"{name}_column", names[name]) for name in names),
        *(("ignore_columns", x) for x in ignored),
    ]:
        if column not in found:
            raise ValueError(f"{setting}: got {column!r}, wanted one of the columns {', '.join(found)}")
    selected = f"{source.fingerprint} {sorted(names.items())} {sorted(ignored)}"
    return replace(
        source,
        rows=_SelectedRows(source.rows, ColumnSelection(names, ignored)),
        fingerprint=None if source.fingerprint is None else selected,
    )


@dataclass(frozen=True)
class ColumnSelection:
    """Gives a row's columns other names, and leaves some out. Arguments as of ``select_columns``."""

    names: Mapping[str, str]
    ignored: Sequence[str]

    def __call__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.names and not self.ignored:
            return row
        hidden = {*self.ignored, *self.names, *self.names.values()}
        kept = {name: value for name, value in row.items() if name not in hidden}
        return kept | {name: row[column] for name, column in self.names.items() if column in row}


class _SelectedRows(Sequence[Mapping[str, Any]]):
    """Rows under other names, made when they are asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], selected: ColumnSelection) -> None:
        self.rows, self.selected = rows, selected

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self.selected, self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.selected(self.rows[place])


def check_prompt_column(found: Survey, source: str, *, may_be_shared: bool) -> None:
    """Raise ValueError where there is no prompt, but a column that sounds like one.

    Args:
        may_be_shared: without a prompt, what chosen and rejected share would be taken for it.
    """
    if "prompt" in found.filled:
        return
    alike = [name for name in found.names if name.lower() in _PROMPTS or name.lower() == "prompt"]
    if alike:
        hint = f"say --prompt_column {alike[0]}"
        if may_be_shared:
            hint += (
                f", or --ignore_columns {' '.join(alike)} where the prompt is what chosen and rejected "
                "have in common at their start"
            )
        raise ValueError(
            f"{source}: no column 'prompt', but {', '.join(map(repr, alike))}; got {list(found.names)}: "
            f"{hint}"
        )
