"""Rows on disk, memory-mapped: what the library ``datasets`` keeps, and makes of files once.

The cache is that of ``datasets`` (``HF_DATASETS_CACHE``). What is made of a text file is found by the file's
path, size, time and inode: a file that changes is read anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdpo.training.data.kept import cache_folder, kept_table
from fastdpo.training.data.records import records

logger = logging.getLogger(__name__)

# Of what is kept: another number, and nothing kept before is found.
_FORMAT = 1
_ROWS_AT_ONCE = 1000
# Bytes of a file that takes a moment: from here on there is a bar.
_LARGE = 64 << 20


class KeptRows(Sequence[Mapping[str, Any]]):
    """Rows kept as JSON text, parsed when they are asked for.

    Args:
        data: a ``datasets.Dataset`` with columns ``number`` and ``text``.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.data.iter(_ROWS_AT_ONCE):
            yield from map(json.loads, batch["text"])

    def __getitem__(self, place: Any) -> Any:
        return json.loads(self.data[place]["text"])


class _Undecoded(Sequence[Mapping[str, Any]]):
    """Rows of ``datasets`` as they are kept: their images as bytes and paths."""

    def __init__(self, data: Any) -> None:
        self.data = data.with_format("arrow")

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.data.iter(_ROWS_AT_ONCE):
            yield from batch.to_pylist()

    def __getitem__(self, place: Any) -> Any:
        return self.data[place : place + 1].to_pylist()[0] if isinstance(place, int) else list(self)[place]


def undecoded(data: Any) -> Any:
    """Rows of ``datasets`` with images, which stay undecoded when rows are looked at; others as given."""
    features = getattr(data, "features", None)
    form = getattr(data, "format", None)
    if not features or not _has_images(features) or (isinstance(form, Mapping) and form.get("type")):
        return data
    return _Undecoded(data) if hasattr(data, "__len__") else data.decode(False)


def _has_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, Mapping):
        return any(map(_has_images, feature.values()))
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(feature, datasets.Image) or (inner is not None and _has_images(inner))


class _KeptNumbers(Sequence[int]):
    """The numbers of the rows of a file with gaps."""

    def __init__(self, data: Any) -> None:
        self.data = data.select_columns("number")

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        for batch in self.data.iter(_ROWS_AT_ONCE):
            yield from batch["number"]

    def __getitem__(self, place: Any) -> Any:
        return self.data[place]["number"]


def kept_records(path: Path, suffix: str, compression: str) -> tuple[KeptRows, Sequence[int]]:
    """The rows of a text file and their numbers, from ``datasets``' cache, where they are put first.

    Raises:
        ValueError: as ``records``, or the cache cannot be written.
    """
    import datasets

    features = datasets.Features({"number": datasets.Value("int64"), "text": datasets.Value("string")})
    fingerprint = file_fingerprint(path, suffix + compression)

    def make(folder: str) -> Any:
        return datasets.Dataset.from_generator(
            _examples,
            features=features,
            cache_dir=folder,
            gen_kwargs={"path": path, "suffix": suffix, "compression": compression},
            fingerprint=fingerprint,
        )

    data = _made(path, lambda: kept_table(fingerprint, make))
    # Without gaps the last row's number is how many there are.
    has_gaps = data[len(data) - 1]["number"] != len(data)
    return KeptRows(data), _KeptNumbers(data) if has_gaps else range(1, len(data) + 1)


def table_rows(path: Path, suffix: str) -> Any:
    """The rows of a Parquet or Arrow file, as a ``datasets.Dataset``; Parquet is put into the cache first.

    Raises:
        ValueError: it is broken, or has no rows.
    """
    import datasets

    if suffix == ".arrow":
        rows = _made(path, lambda: datasets.Dataset.from_file(str(path)))
        if not len(rows):
            raise ValueError(f"{path}: no rows")
        return rows
    _check_parquet(path)
    fingerprint = file_fingerprint(path, suffix)

    def make(folder: str) -> Any:
        return datasets.Dataset.from_parquet(str(path), cache_dir=folder)

    return _made(path, lambda: kept_table(fingerprint, make))


def table_stream(path: Path) -> Any:
    """The rows of a Parquet file, read as they are used. Raises ValueError as ``table_rows``."""
    import datasets

    _check_parquet(path)
    files, folder = str(path), cache_folder()
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=folder)


def _check_parquet(path: Path) -> None:
    from pyarrow.parquet import read_metadata

    if not _made(path, lambda: read_metadata(path)).num_rows:
        raise ValueError(f"{path}: no rows")


def _examples(path: Path, suffix: str, compression: str) -> Iterator[dict[str, Any]]:
    for number, text in records(path, suffix, compression):
        yield {"number": number, "text": text}


def file_fingerprint(path: Path, ending: str) -> str:
    """Says which rows those of a file are: another one where the file changes."""
    state = path.stat()
    told = (_FORMAT, os.fspath(path.resolve()), ending, state.st_size, state.st_mtime_ns, state.st_ino)
    return hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()


def _made(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` makes of a file. Raises ValueError with what is wrong, not with what broke of it."""
    try:
        with bars(path.stat().st_size >= _LARGE):
            return make()
    except Exception as error:
        cause: Any = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ValueError) and str(cause).startswith(str(path)):
            raise cause from None
        kept = f", or not kept in {cache_folder()}" if isinstance(cause, OSError) else ""
        raise ValueError(f"{path}: cannot be read{kept}: {cause}") from error


@contextmanager
def bars(wanted: bool) -> Iterator[None]:
    """The bars of ``datasets``, or none of them."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
