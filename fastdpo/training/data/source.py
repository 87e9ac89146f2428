"""Where rows come from: JSONL, JSON, Parquet, a ``datasets`` directory, a hub id, or memory.

Rows are counted from 1, as editors count lines; every message about data names the row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class RowSource:
    """Raw rows, their numbers for messages (from 1), and the name of the place they come from."""

    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]
    name: str

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        return zip(self.numbers, self.rows, strict=True)

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(source: Any, *, split: str = "train") -> RowSource:
    """Read preference rows.

    Args:
        source: path of a ``.jsonl``, ``.json`` or ``.parquet`` file, a ``datasets`` directory, a hub
            id, or rows already in memory: a sequence of mappings, a ``datasets.Dataset``, a
            data frame of pandas, or a mapping of splits.
        split: which split, where the source has several.

    Raises:
        ValueError: nothing there, a broken row (with its number), or not a format named above.
        ImportError: Parquet without pyarrow, or a directory or id without ``datasets``.
    """
    if isinstance(source, RowSource):
        return source
    if not isinstance(source, str | os.PathLike):
        return _rows_in_memory(source, split)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_datasets(str(path), split, on_disk=_is_saved_dataset(path))
    if _looks_like_path(os.fspath(source)):
        raise ValueError(f"dataset: no such file or directory: {os.fspath(source)}")
    return _read_datasets(os.fspath(source), split, on_disk=False)


def _read_file(path: Path) -> RowSource:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".parquet":
        return _numbered(_read_parquet(path), str(path))
    raise ValueError(f"dataset: got a file ending in {suffix!r} ({path}), wanted one of {FILE_SUFFIXES}")


def _read_jsonl(path: Path) -> RowSource:
    rows, numbers = [], []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path}, row {number}: not valid JSON: {error}") from None
            rows.append(_checked_mapping(row, number, str(path)))
            numbers.append(number)
    return RowSource(rows, numbers, str(path))


def _read_json(path: Path) -> RowSource:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        # Many files named .json hold one object a line.
        if text.lstrip().startswith("{"):
            return _read_jsonl(path)
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if isinstance(rows, Mapping):
        rows = [rows]
    if not isinstance(rows, list):
        raise ValueError(f"{path}: got a JSON {type(rows).__name__}, wanted a list of objects")
    return _numbered([_checked_mapping(row, i, str(path)) for i, row in enumerate(rows, 1)], str(path))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(
            f"reading {path} needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _read_datasets(name: str, split: str, *, on_disk: bool) -> RowSource:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"reading {name!r} needs the package `datasets`, which is not installed: pip install datasets, "
            f"or give a file ending in one of {FILE_SUFFIXES}"
        ) from None
    try:
        loaded = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, split=split)
    except Exception as error:
        # Whatever went wrong (network, layout, unknown split), the user has to know which data set it was.
        raise ValueError(f"dataset: could not load {name!r}, split {split!r}: {error}") from error
    source = _rows_in_memory(loaded, split)
    return RowSource(source.rows, source.numbers, f"{name}[{split}]")


def _rows_in_memory(source: Any, split: str) -> RowSource:
    if isinstance(source, Mapping):
        if split not in source:
            firsts = [part[0] for part in source.values() if isinstance(part, list) and part]
            if firsts and not isinstance(firsts[0], Mapping):
                got = f"a dict of the columns {', '.join(source)}"
                raise ValueError(f"dataset: got {got}, wanted rows: a list of dicts, or datasets' from_dict")
            raise ValueError(f"dataset: got splits {sorted(source)}, wanted {split!r}")
        source = source[split]
    if hasattr(source, "iloc") and hasattr(source, "to_dict"):
        # A data frame of pandas: its columns' numbers as Python's, its missing values as nothing.
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    form = getattr(source, "format", None)
    if isinstance(form, Mapping) and form.get("type") not in (None, "custom"):
        # Of `datasets`: its rows as Python has them, not as tensors or tables. A transform stays.
        source = source.with_format(None, columns=form["columns"])
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ValueError(
            f"dataset: got {type(source).__name__}, wanted a path, an id or a sequence of rows; "
            "streaming data sets are not supported by this version"
        )
    return _numbered(source, "dataset")


def _numbered(rows: Sequence[Mapping[str, Any]], name: str) -> RowSource:
    return RowSource(rows, range(1, len(rows) + 1), name)


def _checked_mapping(row: Any, number: int, name: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{name}, row {number}: got a JSON {type(row).__name__}, wanted an object")
    return row


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILE_SUFFIXES
