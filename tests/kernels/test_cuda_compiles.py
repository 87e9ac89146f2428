"""What the compiler makes of the CUDA row kernel: registers, spills, and the width of its memory accesses."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = ("80", "90a")
# kThreadBound of csrc/cuda/row_dispatch.cuh: two blocks of the 10 warps that V = 152k takes.
THREADS = 640
REGISTERS_PER_MULTIPROCESSOR = 65536
# fp32 and bf16 logits; with D and without; softmax alone, with a transform, with a transform and statistics.
NUM_KERNELS = 2 * 2 * 3


@dataclass(frozen=True)
class Compiled:
    """The kernels of one architecture by mangled name."""

    reports: dict[str, str]  # what ptxas says of each
    instructions: dict[str, Counter[str]]


def compile_for(arch: str, folder: Path) -> tuple[str, Path]:
    """ptxas's report and the machine code."""
    cubin = folder / f"sm_{arch}.cubin"
    target = f"arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    command = ["nvcc", *flags, str(CSRC / "row_kernels.cu")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr, cubin


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    spec = importlib.util.find_spec("triton")
    folders = [] if spec is None else [Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin"]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(map(str, folders)))


def parse_reports(text: str) -> dict[str, str]:
    parts = re.split(r"Compiling entry function '(\w+)'", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parse_sass(text: str) -> dict[str, Counter[str]]:
    parts = re.split(r"Function : (\w+)", text)
    instruction = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return {
        name: Counter(instruction.findall(body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    cuobjdump = find_cuobjdump()
    if shutil.which("nvcc") is None or cuobjdump is None:
        pytest.skip("needs nvcc on PATH, and the cuobjdump of CUDA or of triton")
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(lambda arch: compile_for(arch, folder), ARCHS))
    results = {}
    for arch, (report, cubin) in zip(ARCHS, outputs, strict=True):
        sass = subprocess.run(
            [cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        results[arch] = Compiled(parse_reports(report), parse_sass(sass))
    return results


@pytest.fixture(params=ARCHS)
def kernels(request: pytest.FixtureRequest, compiled: dict[str, Compiled]) -> Compiled:
    return compiled[request.param]


def count(instructions: Counter[str], pattern: str) -> int:
    return sum(number for name, number in instructions.items() if re.fullmatch(pattern, name))


def writes_d(name: str) -> bool:
    """The first flag of the template's arguments, which follow the type of the logits."""
    match = re.search(r"row_kernelI\w+?Lb([01])E", name)
    assert match is not None, name
    return match[1] == "1"


def test_no_spills_and_no_local_memory(kernels: Compiled) -> None:
    assert len(kernels.reports) == NUM_KERNELS
    for name, report in kernels.reports.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, (name, report)
    for name, instructions in kernels.instructions.items():
        assert count(instructions, r"(LDL|STL)(\..*)?") == 0, name


def test_registers_allow_two_blocks_on_a_multiprocessor(kernels: Compiled) -> None:
    for name, report in kernels.reports.items():
        registers = re.search(r"Used (\d+) registers", report)
        assert registers is not None, report
        granted = -(-int(registers[1]) // 8) * 8
        assert granted * THREADS <= REGISTERS_PER_MULTIPROCESSOR, (name, report)


def test_memory_is_accessed_16_bytes_at_a_time(kernels: Compiled) -> None:
    """Logits by asynchronous copies past L1, those that do not fit on chip by loads, D by stores."""
    assert len(kernels.instructions) == NUM_KERNELS
    for name, instructions in kernels.instructions.items():
        assert count(instructions, r"LDGSTS\.E\.BYPASS\..*128.*"), name
        assert count(instructions, r"LDG\.E\.128.*"), name
        assert bool(count(instructions, r"STG\.E\.128.*")) == writes_d(name), name
        assert count(instructions, r"LDS\.128.*"), name
        # A generic access would mean that the compiler lost track of which memory it is.
        assert count(instructions, r"(LD|ST)(\.E.*)?") == 0, name


def test_clusters_only_where_there_are_clusters(compiled: dict[str, Compiled]) -> None:
    """On sm_90 sums go to the other blocks' shared memory (STAS), and each waits at a barrier of its own."""
    for arch, kernels in compiled.items():
        for name, instructions in kernels.instructions.items():
            has_clusters = arch == "90a"
            assert bool(count(instructions, r"STAS.*")) == has_clusters, name
            assert bool(count(instructions, r"SYNCS\.PHASECHK.*TRYWAIT.*")) == has_clusters, name
            # The cluster's barrier waits for all memory traffic of a thread: once a launch, not once a row.
            assert count(instructions, r"UCGABAR_WAIT.*") == int(has_clusters), name
