"""What Triton's probe says of machines on which it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT

pytest.importorskip("triton")

from fastdpo.kernels import triton_device

CUDA = torch.device("cuda", 0)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a GPU on which launching the probe does what is given; how often it was launched."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is launched under the interpreter")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    triton_device._launch_problem.cache_clear()

    def make(*errors: Exception | None) -> list[int]:
        launched: list[int] = []

        def launch(index: int) -> None:
            launched.append(index)
            error = errors[len(launched) - 1]
            if error is not None:
                raise error

        monkeypatch.setattr(triton_device, "_launch_probe", launch)
        return launched

    yield make
    triton_device._launch_problem.cache_clear()


def test_a_kernel_is_launched_once_for_each_gpu(probe: Any) -> None:
    launched = probe(None, None)
    assert all(triton_device.unavailable_reason(CUDA) is None for _ in range(3))
    assert triton_device.unavailable_reason(torch.device("cuda", 1)) is None and launched == [0, 1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/root/.triton"), "set TRITON_CACHE_DIR"),
        (OSError(30, "Read-only file system", "/root/.triton"), "set TRITON_CACHE_DIR"),
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
            "install gcc",
        ),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "Python's headers"),
        (ValueError("sm_130 is not a recognized processor"), "cannot run a kernel on this GPU"),
    ],
)
def test_what_cannot_run_says_why(probe: Any, error: Exception, said: str) -> None:
    launched = probe(error)
    reason = triton_device.unavailable_reason(CUDA)
    assert reason is not None and said in reason and "\n" not in reason
    assert triton_device.unavailable_reason(CUDA) == reason and launched == [0]


def test_no_memory_for_the_probe_is_no_answer(probe: Any) -> None:
    probe(torch.OutOfMemoryError("none left"), None)
    with pytest.raises(torch.OutOfMemoryError):
        triton_device.unavailable_reason(CUDA)
    assert triton_device.unavailable_reason(CUDA) is None


COMPILED = """
import triton
from benchmarks.compiled import StubDriver
from fastdpo.kernels import triton_device
import torch
triton.runtime.driver.set_active(StubDriver(90))
try:
    triton_device._probe_kernel.warmup(torch.empty(1), grid=(1,))
except Exception as error:
    print(triton_device._problem_of(error))
"""


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_what_triton_really_stumbles_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # no folder can be made in it, not even by root
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "file" / "cache")
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"cannot write what it compiles to {environment['TRITON_CACHE_DIR']}" in done.stdout
