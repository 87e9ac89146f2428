"""What the compilers make of the kernels, compiled once for all tests and all of pytest's processes."""

from __future__ import annotations

import fcntl
import os
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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, CompiledKernel]]:
    """The kernels of a family of `benchmarks.compiled` for an architecture, by case.

    The family "library" is all of those in CUDA C++.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers

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


def _compile(family: str, architecture: str, cache: Path) -> list[CompiledKernel]:
    if family != "library":
        pytest.importorskip("triton")
        return triton_kernels(family, [int(architecture.removeprefix("sm_"))], cache)
    if (problem := native.cuda_problem()) is not None:
        pytest.skip(problem)
    if find_cuobjdump() is None:
        pytest.skip("needs the cuobjdump of CUDA or of triton")
    return library_kernels()
