"""Which rank was lost, where an exchange of the others fails or waits for it.

Of a rank that is gone torch tells the others that a connection was closed or that time is up, not whose. So
each rank says once a second in the process group's store that it is there, from a thread of its own, and at
the end how it ended. That is read when an exchange has failed, or when a neighbour has long been silent:
traffic of each rank with the store, whatever their number, and no exchange of the ranks.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

PERIOD = 1.0
"""Seconds between two signs of life."""
PATIENCE = 3.5
"""Seconds without one after which a rank is lost, where an exchange has failed."""
SILENCE = 60.0
"""The same where none has: a rank may be held up for a while, and the others end by ``ddp_timeout`` only."""
_RUNS = count()
logger = logging.getLogger(__name__)


class LostRankError(RuntimeError):
    """Another rank was killed, does not answer, or ended with an error; the message names it."""


@contextmanager
def lost_ranks_named(trainer: Any) -> Iterator[None]:
    """A run whose ranks end within ``ddp_timeout`` of the loss of one, with an error that names it.

    Raises:
        LostRankError: in place of the error of an exchange that failed since another rank was lost.
    """
    if trainer.accelerator.num_processes == 1 or not dist.is_initialized():
        yield
        return
    _set_timeout(trainer.args.ddp_timeout)
    roll = RollCall()
    try:
        yield
    except BaseException as error:
        # An exchange that fails raises either; errors of one's own are of other types, or rare.
        is_exchange = type(error) is RuntimeError or isinstance(error, dist.DistError)
        lost = roll.lost() if is_exchange else None
        if lost is None:
            roll.end(f"{type(error).__name__}: {str(error)[:300]}")
            raise
        roll.end("", found=lost)
        raise LostRankError(
            f"{lost}. This is rank {roll.rank}, in step {trainer.state.global_step + 1}; every step takes "
            "all ranks, so all end. Started again with resume_from_checkpoint=True, the run goes on from its "
            "last checkpoint"
        ) from error
    roll.end("")


def _set_timeout(seconds: float) -> None:
    """``ddp_timeout`` for all groups: transformers keeps it to itself on a CPU, and torch off subgroups."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class RollCall:
    """The signs of life of all ranks in the store: ``[who, beat, end]``.

    ``end`` is None of a rank that goes on, else the error that it ended with: empty where it was done, or
    ended for the sake of another.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._run = f"fastdpo/run{next(_RUNS)}"
        self._who = f"{socket.gethostname()}, process {os.getpid()}"
        # Connections of their own: a wait of torch's for another rank holds up all that use its own.
        store: Any = distributed_c10d._get_default_store()
        self._store, self._threads_store = store.clone(), store.clone()
        self._is_over, self._found = threading.Event(), ""
        self._tell(self._store, 0)
        self._thread = threading.Thread(target=self._live, name="fastdpo-alive", daemon=True)
        self._thread.start()

    def lost(self) -> str | None:
        """Who was lost, in words, after a look of ``PATIENCE`` seconds; None where nobody was."""
        try:
            return self._found or self._look(self._store) or None
        except RuntimeError:
            keeper = "rank 0, or torchrun on its machine"
            return (
                self._found
                or f"the ranks' store does not answer: the process that keeps it ({keeper}) is lost"
            )

    def end(self, how: str, found: str = "") -> None:
        """Say how this rank ends, and whom it found lost, which the others may not find out by themselves."""
        self._is_over.set()
        self._thread.join(PATIENCE)
        try:
            self._tell(self._store, -1, how)
            if found:
                self._store.set(f"{self._run}/lost", found)
                time.sleep(2 * PERIOD)  # the store may end with this process
        except RuntimeError:
            return  # it is gone already

    def _tell(self, store: Any, beat: int, end: str | None = None) -> None:
        store.set(f"{self._run}/{self.rank}", json.dumps([self._who, beat, end]))

    def _live(self) -> None:
        store, neighbour = self._threads_store, (self.rank + 1) % self.size
        seen, since = None, time.monotonic()
        try:
            for beat in count(1):
                if self._is_over.wait(PERIOD):
                    return
                self._tell(store, beat)
                now = self._of(store, neighbour)
                if now != seen or now[2] == "":
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > SILENCE and not self._found:
                    store.set(f"{self._run}/lost", _in_words(neighbour, now))
                if not self._found and store.check([f"{self._run}/lost"]):
                    self._found = store.get(f"{self._run}/lost").decode()
                    logger.error("%s", self._found)
        except RuntimeError:
            return  # the store is gone: what fails next asks for it

    def _of(self, store: Any, rank: int) -> list[Any]:
        key = f"{self._run}/{rank}"
        found: list[Any] = json.loads(store.get(key)) if store.check([key]) else [None, 0, None]
        return found

    def _look(self, store: Any) -> str:
        before = [self._of(store, rank) for rank in range(self.size)]
        time.sleep(PATIENCE)
        found = []
        for rank, then in enumerate(before):
            now = self._of(store, rank)
            is_silent = now == then and now[2] is None and rank != self.rank
            if is_silent or now[2]:
                found.append(_in_words(rank, now))
        return "; ".join(found)


def _in_words(rank: int, told: list[Any]) -> str:
    who, _, end = told
    if who is None:
        return f"rank {rank} did not come to this run"
    what = f"ended with {end}" if end else "is lost: it was killed, or does not answer any more"
    return f"rank {rank} ({who}) {what}"
