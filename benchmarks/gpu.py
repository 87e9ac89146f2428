"""What ``make gpu`` does on a machine with a GPU, in parts that end by themselves within nine minutes.

    python -m benchmarks.gpu                          # all parts, one after the other
    python -m benchmarks.gpu --part compile           # the extension, and Triton's kernels into build/triton
    python -m benchmarks.gpu --part tests             # the tests; also tests-op, tests-kernels, tests-others
    python -m benchmarks.gpu --part 2 --results DIR   # of the suites; files of all parts can lie together
    python -m benchmarks.gpu --dry                    # without a GPU: every test and case, and no number

Needs no ``make``, no ``.venv`` and no network: the Python that runs it, with what that has. A part says
before what it will need. It is stopped before ``PART_SECONDS`` are over, in the midst of a test or a case if
need be; what was measured is on disk by then, and the same command again goes on with what is left. Each runs
in a process of its own. Where there is no git, the environment variable ``FASTDPO_COMMIT`` names the commit;
without either nothing is gone on with.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRITON_CACHE = ROOT / "build" / "triton"
PART_SECONDS = 540.0
# Of these, for a process that starts with trainers to import, and for one that has to end.
RESERVE = 40.0
INTERRUPTED = 130
ENDINGS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Part:
    """What a part runs.

    Args:
        what: in words, with what it wants to have: said before it begins.
        tests: paths for pytest.
        suites: words for `benchmarks.run`.
        packages: whose versions are said before it begins; without one, what needs it is left out.
    """

    what: str
    tests: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("torch", "triton", "pytest")


LOOP = ("torch", "triton", "transformers", "accelerate", "numpy")


def _suites(what: str, *words: str) -> Part:
    peers = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
    packages = (*LOOP, "peft", "datasets", "trl") if words[0] == "step" else ("torch", "triton", *peers)
    return Part(f"{what}; free GPU memory decides which cases and contenders fit", (), words, packages)


OP = ("op", "--models")
PARTS = {
    "compile": Part(
        "the extension (a C++ compiler, nvcc, setuptools 77 or newer, pybind11, ninja; without them the cpu "
        "and cuda backends are left out) and every Triton kernel of tests and suites (all cores, 2 GiB of "
        "host memory each)",
        packages=("torch", "triton", "pytest", "setuptools", "pybind11", "ninja"),
    ),
    "tests-op": Part("tests of the op: pytest, up to 40 GiB of GPU memory", ("tests/gpu/test_op_on_gpu.py",)),
    "tests-kernels": Part(
        "tests of the kernels: pytest, 2 GiB of GPU memory",
        (
            "tests/kernels/test_rows.py", "tests/kernels/test_sequence.py",
            "tests/kernels/test_lean_kernel.py", "tests/kernels/test_divergence_kernels.py",
        ),
    ),
    "tests-others": Part(
        "tests of divergences, sequences, adapters and the loop: pytest, up to 22 GiB of GPU memory",
        (
            "tests/gpu/test_adapted_on_gpu.py", "tests/gpu/test_divergence_on_gpu.py",
            "tests/gpu/test_sequence_on_gpu.py", "tests/training/loop/test_offload.py",
        ),
        packages=(*LOOP, "pytest"),
    ),
    "1": _suites("Llama-3-8B's head, every task", *OP, "llama-3-8b", "--tokens", "16384"),
    "2": _suites("Llama-3-8B's head over N", *OP, "llama-3-8b", "--tokens", "1024", "4096", "65536"),
    "3": _suites(
        "heads of small models and of Qwen2.5-7B", *OP, "gemma-3-270m", "qwen2.5-0.5b", "llama-3.2-1b",
        "qwen2.5-7b",
    ),
    "4": _suites("heads of Gemma-2-9B and Llama-3-70B", *OP, "gemma-2-9b", "llama-3-70b"),
    "5": _suites("row kernels, errors, memory", "row", "accuracy", "memory"),
    "6": _suites("whole steps of small models", "step", "--models", "qwen2.5-0.5b", "llama-3.2-1b"),
    "7": _suites("whole steps of Llama-3-8B with LoRA", "step", "--models", "llama-3-8b-lora"),
}  # fmt: skip
# The tiny sizes know one model: the first part of a suite stands for all.
QUICK = {"1": ("op",), "5": PARTS["5"].suites, "6": ("step",)}


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = _parse(argv)
    begun = time.time()
    os.environ.setdefault("TRITON_CACHE_DIR", str(TRITON_CACHE))
    if (lacking := _lacking(args)) is not None:
        print(f"error: {lacking}; nothing was run", file=sys.stderr)
        return 1
    if args.dry:
        from benchmarks.dry.everything import dry_run

        return dry_run(args.card, *everything(_names(args)))
    from benchmarks.results import check_writable

    codes: list[int] = []
    try:
        check_writable(args.results)
        for name in _names(args):
            try:
                codes.append(_run(name, args, rest, begun + PART_SECONDS))
            except KeyboardInterrupt:
                codes.append(INTERRUPTED)
                break
            begun = time.time()
        if args.device == "cuda" and not args.quick and any(PARTS[name].suites for name in _names(args)):
            _write_tables(args.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return max(codes, default=0)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--part", choices=("tests", *PARTS), metavar="PART", help=", ".join(("tests", *PARTS))
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--dry", action="store_true", help="on a GPU that is not there")
    parser.add_argument("--card", default="h200", help="which, for --dry and for compiling where none is")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats")
    parser.add_argument("--repeats", type=int, default=None, help="of suites op and row")
    args, rest = parser.parse_known_args(argv)
    if args.quick and args.part is not None and args.part not in QUICK:
        parser.exit(
            0, f"part {args.part} has nothing of its own at the tiny sizes; {', '.join(QUICK)} have\n"
        )
    return args, rest


def _names(args: argparse.Namespace) -> list[str]:
    """The parts that are asked for, in their order."""
    if args.part == "tests":
        return [name for name, part in PARTS.items() if part.tests]
    if args.part is not None:
        return [args.part]
    return [*QUICK] if args.quick else [*PARTS]


def everything(names: Iterable[str] = PARTS) -> tuple[list[str], list[tuple[str, ...]]]:
    """Test files and suites of parts."""
    parts = [PARTS[name] for name in names]
    return [path for part in parts for path in part.tests], [part.suites for part in parts if part.suites]


def _lacking(args: argparse.Namespace) -> str | None:
    """What this Python does not have and nothing goes without."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch that loads ({error})"
    if args.device == "cuda" and not args.dry and args.part != "compile" and not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees no CUDA GPU"
    return None


