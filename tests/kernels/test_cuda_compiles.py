"""What nvcc made of the CUDA kernels in the built extension: registers, spills, the width of accesses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.compiled import CompiledKernel, find_cuobjdump, library_architectures, run_cuobjdump
from fastdpo.kernels import native

# What this extension was built for; without CUDA one that the fixture skips.
BUILT_FOR = tuple(native._C.cuda_archs.split()) if native.cuda_problem() is None else ("sm_80",)
CUDA_ARCHITECTURES = tuple(arch for arch in BUILT_FOR if arch.startswith("sm_"))
# kThreadBound of csrc/cuda/row_dispatch.cuh: two blocks of the 10 warps that V = 152k takes.
THREADS = 640
REGISTERS_PER_MULTIPROCESSOR = 65536
# fp32 and bf16 logits; with D and without; softmax alone, with a transform, with a transform and statistics.
NUM_KERNELS = 2 * 2 * 3

Kernels = dict[str, CompiledKernel]


@pytest.fixture(params=CUDA_ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, compiled: Callable[[str, str], Kernels]) -> Kernels:
    """With their instructions, of which the extension has 36 MB of text: ten seconds."""
    found = compiled("library", request.param)
    return {name: kernel for name, kernel in found.items() if kernel.family == "row"}


needs_the_library = pytest.mark.skipif(
    native.cuda_problem() is not None or find_cuobjdump() is None,
    reason=str(native.cuda_problem() or "needs the cuobjdump of CUDA or of triton"),
)


@needs_the_library
def test_the_extension_has_the_code_that_it_says() -> None:
    """Machine code for every family that nvcc 13 knows, and PTX for what is between them and to come."""
    machine, ptx = library_architectures(Path(str(native._C.__file__)))
    assert set(CUDA_ARCHITECTURES) <= set(machine)
    assert [f"compute_{name.removeprefix('sm_')}" for name in ptx] == [
        name for name in BUILT_FOR if name.startswith("compute_")
    ]
    if native._C.cuda_runtime_version >= 13000:
        assert BUILT_FOR == ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_100")


@needs_the_library
def test_no_kernel_has_a_stack_and_rows_take_few_registers() -> None:
    """As the library's own tables of resources have it, of every kernel and architecture."""
    text = run_cuobjdump("--dump-resource-usage", Path(str(native._C.__file__)))
    found = re.findall(r"Function (\w+):\s*\n.*?REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", text)
    row_kernels = [name for name, *_ in found if "row_kernel" in name]
    assert len(row_kernels) == NUM_KERNELS * len(CUDA_ARCHITECTURES)
    for name, registers, stack, local in found:
        assert (int(stack), int(local)) == (0, 0), name
        granted = -(-int(registers) // 8) * 8
        assert name not in row_kernels or granted * THREADS <= REGISTERS_PER_MULTIPROCESSOR, name


def writes_d(name: str) -> bool:
    return "D" in name.split(", ")


@pytest.mark.promise(45)
@pytest.mark.slow
def test_no_spills_and_no_local_memory(kernels: Kernels) -> None:
    assert len(kernels) == NUM_KERNELS
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0 and kernel.count(r"(LDL|STL)(\..*)?") == 0, name


@pytest.mark.slow
def test_registers_allow_two_blocks_on_a_multiprocessor(kernels: Kernels) -> None:
    for name, kernel in kernels.items():
        granted = -(-kernel.registers // 8) * 8
        assert granted * THREADS <= REGISTERS_PER_MULTIPROCESSOR, (name, kernel.registers)


@pytest.mark.slow
def test_memory_is_accessed_16_bytes_at_a_time(kernels: Kernels) -> None:
    """Logits by asynchronous copies past L1, those that do not fit on chip by loads, D by stores."""
    for name, kernel in kernels.items():
        assert kernel.count(r"LDGSTS\.E\.BYPASS\..*128.*"), name
        assert kernel.count(r"LDG\.E\.128.*"), name
        assert bool(kernel.count(r"STG\.E\.128.*")) == writes_d(name), name
        assert (kernel.load_bytes, kernel.d_store_bytes) == (16, 16 * writes_d(name)), name
        assert kernel.count(r"LDS\.128.*"), name
        # A generic access would mean that the compiler lost track of which memory it is.
        assert kernel.count(r"(LD|ST)(\.E.*)?") == 0, name


@pytest.mark.slow
def test_clusters_only_where_there_are_clusters(kernels: Kernels) -> None:
    """From sm_90 on sums go to the other blocks' shared memory (STAS), each with barriers of its own."""
    for name, kernel in kernels.items():
        has_clusters = kernel.architecture != "sm_80"
        assert bool(kernel.count(r"STAS.*")) == has_clusters, name
        assert bool(kernel.count(r"SYNCS\.PHASECHK.*TRYWAIT.*")) == has_clusters, name
        # The cluster's barrier waits for all memory traffic of a thread: once a launch, not once a row.
        assert kernel.count(r"UCGABAR_WAIT.*") == int(has_clusters), name
