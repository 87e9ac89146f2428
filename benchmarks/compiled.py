"""What the compilers make of the GPU kernels, without a GPU: registers, spills, the width of memory accesses.

    python -m benchmarks.compiled        # a row for every kernel and architecture

The Triton kernels are compiled for ``ARCHITECTURES``, each in the ways that the ops ask for (the ``CASES`` of
``compile_row.py`` and its neighbours); of the CUDA kernels the machine code in the built ``fastdpo._C`` is
read. Tests hold both to what DESIGN says of them; these are no measurements.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)  # of Triton kernels: A100, H200, B200
# Each a module ``compile_...`` with a function ``compile_all(arch)``.
TRITON_FAMILIES = ("row", "lean", "divergence", "sequence", "scale")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel in one form, for one architecture."""

    family: str  # row, lean, slab, divergence, sequence, scale
    case: str  # what it is asked for; of CUDA kernels the template's arguments
    compiler: str  # "Triton 3.7.1", "nvcc 13.0"
    architecture: str  # sm_90a
    threads: int  # of a block; 0 where the launch decides
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: spills and arrays in local memory
    shared_bytes: int  # of a block; of CUDA kernels without what the launch asks for
    load_bytes: int  # the widest load from memory: what a thread reads of logits or operands at once
    d_store_bytes: int  # the widest store of D; 0 where none is written
    instructions: dict[str, int]  # SASS, by name, in the order in which they first occur
    facts: dict[str, Any] = field(default_factory=dict)  # what the family's tests look at beside

    def count(self, pattern: str) -> int:
        """How many instructions have a name that matches as a whole."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def compiled_rows() -> list[CompiledKernel]:
    """Every Triton kernel for ``ARCHITECTURES``, and every CUDA kernel of the built extension.

    Takes about two minutes, less where Triton's cache (``TRITON_CACHE_DIR``) has the kernels already.

    Raises:
        RuntimeError: Triton is not installed, the extension has no CUDA kernels, or one fails to compile.
    """
    found = [kernel for family in TRITON_FAMILIES for kernel in triton_kernels(family)]
    return found + library_kernels()


def triton_kernels(
    family: str, architectures: Sequence[int] = ARCHITECTURES, cache: Path | None = None
) -> list[CompiledKernel]:
    """One family of Triton kernels, compiled in a process of its own: compiling replaces the driver.

    Args:
        family: of ``TRITON_FAMILIES``.
        architectures: 80 for sm_80.
        cache: Triton's cache folder; None: Triton's own.

    Raises:
        RuntimeError: Triton is not installed, or a kernel does not compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {} if cache is None else {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "benchmarks.compiled", family, *map(str, architectures)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling the Triton kernels of family {family!r} failed:\n{done.stderr}")
    return from_json(done.stdout)


def to_json(kernels: Iterable[CompiledKernel]) -> str:
    return json.dumps([asdict(kernel) for kernel in kernels])


def from_json(text: str) -> list[CompiledKernel]:
    return [CompiledKernel(**fields) for fields in json.loads(text)]


def library_kernels(library: Path | None = None) -> list[CompiledKernel]:
    """The CUDA kernels in a shared library (default: ``fastdpo._C``), for every architecture it has code for.

    Raises:
        RuntimeError: there are none in it, or no ``cuobjdump`` to read it with.
    """
    if library is None:
        from fastdpo.kernels.native import _C, cuda_problem

        if (problem := cuda_problem()) is not None:
            raise RuntimeError(problem)
        library = Path(_C.__file__)
    compiler, kernels = _nvcc_of(library), []
    for (architecture, name), usage, sass in disassemble(library):
        family, case, writes_d = _describe(name)
        kernels.append(_compiled(family, case, compiler, architecture, 0, usage, sass, writes_d=writes_d))
    if not kernels:
        raise RuntimeError(f"{library} has no CUDA kernel")
    return kernels


def _nvcc_of(library: Path) -> str:
    """Which nvcc made its machine code: a note beside that says so."""
    found = re.search(rb"Cuda compilation tools, release ([\d.]+)", library.read_bytes())
    return f"nvcc {found[1].decode()}" if found else "nvcc"


def library_architectures(library: Path) -> tuple[list[str], list[str]]:
    """The architectures for which a library has machine code, and PTX for the driver to compile."""

    def listed(flag: str) -> list[str]:
        return sorted(set(re.findall(r"\.(sm_\w+)\.\w+$", run_cuobjdump(flag, library), re.MULTILINE)))

    return listed("--list-elf"), listed("--list-ptx")


def _describe(name: str) -> tuple[str, str, bool]:
    """Family, case and whether D is written, of a mangled name of ``csrc/cuda``."""
    row = re.search(r"row_kernelI(f|NS_4Bf16E)Lb([01])ELb([01])ELb([01])E", name)
    if row is None:
        plain = re.search(r"(\d+)(\w+)", name.partition("fastdpo")[2])
        return "sequence", plain[2][: int(plain[1])] if plain else name, False
    parts = ["fp32" if row[1] == "f" else "bf16"]
    words = ((row[2], "D"), (row[3], "transform"), (row[4], "statistics"))
    return "row", ", ".join(parts + [word for flag, word in words if flag == "1"]), row[2] == "1"


def report(
    family: str,
    case: str,
    kernel: Any,
    arch: int,
    num_warps: int,
    *,
    writes_d: bool = False,
    facts: dict[str, Any] | None = None,
) -> CompiledKernel:
    """A kernel that Triton's ``warmup`` returned."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        ((_, usage, sass),) = disassemble(cubin)
    usage = usage | {"SHARED": max(usage["SHARED"], kernel.metadata.shared)}
    compiler, architecture = f"Triton {triton.__version__}", f"sm_{arch}"
    return _compiled(
        family, case, compiler, architecture, 32 * num_warps, usage, sass, writes_d=writes_d, facts=facts
    )


def _compiled(
    family: str,
    case: str,
    compiler: str,
    architecture: str,
    threads: int,
    usage: dict[str, int],
    sass: str,
    *,
    writes_d: bool,
    facts: dict[str, Any] | None = None,
) -> CompiledKernel:
    instructions = Counter(INSTRUCTION.findall(sass))
    return CompiledKernel(
        family=family,
        case=case,
        compiler=compiler,
        architecture=architecture,
        threads=threads,
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=usage["SHARED"],
        load_bytes=_widest(instructions, r"(LDG|LDGSTS|UBLKCP|UTMALDG)\b"),
        d_store_bytes=_widest(instructions, r"STG\b") if writes_d else 0,
        instructions=dict(instructions),
        facts=facts or {},
    )


def _widest(instructions: Iterable[str], memory: str) -> int:
    """Bytes of the widest of some accesses, as their names have it: ``LDG.E.128``, ``STG.E.U16``."""
    bits = [32 if re.match(memory, name) else 0 for name in instructions]
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    for i, name in enumerate(instructions):
        for part in name.split(".") if bits[i] else ():
            bits[i] = widths.get(part, bits[i])
    return max(bits, default=0) // 8


def disassemble(binary: Path) -> list[tuple[tuple[str, str], dict[str, int], str]]:
    """Of a cubin or a library: architecture and mangled name, resources, and SASS of every kernel.

    Raises:
        RuntimeError: there is no ``cuobjdump``.
    """
    usage: dict[tuple[str, str], dict[str, int]] = {}
    for architecture, text in _by_architecture(run_cuobjdump("--dump-resource-usage", binary)):
        for name, line in re.findall(r"Function (\w+):\s*\n\s*(.*)", text):
            numbers = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            usage[architecture, name] = {key: int(value) for key, value in numbers}
    sass = {}
    for architecture, text in _by_architecture(run_cuobjdump("--dump-sass", binary)):
        parts = re.split(r"Function : (\w+)", text)
        sass |= {(architecture, name): body for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    return [(key, usage[key], sass[key]) for key in usage]


def _by_architecture(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"^arch = (\w+)$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True)) or [("", text)]


def run_cuobjdump(flag: str, binary: Path) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("there is no cuobjdump: neither on PATH (CUDA's) nor beside triton")
    return subprocess.run([tool, flag, str(binary)], capture_output=True, text=True, check=True).stdout


def find_cuobjdump() -> str | None:
    """The one that comes with triton, which is of a known age, or the toolkit's."""
    spec = importlib.util.find_spec("triton")
    folder = "" if spec is None else str(Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump", path=folder) or shutil.which("cuobjdump")


class StubDriver:
    """Stands for a GPU as far as Triton needs one to compile; each architecture is a device of its own."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


def find_reductions(ttgir: str, dtype: str = "f32") -> dict[str, list[str]]:
    """Shape of what a Triton kernel reduces, and the layouts in which that happens."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    found: dict[str, set[str]] = {}
    pattern = rf"^\s*\}}\) : \(tensor<([\dx]+)x{dtype}, (.*?)>\) ->"
    for shape, layout in re.findall(pattern, ttgir, re.MULTILINE):
        described = re.sub(r"#\w+", lambda match: layouts.get(match[0], match[0]), layout)
        found.setdefault(shape, set()).add(described)
    return {shape: sorted(described) for shape, described in found.items()}


def main(words: list[str]) -> None:
    if not words:
        for kernel in compiled_rows():
            print(
                f"{kernel.family:<10} {kernel.architecture:<7} {kernel.registers:>3} registers, "
                f"{kernel.spilled_bytes} spilled, {kernel.shared_bytes:>6} B shared, "
                f"loads {kernel.load_bytes:>2} B, D {kernel.d_store_bytes:>2} B  {kernel.case}"
            )
        return
    import triton

    family, *architectures = words
    module = importlib.import_module(f"benchmarks.compile_{family}")
    kernels: list[CompiledKernel] = []
    for arch in map(int, architectures):
        triton.runtime.driver.set_active(StubDriver(arch))
        kernels += module.compile_all(arch)
    print(to_json(kernels))


if __name__ == "__main__":
    main(sys.argv[1:])