def _run(name: str, args: argparse.Namespace, rest: Sequence[str], until: float) -> int:
    """One part in a process of its own; its exit code, 1 where no time is left for it."""
    left = until - RESERVE - time.time()
    if left <= 0:
        over = f"what came before it took its {PART_SECONDS:.0f} s; call it again"
        print(f"error: part {name}: {over}", file=sys.stderr)
        return 1
    from benchmarks.gpu_needs import versions_of
    from benchmarks.harness import package_version

    part = PARTS[name]
    print(f"\npart {name}, {left:.0f} s at most: {part.what}")
    print(f"  with {versions_of(part.packages)}", flush=True)
    if part.tests and package_version("pytest") is None:
        print(f"error: part {name}: pytest is not installed; none of it was run", file=sys.stderr)
        return 1
    if part.tests:
        words = ["benchmarks.gpu_tests", name, *part.tests, "--results", str(args.results.resolve()), *rest]
    elif part.suites:
        words = ["benchmarks.run", *_suite_words(name, args, left), *rest]
    else:
        words = ["benchmarks.gpu_compile", "--card", args.card, "--max_seconds", f"{left:.0f}"]
    return _wait(subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT), until)


def _suite_words(name: str, args: argparse.Namespace, left: float) -> list[str]:
    import torch

    from benchmarks.harness import environment
    from benchmarks.results import newest_of_part

    suites = QUICK[name] if args.quick else PARTS[name].suites
    words = [*suites, "--device", args.device, "--part", name, "--max_seconds", f"{left:.0f}"]
    words += ["--preset", "tiny" if args.quick else "gpu"]
    if suites[0] in ("op", "row"):
        words += ["--seconds", "6"] + ([] if args.repeats is None else ["--repeats", str(args.repeats)])
    newest = newest_of_part(args.results, int(name), environment(torch.device(args.device)))
    results = args.results.resolve()
    return words + (["--results", str(results)] if newest is None else ["--resume", str(results / newest)])


def _wait(process: subprocess.Popen[bytes], until: float) -> int:
    """Its exit code; one that does not end by itself is asked to, then made to: what it measured is kept.

    Raises:
        KeyboardInterrupt: so was this process asked to, by ^C or SIGTERM; after the other has ended.
    """
    interrupted: list[int] = []
    handlers = {number: signal.signal(number, lambda n, frame: interrupted.append(n)) for number in ENDINGS}
    last_word: signal.Signals | None = None
    ends = time.monotonic() + max(until - RESERVE / 4 - time.time(), 0.1)
    try:
        while (code := process.poll()) is None:
            if interrupted and last_word is None:
                ends = 0.0  # now
            if time.monotonic() > ends:
                last_word = signal.SIGINT if last_word is None else signal.SIGKILL
                process.send_signal(last_word)
                ends = time.monotonic() + RESERVE / 8
            time.sleep(0.05)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if interrupted:
        raise KeyboardInterrupt
    return code


def _write_tables(results: Path) -> None:
    """README and docs from the project's own results, a page beside any others."""
    words = [] if results.resolve() == RESULTS else ["--results", str(results), "--page", str(results)]
    if subprocess.run([sys.executable, "-m", "benchmarks.tables", *words], cwd=ROOT).returncode:
        print(
            "not all tables and plots were written; `make tables` writes them where matplotlib is",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
