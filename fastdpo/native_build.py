"""Builds the extension ``fastdpo._C`` with ninja: for setup.py, and for ``fastdpo build`` afterwards.

The C++ kernels are built on Linux wherever there is a C++17 compiler (``CXX``, else g++, c++ or clang++), the
CUDA kernels too where there is an nvcc: in ``CUDA_HOME``, else on PATH, else in ``/usr/local/cuda``, else in
the newest ``/usr/local/cuda-*``. What is missing or fails costs one clear line. ``FASTDPO_CUDA=0`` in the
environment leaves nvcc alone.

Neither torch nor another part of fastdpo is needed: setup.py runs this file by itself.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

PACKAGE = Path(__file__).resolve().parent
# Not -ffast-math: NaN and -inf mean something in a row of logits. These two only free the vectoriser.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math"
)
# Machine code for Ampere and Ada, Hopper, and Blackwell's two families, as far as nvcc knows them. The GPUs
# between and after them take the PTX of the last of the names here that is known.
CUDA_ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")
PTX_ARCHS = ("compute_90", "compute_100")
NVCC_FLAGS = "-std=c++17 -O3 --threads=0 -Xcompiler=-fPIC,-fvisibility=hidden"
CUDA_ROOT = Path("/usr/local")

RULES = """
rule cxx
  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out
  description = c++ $in
  depfile = $out.d
rule nvcc
  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out
  description = nvcc $in
  depfile = $out.d
rule link
  command = $linker -shared $in -o $out
  description = link $out
