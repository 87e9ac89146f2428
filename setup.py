"""Builds the extension ``fastdpo._C`` with ninja; everything else about the package is in pyproject.toml.

The C++ kernels are built wherever there is a C++17 compiler (``CXX``, else g++, c++ or clang++), the
CUDA kernels too where there is an nvcc: in ``CUDA_HOME``, else on PATH, else in ``/usr/local/cuda``, else in
the newest ``/usr/local/cuda-*``. What is missing or fails costs one clear line, and the install goes on
without it. Torch is not needed to build. ``FASTDPO_CUDA=0`` in the environment leaves nvcc alone.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from shlex import quote

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"

# Not -ffast-math: NaN and -inf mean something in a row of logits. These two only free the vectoriser.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math"
)
MIN_SETUPTOOLS = (77,)  # licenses by their SPDX names
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


def ninja_file(cxx: str, nvcc: str | None, module: Path) -> str:
    import pybind11

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


def build_to(target: Path) -> None:
    """Builds ``fastdpo._C`` as far as the machine allows, and says what it did not build and why."""
    cxx = find_cxx()
    if cxx is None:
        say("no C++ compiler found: installing without the compiled kernels")
        return
    if missing := missing_tools():
        say(f"{' and '.join(missing)} not found: installing without the compiled kernels;")
        say(f"with `pip install {' '.join(missing)}` and another install they are built")
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
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(module, target)


def old_setuptools() -> str | None:
    """What setuptools there is where it is none that reads this pyproject.toml."""
    try:
        import setuptools
    except ImportError:
        return "no setuptools"
    version = tuple(int(n) for n in re.findall(r"\d+", setuptools.__version__)[:1])
    return None if version >= MIN_SETUPTOOLS else f"setuptools {setuptools.__version__}"


def main() -> None:
    if (found := old_setuptools()) is not None:
        wanted = f"got {found}, wanted setuptools >= {MIN_SETUPTOOLS[0]}"
        if "--inplace" not in sys.argv:
            sys.exit(f"fastdpo: {wanted}: pip install 'setuptools>={MIN_SETUPTOOLS[0]}'")
        say(f"{wanted}: building in place without it")
        build_to(ROOT / "fastdpo" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
        return
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext

    class NinjaBuildExt(build_ext):
        def build_extension(self, ext: Extension) -> None:
            build_to(Path(self.get_ext_fullpath(ext.name)))

    setup(ext_modules=[Extension("fastdpo._C", [], optional=True)], cmdclass={"build_ext": NinjaBuildExt})


main()
