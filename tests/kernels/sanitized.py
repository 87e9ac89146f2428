"""The C++ kernels for the CPU under AddressSanitizer and UBSan: `make sanitize`.

    python -m tests.kernels.sanitized       # builds into build/sanitized, runs the CPU's kernel tests

Any report ends the run. Tensors are allocated by the sanitizer's malloc, which has forbidden zones around
each: a row that is read past its tensor's end is found even where the result is right.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig

from tests import ROOT

MODULE = ROOT / "build" / "sanitized" / "_C.so"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
TESTS = ("test_cpu_backend", "test_divergence_cpu", "test_rows", "test_divergence_kernels", "test_sequence")
# Gigabytes, of which each is twice as many here; and compiled kernels of a GPU.
LEFT_OUT = "not 2_31 and not triton and not interpreter and not largest_vocabulary and not few_ulp"


def unavailable_reason() -> str | None:
    """What is missing for a build, or None."""
    compiler = shutil.which("g++")
    if compiler is None:
        return "no g++"
    return None if library("libasan.so") else "g++ has no libasan"


def library(name: str) -> str | None:
    """A library of the compiler's, by its path."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if "/" in found else None


def build() -> None:
    """``_C`` with sanitizers, of the package's own flags without their optimisation."""
    import pybind11

    from fastdpo.native_build import CXX_FLAGS

    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "csrc" / "bindings.cpp"]
    MODULE.parent.mkdir(parents=True, exist_ok=True)
    options = [*CXX_FLAGS.replace("-O3", "").split(), *SANITIZERS.split(), '-DFASTDPO_COMPILER="sanitized"']
    subprocess.run(["g++", "-shared", *options, *includes, *map(str, sources), "-o", str(MODULE)], check=True)


def environment() -> dict[str, str]:
    """Of a process that runs on the sanitized kernels; it imports this module first."""
    preloaded = " ".join(filter(None, map(library, ("libasan.so", "libubsan.so"))))
    return os.environ | {
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0",  # Python's own leaks are many
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "FASTDPO_SANITIZED": str(MODULE),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "PYTHONPATH": str(ROOT),
    }


def run(*words: str) -> int:
    """pytest with ``words`` on the sanitized kernels; its exit code."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.kernels.sanitized",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run([*command, *words], cwd=ROOT, env=environment()).returncode


def _take_its_place() -> None:
    """As ``fastdpo._C``, before anything asks for it."""
    import fastdpo

    loader = importlib.machinery.ExtensionFileLoader("fastdpo._C", os.environ["FASTDPO_SANITIZED"])
    spec = importlib.util.spec_from_loader("fastdpo._C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["fastdpo._C"] = module
    fastdpo._C = module  # type: ignore[attr-defined]


if "FASTDPO_SANITIZED" in os.environ:
    _take_its_place()  # as a plugin of pytest

if __name__ == "__main__":
    if (reason := unavailable_reason()) is not None:
        sys.exit(f"fastdpo: {reason}: the sanitizers cannot be built")
    build()
    files = [f"tests/kernels/{name}.py" for name in TESTS]
    sys.exit(run(*(sys.argv[1:] or ["-x", "-m", "not slow", "-k", LEFT_OUT, *files])))
