"""What a scoring has done so far, on disk, so that an interrupted one goes on where it stopped.

A folder of ``.npz`` files beside the cache's file of the same key, so under the same hash of model, data and
way of computing: shards of anything else are never looked at. Each holds some batches of one rank, under a
name of its own; it is written under another name and moved into place.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdpo.training.written import placed

# What a crash that leaves no time to write costs at most, in seconds; an error or ^C costs nothing.
FLUSH_SECONDS = 60.0
logger = logging.getLogger(__name__)


class ScoredBatch(NamedTuple):
    """Rows of the data set ``(k,)`` int64, and their scores in fp32, flat, as ``put_scores`` takes them."""

    rows: Tensor
    values: Tensor


class ScoreShards:
    """The shards of one scoring. A context: what is not written yet is written when it ends, however it does.

    Args:
        folder: made when the first shard is written.
        key: the cache's; a shard that names another is not used.
        num_rows: of the data set.
    """

    def __init__(self, folder: Path, key: str, num_rows: int) -> None:
        self.folder, self.key, self.num_rows = folder, key, num_rows
        self._pending: list[ScoredBatch] = []
        self._flushed_at = time.monotonic()

    def __enter__(self) -> ScoreShards:
        self._flushed_at = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also of a rank that came to its end: others may not.
        self.flush()

    def load(self) -> list[ScoredBatch]:
        """The batches of all ranks' shards; of a file that cannot be read, none."""
        found: list[ScoredBatch] = []
        for path in sorted(self.folder.glob("*.npz")):
            try:
                found += self._read(path)
            except Exception as error:  # a flipped bit may ask for a cipher, or for much memory
                logger.warning("reference cache: %s cannot be read (%s); computing it again", path, error)
        return found

    def _read(self, path: Path) -> list[ScoredBatch]:
        with np.load(path) as content:
            stored = str(content["key"]), int(content["num_rows"])
            rows, values = (torch.from_numpy(content[name]) for name in ("rows", "values"))
            sizes = [content[name].tolist() for name in ("row_counts", "value_counts")]
        if stored != (self.key, self.num_rows):
            raise ValueError("of another key")
        is_whole = [len(rows), len(values)] == [sum(size) for size in sizes]
        if rows.dtype != torch.int64 or values.dtype != torch.float32 or not is_whole:
            raise ValueError("not as it was written")
        parts = [part.split(size) for part, size in zip((rows, values), sizes, strict=True)]
        return [ScoredBatch(*pair) for pair in zip(*parts, strict=True)]

    def add(self, rows: Tensor, values: Tensor) -> None:
        """A batch that is done; written with others before a minute is over."""
        self._pending.append(ScoredBatch(rows, values))
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet, in one step."""
        if self._pending:
            self._write()
        self._pending.clear()
        self._flushed_at = time.monotonic()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows, values = zip(*self._pending, strict=True)
        with placed(self.folder / f"{uuid.uuid4().hex}.npz") as file:
            np.savez(
                file,
                key=np.array(self.key),
                num_rows=np.array(self.num_rows),
                rows=torch.cat(rows).numpy(),
                values=torch.cat(values).numpy(),
                row_counts=np.array([len(part) for part in rows]),
                value_counts=np.array([len(part) for part in values]),
            )

    def remove(self) -> None:
        """All shards, of every rank, once the cache has the whole."""
        self._pending.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
