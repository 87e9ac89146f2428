"""Where rows come from: files, folders, patterns, a hub id, memory; one of them or several, with shares.

Rows are counted from 1, as editors count lines; every message about data names the row.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from fastdpo.training.data.arrow import (
    cache_folder,
    file_fingerprint,
    kept_records,
    table_rows,
    table_stream,
    undecoded,
)
from fastdpo.training.data.files import check_no_split, files_of, suffixes
from fastdpo.training.data.mixture import joined, joined_streams
from fastdpo.training.data.records import READERS, records
from fastdpo.training.data.rows import RowSource, RowStream, counted, numbered

_ROWS_AT_ONCE = 1000


@overload
def read_rows(
    source: Any,
    *,
    split: str | Sequence[str] = "train",
    weights: Sequence[float] | None = None,
    streaming: Literal[False] = False,
) -> RowSource: ...
@overload
def read_rows(
    source: Any,
    *,
    split: str | Sequence[str] = "train",
    weights: Sequence[float] | None = None,
    streaming: Literal[True],
) -> RowStream: ...
def read_rows(
    source: Any,
    *,
    split: str | Sequence[str] = "train",
    weights: Sequence[float] | None = None,
    streaming: bool = False,
) -> RowSource | RowStream:
    """Preference rows, which stay on disk: what is not asked for takes no memory.

    Args:
        source: a path or pattern of files (``.jsonl``, ``.json``, ``.csv`` or ``.tsv``, also with ``.gz``,
            ``.zst``, ``.xz`` or ``.bz2``; ``.parquet``, ``.arrow``), a folder of such files or one that
            ``datasets`` saved, a hub id, or a list of these, which is a mixture. Or rows already in memory: a
            sequence of mappings, a ``datasets.Dataset``, a data frame of pandas, or a mapping of splits.
        split: which split, where the source has several; of a mixture, one for all or one for each.
        weights: of a mixture, the parts' shares of the rows, of any sum; as many rows as that allows without
            a repeat. None: all rows.
        streaming: read rows as they are used, and keep nothing on disk. Parts of a mixture with weights are
            taken in turn until one has ended.

    Returns:
        A ``RowSource``, or, ``streaming``, a ``RowStream``.

    Raises:
        ValueError: nothing there, a broken row (with its number), a file that is cut off or empty, another
            format, or weights that do not fit.
    """
    if not _is_mixture(source):
        if weights is not None:
            raise ValueError(f"dataset_weights: got {weights!r} for one source, wanted several")
        return _read(source, _one_split(split), streaming)
    splits = [split] * len(source) if isinstance(split, str) else list(split)
    if len(splits) != len(source):
        raise ValueError(f"dataset_split: got {len(splits)} for {len(source)} sources, wanted one each")
    parts = [_read(part, its_split, streaming) for part, its_split in zip(source, splits, strict=True)]
    return _joined(parts, " + ".join(part.name for part in parts), weights, streaming)


def _is_mixture(source: Any) -> bool:
    is_list = isinstance(source, list | tuple) and len(source) > 0
    return is_list and all(isinstance(part, str | os.PathLike) for part in source)


def _one_split(split: str | Sequence[str]) -> str:
    splits = [split] if isinstance(split, str) else list(split)
    if len(splits) != 1:
        raise ValueError(f"dataset_split: got {splits} for one source, wanted one")
    return splits[0]


def _joined(parts: Sequence[Any], name: str, weights: Sequence[float] | None, streaming: bool) -> Any:
    return joined_streams(parts, name, weights) if streaming else joined(parts, name, weights)


def _read(source: Any, split: str, streaming: bool) -> RowSource | RowStream:
    if isinstance(source, RowSource | RowStream):
        return _as_asked(source, streaming)
    if not isinstance(source, str | os.PathLike):
        return _in_memory(source, split, "dataset", streaming)
    name = os.fspath(source)
    if _is_saved_dataset(Path(name).expanduser()):
        return _from_datasets(name, split, streaming, is_saved=True)
    files = files_of(name, split)
    if not files:
        return _from_datasets(name, split, streaming, is_saved=False)
    parts = [_stream_of(file) if streaming else _rows_of(file) for file in files]
    return _joined(parts, f"{name}[{split}]" if os.path.isdir(name) else name, None, streaming)


def _as_asked(source: RowSource | RowStream, streaming: bool) -> RowSource | RowStream:
    if streaming and isinstance(source, RowSource):
        return RowStream(source.__iter__, source.name)
    if not streaming and isinstance(source, RowStream):
        raise ValueError(
            f"dataset: got {source.name}, a stream, wanted rows that can be counted: a stream is trained on, "
            "as train_dataset, and neither evaluated on nor scored"
        )
    return source


def _rows_of(path: Path) -> RowSource:
    suffix, compression = suffixes(path)
    fingerprint = file_fingerprint(path, suffix + compression)
    if suffix in READERS:
        return RowSource(*kept_records(path, suffix, compression), str(path), fingerprint)
    return numbered(undecoded(table_rows(path, suffix)), str(path), fingerprint)


def _stream_of(path: Path) -> RowStream:
    suffix, compression = suffixes(path)
    if suffix in READERS:
        texts = functools.partial(records, path, suffix, compression)
        return RowStream(lambda: ((number, json.loads(text)) for number, text in texts()), str(path))
    if suffix == ".arrow":  # is not copied as it is
        return RowStream(_rows_of(path).__iter__, str(path))
    return counted(lambda: undecoded(table_stream(path)), str(path))


def _from_datasets(name: str, split: str, streaming: bool, *, is_saved: bool) -> RowSource | RowStream:
    import datasets

    try:
        if is_saved:
            loaded = datasets.load_from_disk(os.path.expanduser(name))
        else:
            loaded = datasets.load_dataset(name, split=split, streaming=streaming, cache_dir=cache_folder())
    except Exception as error:
        # Whatever went wrong (network, layout, unknown split), the user has to know which data set it was.
        raise ValueError(f"dataset: could not load {name!r}, split {split!r}: {error}") from error
    return _in_memory(loaded, split, f"{name}[{split}]", streaming)


def _in_memory(source: Any, split: str, name: str, streaming: bool) -> RowSource | RowStream:
    if isinstance(source, Mapping):
        if split not in source:
            firsts = [part[0] for part in source.values() if isinstance(part, list) and part]
            if firsts and not isinstance(firsts[0], Mapping):
                got = f"a dict of the columns {', '.join(source)}"
                raise ValueError(f"dataset: got {got}, wanted rows: a list of dicts, or datasets' from_dict")
            raise ValueError(f"dataset: got splits {sorted(source)}, wanted {split!r}")
        source = source[split]
    elif name == "dataset":
        check_no_split("rows in memory", split)
    form = getattr(source, "format", None)
    if isinstance(form, Mapping) and form.get("type") not in (None, "custom"):
        # Of `datasets`: its rows as Python has them, not as tensors or tables. A transform stays.
        source = source.with_format(None, columns=form["columns"])
    if hasattr(source, "iloc") and hasattr(source, "to_dict"):
        source = _FrameRows(source)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, str | bytes):
        # Of `datasets`: of all that made it.
        fingerprint = getattr(source, "_fingerprint", None)
        return _as_asked(numbered(undecoded(source), name, fingerprint), streaming)
    is_iterable = hasattr(source, "__iter__") and not hasattr(source, "__next__")
    if streaming and is_iterable:
        if hasattr(source, "with_format"):  # of `datasets`: likewise
            source = undecoded(source.with_format(None))
        return counted(lambda: source, name)
    hint = "; a stream is trained on, as train_dataset, and read with streaming=True" if is_iterable else ""
    if hasattr(source, "__next__"):
        hint = "; what can be gone through once is no source of rows, streaming or not"
    kind = type(source).__name__
    raise ValueError(f"dataset: got {kind}, wanted a path, an id or a sequence of rows{hint}")


class _FrameRows(Sequence[Mapping[str, Any]]):
    """A data frame of pandas: its columns' numbers as Python's, its missing values as nothing."""

    def __init__(self, frame: Any) -> None:
        self.frame = frame

    def __len__(self) -> int:
        return len(self.frame)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self._rows(self.frame.iloc[start : start + _ROWS_AT_ONCE])

    def __getitem__(self, place: Any) -> Any:
        return self._rows(self.frame.iloc[[place]])[0]

    @staticmethod
    def _rows(part: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = part.astype(object).where(part.notna(), None).to_dict("records")
        return rows


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