"""


def say(line: str) -> None:
    print(f"fastdpo: {line}", file=sys.stderr, flush=True)


def find_cxx() -> str | None:
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """The path of nvcc where the CUDA kernels are wanted and can be tried."""
    if os.environ.get("FASTDPO_CUDA") == "0":
        say("FASTDPO_CUDA=0: building without the CUDA kernels")
        return None

    def in_toolkit(folder: Path) -> str | None:
        return shutil.which("nvcc", path=str(folder / "bin"))

    if home := os.environ.get("CUDA_HOME"):
        if (nvcc := in_toolkit(Path(home))) is not None:
            return nvcc
        say(f"CUDA_HOME is {home}, which has no bin/nvcc: looking for one elsewhere")
    by_age = sorted(
        CUDA_ROOT.glob("cuda-*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)]
    )
    folders = [CUDA_ROOT / "cuda", *reversed(by_age)]
    nvcc = shutil.which("nvcc") or next(filter(None, map(in_toolkit, folders)), None)
    if nvcc is None:
        say(f"no nvcc in CUDA_HOME, on PATH or in {folders[0]}: building without the CUDA kernels")
    return nvcc


def known_archs(nvcc: str) -> tuple[list[str], list[str]]:
    """Of ``CUDA_ARCHS`` and ``PTX_ARCHS`` those that this nvcc compiles for; the newest PTX alone."""

    def listed(flag: str) -> set[str]:
        return set(subprocess.run([nvcc, flag], capture_output=True, text=True).stdout.split())

    codes, archs = listed("--list-gpu-code"), listed("--list-gpu-arch")
    machine = [arch for arch in CUDA_ARCHS if arch.rstrip("a") in codes]
    return machine, [arch for arch in PTX_ARCHS if arch in archs][-1:]


def missing_tools() -> list[str]:
    """What a build needs beside compilers and this Python has not, by the names that pip knows."""
    has_ninja = importlib.util.find_spec("ninja") or shutil.which("ninja")
    return ([] if has_ninja else ["ninja"]) + ([] if importlib.util.find_spec("pybind11") else ["pybind11"])


def ninja_command() -> list[str]:
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(cxx: str, nvcc: str | None, module: Path, sources: Path) -> str:
    import pybind11  # type: ignore[import-not-found, unused-ignore]

    includes = " ".join(
        f"-I{quote(path)}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])
    )
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    defines = f"-DFASTDPO_COMPILER={quote(chr(34) + version + chr(34))}"
    linker, nvcc_command = f"{quote(cxx)} -fopenmp", f"{quote(nvcc or 'nvcc')} -ccbin {quote(cxx)}"
    nvcc_flags = NVCC_FLAGS
    if nvcc:
        machine, ptx = known_archs(nvcc)
        for code in (*machine, *ptx):
            nvcc_flags += f" -gencode arch={code.replace('sm_', 'compute_')},code={code}"
        archs = " ".join((*machine, *ptx))
        defines += f" -DFASTDPO_WITH_CUDA -DFASTDPO_CUDA_ARCHS={quote(chr(34) + archs + chr(34))}"
        # The runtime is linked in, and its names kept in: torch brings a runtime of its own.
        linker = f"{nvcc_command} -Xcompiler=-fopenmp -cudart=static -Xlinker=--exclude-libs=ALL"

    compilers = {".cpp": ("cxx", CXX_FLAGS), ".cu": ("nvcc", nvcc_flags)}
    lines, objects = [RULES.format(cxx=quote(cxx), nvcc=nvcc_command)], []
    for source in sorted(sources.rglob("*.*")):
        if source.suffix not in compilers or (source.suffix == ".cu" and not nvcc):
            continue
        rule, flags = compilers[source.suffix]
        if source.name == "bindings.cpp":
            flags += f" {includes} {defines}"
        objects.append(escape(module.parent / f"{source.name}.o"))
        lines.append(f"build {objects[-1]}: {rule} {escape(source)}\n  flags = {flags.replace('$', '$$')}\n")
    lines.append(
        f"build {escape(module)}: link {' '.join(objects)}\n  linker = {linker.replace('$', '$$')}\n"
    )
    return "\n".join(lines)


def build(cxx: str, nvcc: str | None, sources: Path, folder: Path) -> Path | None:
    """The built module, or None where a compiler failed (it has said why)."""
    module = folder / "_C.so"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(cxx, nvcc, module, sources))
    return module if subprocess.run(ninja_command(), cwd=folder).returncode == 0 else None


def build_to(target: Path, sources: Path, folder: Path) -> bool:
    """Builds ``fastdpo._C`` as far as the machine allows, and says what it did not build and why.

    Args:
        target: the file that the module becomes; left alone where nothing is built.
        sources: the folder of the C++ and CUDA sources.
        folder: where ninja works, and finds what an earlier build left.

    Returns:
        Whether there is a module.
    """
    if sys.platform != "linux":
        say(f"{sys.platform}: the compiled kernels are for Linux; plain torch has their place")
        return False
    cxx = find_cxx()
    if cxx is None:
        say("no C++ compiler found: installing without the compiled kernels")
        return False
    if missing := missing_tools():
        say(f"{' and '.join(missing)} not found: installing without the compiled kernels;")
        say(f"with `pip install {' '.join(missing)}` and another install they are built")
        return False
    nvcc = find_nvcc()
    module = build(cxx, nvcc, sources, folder)
    if module is None and nvcc:
        say(f"{nvcc} failed, see above: building without the CUDA kernels")
        nvcc = None
        module = build(cxx, nvcc, sources, folder)
    if module is None:
        say(f"{cxx} failed, see above: installing without the compiled kernels")
        return False
    say(f"built fastdpo._C with the {'C++ and the CUDA' if nvcc else 'C++'} kernels")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside, then in its place at once: a process may have the old one loaded.
    beside = target.with_name(f"{target.name}.new")
    shutil.copy2(module, beside)
    beside.replace(target)
    return True


def main(argv: Sequence[str]) -> int:
    """``fastdpo build``: the extension, into the package that is installed.

    Raises:
        ValueError: there are words, no sources, or no right to write there.
    """
    if argv:
        if set(argv) <= {"-h", "--help"}:
            print("usage: fastdpo build\n\n" + " ".join((__doc__ or "").split("\n\n")[1].split()))
            return 0
        raise ValueError(f"build: got {' '.join(argv)}, wanted no words")
    # In a wheel beside the modules, in a checkout beside the package.
    sources = next((path for path in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if path.is_dir()), None)
    if sources is None:
        raise ValueError(f"build: no csrc in {PACKAGE}, wanted the sources: install fastdpo again")
    if not os.access(PACKAGE, os.W_OK):
        raise ValueError(f"build: {PACKAGE} cannot be written, wanted a package of your own: use a venv")
    target = PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with tempfile.TemporaryDirectory(prefix="fastdpo-build-") as folder:
        is_built = build_to(target, sources, Path(folder))
    print(f"built {target}" if is_built else f"not built: see above; what was there is as it was ({PACKAGE})")
    return 0 if is_built else 1
