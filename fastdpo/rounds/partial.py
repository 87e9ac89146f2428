"""Work that is kept while it is done: a folder of records beside the file that they become.

A record is written whole or it is not trusted, and the file appears at once, with all that is in it. What is
in the folder is gone on with by whoever does the same work: another number of processes too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from fastdpo.rounds.notes import read_json
from fastdpo.rounds.ranks import Ranks
from fastdpo.training.written import errors_named, own_digest, placed, write_json

_RUN_FILE = "run.json"
# Of a record, what it is held to.
_OWN = "digest"


class PartialWork:
    """The records of a piece of work.

    Args:
        output: the file that they become.
        told: what decides on them, by name, as JSON has it.
        ranks: the processes that share it.
        overwrite: replace the file, and records of other work.

    Raises:
        ValueError: the file is there, or records of other work are; says what differs.
    """

    def __init__(self, output: Path, told: Mapping[str, Any], ranks: Ranks, *, overwrite: bool) -> None:
        self.output, self.folder = output, output.with_name(output.name + ".partial")
        self.ranks = ranks
        self._file: IO[bytes] | None = None
        self._told: dict[str, Any] = json.loads(json.dumps(dict(told)))
        self._check(overwrite)
        if ranks.is_main:
            self._begin()

    def _check(self, overwrite: bool) -> None:
        standing = next(folder for folder in self.folder.absolute().parents if folder.exists())
        if not standing.is_dir() or not os.access(standing, os.W_OK):
            raise ValueError(f"output: got {self.output}, wanted a file in a folder to write to")
        if overwrite:
            return
        if self.output.exists():
            raise ValueError(f"output: {self.output} is there: choose another, or say --overwrite_output")
        then = self._told_then()
        if then is not None and then != self._told and any(self.folder.glob("part-*")):
            names = [name for name in {**then, **self._told} if then.get(name) != self._told.get(name)]
            differences = ", ".join(
                f"{name} {then.get(name)!r} -> {self._told.get(name)!r}" for name in names
            )
            raise ValueError(
                f"output: {self.folder} holds unfinished work with other settings: {differences}; go on "
                "with the same, choose another output, or say --overwrite_output"
            )

    def _told_then(self) -> Any:
        return read_json(self.folder / _RUN_FILE)

    def _begin(self) -> None:
        if self._told_then() != self._told and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _RUN_FILE, self._told)

    def records(self) -> list[dict[str, Any]]:
        """All records that were written whole. Raises ValueError for a file that holds something else."""
        found = []
        for path in sorted(self.folder.glob("part-*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            # What follows the last line's end is a record that its process did not come to write.
            for place, line in enumerate(lines[:-1], start=1):
                try:
                    record = json.loads(line)
                    is_whole = record.pop(_OWN) == own_digest(record)
                except (ValueError, TypeError, KeyError, AttributeError):
                    is_whole = False
                if not is_whole:
                    raise ValueError(f"{path}, line {place}: got no record: the file is broken, remove it")
                found.append(record)
        return found

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a record; it is on the disk when this returns."""
        if self._file is None:
            # A file of its own for each start, so that nothing is written behind a broken end.
            count = len(list(self.folder.glob(f"part-{self.ranks.rank}-*.jsonl")))
            self._file = (self.folder / f"part-{self.ranks.rank}-{count}.jsonl").open("wb")
        line = json.dumps({**record, _OWN: own_digest(record)}, ensure_ascii=True)
        with errors_named(Path(self._file.name)):
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more comes of this process."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(
        self, rows: Iterable[Mapping[str, Any]], beside: Mapping[Path, Mapping[str, Any]] | None = None
    ) -> None:
        """Write the file, after what is to lie beside it, and forget the records: the main process does."""
        self.close()
        if not self.ranks.is_main:
            return
        for path, value in (beside or {}).items():
            write_json(path, value)
        write_rows(self.output, rows)
        shutil.rmtree(self.folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL that is there whole or not at all."""
    with placed(path) as file:
        for row in rows:
            line = json.dumps(dict(row), ensure_ascii=False, default=str)
            # Columns that nobody looked at may hold half a surrogate pair, which JSON can only escape.
            file.write(line.encode("utf-8", "backslashreplace") + b"\n")


def stamp(name: str | None) -> Any:
    """What tells a model, or a file, from another of its name: the sizes and times of a folder's files."""
    path = Path(name or "").expanduser()
    if not name or not path.exists():
        return name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"{name} {digest(sizes)}"


def digest(value: Any) -> str:
    """A short hash of what JSON can say."""
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=8).hexdigest()
