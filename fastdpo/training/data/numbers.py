"""The numbers of a row: what columns hold beside its texts. Missing ones are NaN, which no row may keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from ctypes import c_float
from typing import Any

from fastdpo.losses.ranges import FINITE, PROBABILITY
from fastdpo.losses.registry import RANGES
from fastdpo.training.data.messages import is_list
from fastdpo.training.settings.row_checks import BadRow

# What a number of a row may be, by its name in the data set; any number where it has no entry.
_LEGAL = {**RANGES, "win_rate": PROBABILITY}


def read_number(value: Any, name: str, column: str, where: str) -> float:
    """A number that is called ``name`` here, or its text, as CSV has it; infinite, or 0, where it is so in
    fp32, which tensors have.

    Raises:
        ValueError: it is something else, or out of range.
    """
    if value is None:
        return math.nan
    refusal = ValueError(f"{where}: column {column!r}: got {value!r}, wanted a number")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise refusal
    try:
        number = c_float(float(value)).value
    except ValueError:
        raise refusal from None
    except OverflowError:
        number = math.inf
    if math.isfinite(number) and number not in _LEGAL.get(name, FINITE):
        raise ValueError(f"{where}: column {column!r}: got {value!r}, wanted {_LEGAL[name]}")
    return number


def read_columns(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, float]:
    """The numbers of a row by their names, as ``columns`` (name -> column) says.

    Raises:
        ValueError: a column is not there, or holds no number.
    """
    for column in columns.values():
        if column not in row:
            raise ValueError(f"{where}: no column {column!r}: got {sorted(row)}, wanted a number in it")
    return {name: read_number(row[column], name, column, where) for name, column in columns.items()}


def read_numbers(value: Any, column: str, count: int, where: str) -> tuple[float, ...]:
    """So many numbers of a column that holds a list, or null. Raises ValueError for anything else."""
    if value is None:
        return (math.nan,) * count
    if not is_list(value):
        raise ValueError(f"{where}: column {column!r}: got {type(value).__name__}, wanted a list")
    if len(value) != count:
        raise ValueError(f"{where}: column {column!r}: got {len(value)} numbers, wanted {count}")
    return tuple(read_number(item, column, column, where) for item in value)


def check_finite(numbers: Mapping[str, float | Sequence[float]], columns: Mapping[str, str]) -> None:
    """Raise BadRow for a number that is missing, NaN or infinite.

    Args:
        numbers: by their names.
        columns: name -> the column that it is from, where that is another.
    """
    for name, value in numbers.items():
        values = value if isinstance(value, Sequence) else (value,)
        if not all(map(math.isfinite, values)):
            raise BadRow("not_finite", f"column {columns.get(name, name)!r}")
