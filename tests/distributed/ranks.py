"""Several processes on this machine, over gloo on loopback or on GPUs of their own, with a time limit."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from tests import ROOT

# Parameters of a fixture: the same ranks on CPUs, and where there are enough on GPUs.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_DEVICE = "FASTDPO_TEST_DEVICE"


def own_device() -> torch.device:
    """Of this rank: one GPU, or the CPU."""
    kind = os.environ.get(_DEVICE, "cpu")
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(os.environ["LOCAL_RANK"]))


def join() -> torch.device:
    """Make the process group of the ranks; the device of this one."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    return device


def leave() -> NoReturn:
    """End this rank, with what is registered for an end.

    Not through the interpreter's own: threads of a group that a model or mesh still holds abort there, now
    and then ("terminate called without an active exception").
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(
    module: str, *arguments: str, world: int = 2, seconds: float = 240, device: str = "cpu"
) -> list[str]:
    """Run ``python -m module arguments`` as ``world`` ranks; what each printed.

    Skips the test where ``device`` is ``"cuda"`` and there are fewer GPUs than ranks.

    Raises:
        AssertionError: a rank failed, or was not done in time; with what the ranks printed. None is left.
    """
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices, here are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        logs = [Path(folder) / f"{rank}.log" for rank in range(world)]
        ranks = [start(module, arguments, rank, world, port, logs[rank], device) for rank in range(world)]
        try:
            end = time.monotonic() + seconds
            while any(rank.poll() is None for rank in ranks):
                is_late = time.monotonic() > end
                if is_late or any(
                    rank.poll() for rank in ranks
                ):  # the others would wait for the one that failed
                    break
                time.sleep(0.05)
            codes = [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        printed = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    assert codes == [0] * world, "\n".join(
        f"rank {rank}: {'killed, not done in time' if code is None else f'exit code {code}'}\n{text[-4000:]}"
        for rank, (code, text) in enumerate(zip(codes, printed, strict=True))
    )
    return printed


def free_port() -> int:
    """Not one of those that systems hand out by themselves (from 32768 on): other ranks' would take it."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port in 100")


def start(
    module: str,
    arguments: tuple[str, ...],
    rank: int,
    world: int,
    port: int,
    log: Path,
    device: str = "cpu",
) -> subprocess.Popen[bytes]:
    """One rank of several, which prints into ``log``."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        _DEVICE: device,
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
