"""How rows are numbered and named: from 1 as their file has them, with their file where there are several.

The number of a row of one file among several holds, above its own bits, which file that is: numbers stay
whole numbers, which tensors hold, no two rows share one, and a message names the row as its file has it.
"""

from __future__ import annotations

from collections.abc import Sequence

_BITS = 40
# Files that were read beside others, in this process: the place of one, from 1, is in its rows' numbers.
_files: dict[str, int] = {}


def file_index(name: str) -> int:
    """The place of a file among those that were read beside others, from 1."""
    return _files.setdefault(name, len(_files) + 1)


def number_in(file: int, number: int) -> int:
    """The number, among several files, of a row of one; of a row that has such a number already, that."""
    return number if number >> _BITS else file << _BITS | number


def row_name(number: int) -> str:
    """``17``, or ``17 of b.parquet`` where there are several files: a row, after the word *row*."""
    file, row = _apart(number)
    return f"{row} of {file}" if file else str(row)


def row_place(source: str, number: int) -> str:
    """``b.parquet, row 17``: a row of a source, or of the one of its files that has it."""
    file, row = _apart(number)
    return f"{file or source}, row {row}"


def row_of(source: str, number: int) -> str:
    """``row 17 of b.parquet``: the same in other words."""
    file, row = _apart(number)
    return f"row {row} of {file or source}"


def file_of(source: str, number: int) -> str:
    """The name of the one of a source's files that has a row, or of the source."""
    return _apart(number)[0] or source


def _apart(number: int) -> tuple[str | None, int]:
    file = number >> _BITS
    return list(_files)[file - 1] if file else None, number & (1 << _BITS) - 1


def row_list(numbers: Sequence[int], *, at_most: int = 10) -> str:
    """``rows 3, 17, 40 and 5 more``: how messages name several rows."""
    shown = ", ".join(row_name(number) for number in numbers[:at_most])
    more = f" and {len(numbers) - at_most} more" if len(numbers) > at_most else ""
    return f"{'row' if len(numbers) == 1 else 'rows'} {shown}{more}"
