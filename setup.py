"""Builds the extension ``fastdpo._C`` with ninja; everything else about the package is in pyproject.toml.

The C++ kernels are built wherever there is a C++17 compiler (``CXX``, else g++, c++ or clang++), the
CUDA kernels too where nvcc is in ``CUDA_HOME`` or on PATH. What is missing or fails costs one clear line,
and the install goes on without it. Torch is not needed to build. ``FASTDPO_CUDA=0`` in the environment
leaves nvcc alone.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from shlex import quote

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"

# Not -ffast-math: NaN and -inf mean something in a row of logits. These two only free the vectoriser.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math"
)
# Machine code for Ampere (and Ada) and Hopper; PTX for everything newer.
CUDA_ARCHS = ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90")
GENCODE = " ".join(f"-gencode arch={arch}" for arch in CUDA_ARCHS)
NVCC_FLAGS = f"-std=c++17 -O3 --threads=0 -Xcompiler=-fPIC,-fvisibility=hidden {GENCODE}"

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
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")
    if nvcc is None:
        say("no nvcc in CUDA_HOME or on PATH: building without the CUDA kernels")
    return nvcc


def ninja_command() -> list[str]:
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(cxx: str, nvcc: str | None, module: Path) -> str:
    import pybind11

    includes = " ".join(
        f"-I{quote(path)}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])
    )
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    defines = f"-DFASTDPO_COMPILER={quote(chr(34) + version + chr(34))}"
    linker, nvcc_command = f"{quote(cxx)} -fopenmp", f"{quote(nvcc or 'nvcc')} -ccbin {quote(cxx)}"
    if nvcc:
        archs = " ".join(arch.rpartition("=")[2] for arch in CUDA_ARCHS)
        defines += f" -DFASTDPO_WITH_CUDA -DFASTDPO_CUDA_ARCHS={quote(chr(34) + archs + chr(34))}"
        # The runtime is linked in, and its names kept in: torch brings a runtime of its own.
        linker = f"{nvcc_command} -Xcompiler=-fopenmp -cudart=static -Xlinker=--exclude-libs=ALL"

    compilers = {".cpp": ("cxx", CXX_FLAGS), ".cu": ("nvcc", NVCC_FLAGS)}
    lines, objects = [RULES.format(cxx=quote(cxx), nvcc=nvcc_command)], []
    for source in sorted((ROOT / "csrc").rglob("*.*")):
        if source.suffix not in compilers or (source.suffix == ".cu" and not nvcc):
            continue
        rule, flags = compilers[source.suffix]
        if source.name == "bindings.cpp":
            flags += f" {includes} {defines}"
        objects.append(escape(BUILD / f"{source.name}.o"))
        lines.append(f"build {objects[-1]}: {rule} {escape(source)}\n  flags = {flags.replace('$', '$$')}\n")
    lines.append(
        f"build {escape(module)}: link {' '.join(objects)}\n  linker = {linker.replace('$', '$$')}\n"
    )
    return "\n".join(lines)


def build(cxx: str, nvcc: str | None) -> Path | None:
    """The built module, or None where a compiler failed (it has said why)."""
    module = BUILD / "_C.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text(ninja_file(cxx, nvcc, module))
    return module if subprocess.run(ninja_command(), cwd=BUILD).returncode == 0 else None


class NinjaBuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx = find_cxx()
        if cxx is None:
            say("no C++ compiler found: installing without the compiled kernels")
            return
        nvcc = find_nvcc()
        module = build(cxx, nvcc)
        if module is None and nvcc:
            say(f"{nvcc} failed, see above: building without the CUDA kernels")
            nvcc = None
            module = build(cxx, nvcc)
        if module is None:
            say(f"{cxx} failed, see above: installing without the compiled kernels")
            return
        say(f"built fastdpo._C with the {'C++ and the CUDA' if nvcc else 'C++'} kernels")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target)


setup(ext_modules=[Extension("fastdpo._C", [], optional=True)], cmdclass={"build_ext": NinjaBuildExt})
