"""Rows made into token ids in their order, by one process or several, with a bar."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fastdpo.training.data.maker import LeftOut, MadeRow, RowMaker
from fastdpo.training.data.source import RowSource

BATCH_ROWS = 256
# A process takes a fraction of a second to start and its rows have to come back: fewer rows do not pay.
ROWS_A_PROCESS = 2000
Made = list[MadeRow | LeftOut]
# What a forked process finds: neither rows nor a tokenizer are sent to it.
_work: tuple[RowMaker, RowSource] | None = None


def made_in_order(maker: RowMaker, source: RowSource, processes: int | None, *, show: bool) -> Iterator[Made]:
    """What becomes of each row of ``source``.

    Args:
        processes: None for one for every ``ROWS_A_PROCESS`` rows, up to the cores that this rank has.

    Raises:
        ValueError: as ``RowMaker.made``.
        RuntimeError: a process was killed.
    """
    count = _processes(len(source)) if processes is None else processes
    count = min(count, -(-len(source) // BATCH_ROWS))
    batches = _in_this_process(maker, source) if count <= 1 else _in_processes(maker, source, count)
    total = len(source)
    with tqdm(
        total=total, desc="Tokenising", unit="row", leave=False, disable=not show or total <= BATCH_ROWS
    ) as bar:
        for batch in batches:
            bar.update(len(batch))
            yield from batch


def _processes(rows: int) -> int:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(min(len(os.sched_getaffinity(0)) // ranks, rows // ROWS_A_PROCESS), 1)


def _in_this_process(maker: RowMaker, source: RowSource) -> Iterator[list[Made]]:
    rows = iter(source)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield maker.made(batch)


def _in_processes(maker: RowMaker, source: RowSource, count: int) -> Iterator[list[Made]]:
    global _work
    starts = range(0, len(source), BATCH_ROWS)
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=_begin) as pool:
        _work = maker, source
        try:
            with _forking():
                results = pool.map(_batch_from, starts)
            for result in results:
                if isinstance(result, Exception):
                    raise result
                yield result
        except BrokenProcessPool:
            raise RuntimeError(
                f"{source.name}: one of the {count} processes that tokenise it was killed, as where memory "
                "is short: lower dataset_num_proc"
            ) from None
        finally:
            _work = None
            pool.shutdown(cancel_futures=True)


@contextmanager
def _forking() -> Iterator[None]:
    """While processes start: each has one thread, and no word about forks is the user's."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the others


def _batch_from(start: int) -> list[Made] | Exception:
    assert _work is not None
    maker, source = _work
    places = range(start, min(start + BATCH_ROWS, len(source)))
    try:
        return maker.made([(source.numbers[place], source.rows[place]) for place in places])
    except Exception as error:
        return _sendable(error)


def _sendable(error: Exception) -> Exception:
    """The error, or its text in one that survives the way: those with arguments of their own may not."""
    try:
        sent: Any = pickle.loads(pickle.dumps(error))
        return error if str(sent) == str(error) else RuntimeError(str(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
