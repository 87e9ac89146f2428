"""Signs of life in a store; several processes are in ``tests/distributed/test_killed_rank.py``."""

from __future__ import annotations

import json
import time

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fastdpo.training.loop import lost_ranks
from fastdpo.training.loop.lost_ranks import RollCall


@pytest.fixture
def roll(monkeypatch: pytest.MonkeyPatch):
    """Of rank 0 of three; the others say what a test has them say."""
    store = dist.HashStore()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    for name, seconds in (("PERIOD", 0.01), ("PATIENCE", 0.1), ("SILENCE", 0.2)):
        monkeypatch.setattr(lost_ranks, name, seconds)
    made = RollCall()
    yield made
    made.end("")


def say(roll: RollCall, rank: int, *told: object) -> None:
    roll._store.set(f"{roll._run}/{rank}", json.dumps([f"host{rank}, process 7", *told]))


def test_who_ended_who_is_silent_and_who_never_came_are_named(roll: RollCall):
    say(roll, 1, -1, "OSError: the disk is full")
    assert roll.lost() == (
        "rank 1 (host1, process 7) ended with OSError: the disk is full; rank 2 did not come to this run"
    )
    say(roll, 1, -1, "")
    say(roll, 2, 5, None)
    assert roll.lost() == "rank 2 (host2, process 7) is lost: it was killed, or does not answer any more"
    say(roll, 2, -1, "")
    assert roll.lost() is None


def test_a_silent_neighbour_is_told_to_all_while_nothing_has_failed(
    roll: RollCall, caplog: pytest.LogCaptureFixture
):
    say(roll, 1, 5, None)
    end = time.monotonic() + 20
    while not caplog.messages and time.monotonic() < end:  # the last that its thread does
        time.sleep(0.01)
    assert roll.lost() == "rank 1 (host1, process 7) is lost: it was killed, or does not answer any more"
    assert caplog.messages == [roll.lost()]
    assert roll._store.get(f"{roll._run}/lost").decode() == roll.lost()


def test_a_neighbour_that_is_done_may_be_silent(roll: RollCall):
    say(roll, 1, -1, "")
    time.sleep(0.5)
    assert roll._found == ""
