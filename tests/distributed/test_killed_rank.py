"""A rank that is lost in the middle of a step: the others end and name it, and the run goes on afterwards."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.distributed.killed_run import TIMEOUT
from tests.distributed.ranks import free_port, run_ranks, start
from tests.distributed.resume_run import whole

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
RUN = "tests.distributed.killed_run"
LOST = "rank 1 ({}) is lost: it was killed, or does not answer any more. This is rank 0, in step 3"


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return whole(tmp_path_factory.mktemp("truth"), "alone")


def lose(folder: Path, way: str, how: str, rank: int = 1) -> tuple[str, str, float]:
    """What the other rank printed, what the lost one is called, and seconds between the loss and the end."""
    logs = [folder / f"{number}.log" for number in range(2)]
    port, arguments = free_port(), (str(folder), way, how, str(rank))
    ranks = [start(RUN, arguments, number, 2, port, logs[number]) for number in range(2)]
    other, lost_at, end = ranks[1 - rank], None, time.monotonic() + 240
    try:
        while other.poll() is None and time.monotonic() < end:
            if lost_at is None and "LOST" in logs[rank].read_text():
                lost_at = time.monotonic()
            time.sleep(0.05)
        took = time.monotonic() - (lost_at or 0)
        assert other.poll() == 1, logs[1 - rank].read_text()[-4000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return logs[1 - rank].read_text(), f"{os.uname().nodename}, process {ranks[rank].pid}", took


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero3"])
def test_a_killed_rank_is_named_and_the_run_goes_on(way: str, truth: dict[str, Any], tmp_path: Path):
    if way == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed (make test-deepspeed)")
    said, who, took = lose(tmp_path, way, "killed")
    assert LOST.format(who) in said
    assert took < 60  # of the 600 of ddp_timeout; seconds, on a machine with nothing else to do
    assert {path.name for path in (tmp_path / way).glob("checkpoint-*")} == {"checkpoint-2"}
    run_ranks(RUN, str(tmp_path), way, "resumed")
    found = torch.load(tmp_path / f"{way}.pt")
    assert found["losses"] == pytest.approx(truth["losses"], abs=1e-5)
    for name, value in truth["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=2e-6)


def test_a_rank_that_does_not_answer_is_named_within_the_timeout(tmp_path: Path):
    """Its connections stay open: only ``ddp_timeout`` ends the others."""
    said, who, took = lose(tmp_path, "ddp", "stopped")
    assert LOST.format(who) in said
    assert TIMEOUT - 1 < took < TIMEOUT + 60


def test_the_error_of_another_rank_is_named(tmp_path: Path):
    said, who, _ = lose(tmp_path, "ddp", "raised")
    assert f"rank 1 ({who}) ended with OSError: the disk is full. This is rank 0, in step 3" in said


def test_the_rank_that_keeps_the_store_is_named(tmp_path: Path):
    said, _, _ = lose(tmp_path, "ddp", "killed", rank=0)
    assert "the process that keeps it (rank 0, or torchrun on its machine) is lost. This is rank 1" in said


def test_torchrun_ends_the_others(tmp_path: Path):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, *launch, "-m", RUN, str(tmp_path), "ddp", "killed"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1
    assert "exitcode: -9) local_rank: 1" in ended.stderr.replace("  ", " "), ended.stderr[-3000:]
