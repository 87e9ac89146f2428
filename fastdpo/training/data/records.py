"""The rows of one text file, compressed or not, each as JSON text with its number.

JSONL, JSON (a list of objects, one object, or one a line), CSV and TSV. What is read is checked; a row stays
text until it is asked for, so no two rows need the same columns, or the same types in them.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Records = Iterator[tuple[int, str]]
_SPACE = re.compile(r"[ \t\r\n]*")


def records(path: Path, suffix: str, compression: str) -> Records:
    """The rows of a file.

    Args:
        suffix: one of ``READERS``.
        compression: one of ``COMPRESSIONS``, or empty.

    Returns:
        Pairs of a row's number, from 1, and its JSON text, an object's. Of JSONL numbers are those of lines,
        of CSV those of rows below the header.

    Raises:
        ValueError: a broken row, with its number; a file that is cut off, is not UTF-8, or has no rows.
    """
    number = 0
    try:
        with COMPRESSIONS[compression](path) as file:
            for number, text in READERS[suffix](file, str(path)):
                yield number, text
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        what = f"the {compression} stream is broken, or ends early" if compression else "cannot be read"
        raise ValueError(f"{path}, after row {number}: {what}: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after row {number}: not UTF-8: {error}") from None
    if not number:
        raise ValueError(f"{path}: an empty file, wanted rows")


def _lines(file: BinaryIO, name: str) -> Records:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}, row {number}: not valid JSON: {error}") from None
            yield number, _object(row, text, number, name)


def _json(file: BinaryIO, name: str) -> Records:
    content = file.read()
    text = content.decode("utf-8-sig").strip()
    if text.startswith("["):
        yield from _list(text, name)
        return
    try:
        row = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        # Many files named .json hold one object a line.
        if not text.startswith("{"):
            raise ValueError(f"{name}: not valid JSON: {error}") from None
        yield from _lines(io.BytesIO(content), name)
        return
    if not isinstance(row, Mapping):
        raise ValueError(f"{name}: got a JSON {type(row).__name__}, wanted a list of objects")
    if text:
        yield 1, text


def _list(text: str, name: str) -> Records:
    """The objects of a list, one by one: as objects of Python all take several times the file's size."""
    read = json.JSONDecoder().raw_decode
    place, number = _after_space(text, 1), 0
    try:
        while not (text.startswith("]", place) and not number):
            row, end = read(text, place)
            number += 1
            yield number, _object(row, text[place:end], number, name)
            place = _after_space(text, end)
            if text.startswith("]", place):
                break
            if not text.startswith(",", place):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = _after_space(text, place + 1)
        if place + 1 < len(text):
            raise json.JSONDecodeError("Extra data", text, place + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}, after row {number}: not valid JSON: {error}") from None


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None  # it matches nothing, too
    return found.end()


def _object(row: Any, text: str, number: int, name: str) -> str:
    if not isinstance(row, Mapping):
        raise ValueError(f"{name}, row {number}: got a JSON {type(row).__name__}, wanted an object")
    return text


def _cells(file: BinaryIO, name: str, delimiter: str) -> Records:
    """Rows of cells, which are text; an empty one is null, as in data frames."""
    limit = csv.field_size_limit(sys.maxsize)  # a long answer is longer than the default
    number = 0
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise ValueError(f"{name}: got the columns {names}, wanted each name once")
            for number, cells in enumerate(filter(None, rows), start=1):
                if len(cells) != len(names):
                    raise ValueError(
                        f"{name}, row {number}: got {len(cells)} cells, wanted {len(names)}: "
                        f"{', '.join(names)}"
                    )
                row = {column: cell or None for column, cell in zip(names, cells, strict=True)}
                yield number, json.dumps(row, ensure_ascii=False)
    except csv.Error as error:
        raise ValueError(f"{name}, after row {number}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _zstandard(path: Path) -> BinaryIO:
    from pyarrow import CompressedInputStream

    stream: Any = CompressedInputStream(str(path), "zstd")
    return io.BufferedReader(stream)


READERS: dict[str, Callable[[BinaryIO, str], Records]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".csv": lambda file, name: _cells(file, name, ","),
    ".tsv": lambda file, name: _cells(file, name, "\t"),
}
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".zst": _zstandard,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
