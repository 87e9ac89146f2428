"""What the compilers make of the sequence kernels: spills, registers, the order of sums, the ticket."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.test_cuda_compiles import count, find_cuobjdump, parse_reports, parse_sass
from tests.kernels.triton_processes import compile_reports

ROOT = Path(__file__).parents[2]
REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_BLOCK = 48 * 1024  # what every GPU gives without asking
CUDA_ARCHS = ("80", "90a")
TRITON_ARCHS = (80, 90, 100)
# kTeamThreads and kPairThreads of csrc/cuda/sequence.cuh
CUDA_THREADS = {"sequence_sums_kernel": 256, "sigmoid_pairs_kernel": 512}


@pytest.fixture(scope="module", params=CUDA_ARCHS)
def cuda(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """ptxas's reports and the instructions of each kernel, by mangled name."""
    cuobjdump = find_cuobjdump()
    if shutil.which("nvcc") is None or cuobjdump is None:
        pytest.skip("needs nvcc on PATH, and the cuobjdump of CUDA or of triton")
    cubin = tmp_path_factory.mktemp("cubins") / "sequence.cubin"
    target = f"arch=compute_{request.param},code=sm_{request.param}"
    flags = ["-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    command = ["nvcc", *flags, str(ROOT / "csrc" / "cuda" / "sequence.cu")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    return parse_reports(result.stderr), parse_sass(sass.stdout)


def test_cuda_spills_nothing_and_fills_a_multiprocessor(cuda: tuple[dict, dict]) -> None:
    reports, instructions = cuda
    assert len(reports) == len(CUDA_THREADS)
    for name, threads in CUDA_THREADS.items():
        (mangled,) = (each for each in reports if name in each)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in reports[mangled]
        assert count(instructions[mangled], r"(LDL|STL)(\..*)?") == 0, name
        registers = re.search(r"Used (\d+) registers", reports[mangled])
        assert registers is not None, reports[mangled]
        # A thousand threads hide the latency of the loads: most answers are only a few tokens a thread.
        granted = -(-int(registers[1]) // 8) * 8
        assert REGISTERS_PER_SM // (granted * threads) * threads >= 1024, reports[mangled]


def test_cuda_takes_one_ticket_and_reads_losses_past_l1(cuda: tuple[dict, dict]) -> None:
    _, instructions = cuda
    for name in CUDA_THREADS:
        (mangled,) = (each for each in instructions if name in each)
        is_pairs = name == "sigmoid_pairs_kernel"
        atomics = {key: number for key, number in instructions[mangled].items() if key.startswith("ATOM")}
        assert sum(atomics.values()) == is_pairs and all("INC" in key for key in atomics), atomics
        assert count(instructions[mangled], r"RED\b(?!UX).*") == 0, name
        assert count(instructions[mangled], r"MEMBAR\..*GPU") == 2 * is_pairs, name
        assert bool(count(instructions[mangled], r"LDG\.E\.64\.STRONG\.GPU")) == is_pairs, name


@pytest.fixture(scope="module")
def all_triton(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    pytest.importorskip("triton")
    return compile_reports("tests.kernels.sequence_compile", TRITON_ARCHS, tmp_path_factory.mktemp("triton"))


@pytest.fixture(params=TRITON_ARCHS, ids="sm_{}".format)
def triton_reports(request: pytest.FixtureRequest, all_triton: dict[int, dict]) -> dict:
    return all_triton[request.param]


def test_triton_spills_nothing_and_fills_a_multiprocessor(triton_reports: dict) -> None:
    for name, compiled in triton_reports.items():
        assert compiled["stack_bytes"] == 0 and count(compiled["instructions"], r"(LDL|STL)\b.*") == 0, name
        granted = -(-compiled["registers"] // 8) * 8
        threads = compiled["threads"]
        assert REGISTERS_PER_SM // (granted * threads) * threads >= 1024, (name, compiled["registers"])
        assert compiled["shared_bytes"] <= SHARED_BYTES_PER_BLOCK, name


def test_triton_compiles_once_for_batches_of_every_size(triton_reports: dict) -> None:
    for name, compiled in triton_reports.items():
        assert compiled["num_kernels"] == 1, name


def test_triton_adds_in_one_order_with_and_without_a_loss(triton_reports: dict) -> None:
    """Layouts decide which thread adds what; equal ones give the sums of both kernels the same bits."""
    layouts = {name: compiled["reductions"] for name, compiled in triton_reports.items()}
    assert all(len(each) == 1 for each in layouts.values()), layouts
    assert len({each[0] for each in layouts.values()}) == 1, layouts


def test_triton_takes_one_ticket_that_orders_memory(triton_reports: dict) -> None:
    """What a program wrote before its ticket, the last one reads, past L1."""
    for name, compiled in triton_reports.items():
        is_pairs = "pairs" in name
        assert len(compiled["tickets"]) == is_pairs, (name, compiled["tickets"])
        assert all(".gpu.acq_rel.add" in ticket for ticket in compiled["tickets"]), compiled["tickets"]
        assert bool(count(compiled["instructions"], r"LDG\.E\.64\.STRONG\.GPU")) == is_pairs, name
