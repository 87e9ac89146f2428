"""What the compilers make of the kernels, compiled once for all tests and all of pytest's processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.compiled import (
    CompiledKernel,
    find_cuobjdump,
    from_json,
    library_kernels,
    to_json,
    triton_kernels,
)
from fastdpo.kernels import native
from tests import ROOT


def folder_of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, CompiledKernel]]:
    """The kernels of a family of `benchmarks.compiled` for an architecture, by case.

    The family "library" is all of those in CUDA C++, and "few rows" `FEW_ROWS` of Triton's row kernel.
    """
    folder = folder_of_all_workers(tmp_path_factory)

    def kernels_of(family: str, architecture: str) -> dict[str, CompiledKernel]:
        name = family if family == "library" else f"{family}-{architecture}"
        with (folder / f"compiled-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = folder / f"compiled-{name}.json"
            if not made.exists():
                made.write_text(to_json(_compile(family, architecture, folder / "triton")))
            kernels = from_json(made.read_text())
        return {kernel.case: kernel for kernel in kernels if kernel.architecture == architecture}

    return kernels_of


# Of the row kernel enough for every run of the tests: the family "few rows", compiled in seconds.
FEW_ROWS = ("score", "D in place, statistics")
_COMPILE_FEW = """
import sys
from benchmarks import compile_row, compiled

arch, *names = sys.argv[1:]
compile_row.CASES = {name: compile_row.CASES[name] for name in names}
compiled.main(["row", arch])
"""


def _compile(family: str, architecture: str, cache: Path) -> list[CompiledKernel]:
    if family != "library":
        pytest.importorskip("triton")
        arch = int(architecture.removeprefix("sm_"))
        return _few_rows(arch, cache) if family == "few rows" else triton_kernels(family, [arch], cache)
    if (problem := native.cuda_problem()) is not None:
        pytest.skip(problem)
    if find_cuobjdump() is None:
        pytest.skip("needs the cuobjdump of CUDA or of triton")
    return library_kernels()


def _few_rows(arch: int, cache: Path) -> list[CompiledKernel]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", _COMPILE_FEW, str(arch), *FEW_ROWS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return from_json(done.stdout)
