"""Part ``compile`` of `benchmarks.gpu`: the extension, and Triton's kernels in parallel.

A specialisation of a kernel takes some two seconds of one core, and tests and suites ask for hundreds, one
after the other. So all of them are run first on a GPU that is not there (`benchmarks.dry`), which tells what
they launch; that is compiled on all cores, into the cache that the parts after this one use. The list is made
anew each time, so it cannot be of another version. Without a GPU it compiles for ``--card``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.dry.device import CARDS, Card, card_of
from benchmarks.dry.everything import jobs, run_jobs
from benchmarks.dry.launches import aim, compile_one, read_launches, watch_cache
from benchmarks.gpu import everything
from benchmarks.results import ROOT


class Compiled(NamedTuple):
    """One specialisation: its kernel, whether it was in the cache, bytes of shared memory of a block."""

    kernel: str
    was_there: bool
    shared_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--card", default="h200", choices=CARDS, help="to compile for where there is no GPU")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--max_seconds", type=float, default=float("inf"))
    args = parser.parse_args(argv)
    begun = time.monotonic()
    until = begun + args.max_seconds
    build_extension()
    card = card_of(torch.device("cuda", 0)) if torch.cuda.is_available() else CARDS[args.card]
    try:
        import triton
    except ImportError as error:
        print(f"WITHOUT TRITON: {error}; nothing of it is compiled", file=sys.stderr)
        return 0
    print(f"Triton {triton.__version__}, for {card.name}: what tests and suites launch", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # What is known by then is compiled in the rest of the time.
        failed = run_jobs(jobs(card, *everything(), Path(folder)), args.workers, (begun + until) / 2)
        found = read_launches(sorted(Path(folder).glob("*.jsonl")))
    for name, text in failed.items():
        print(f"\n{name}\n{text[-4000:]}")
    done = compile_all(found, card, args.workers, until)
    were_there = sum(one.was_there for one in done)
    print(f"{len(done)} of {len(found)} specialisations compiled, {were_there} of them before")
    too_large = sorted({one.kernel for one in done if one.shared_bytes > card.shared_memory})
    for kernel in too_large:
        print(f"{kernel}: wants more shared memory than {card.name} has, {card.shared_memory} bytes a block")
    return int(bool(failed or too_large or len(done) < len(found)))


def build_extension() -> None:
    """In place; a machine without compilers goes on without it, and is told so."""
    done = subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT)
    said = "from fastdpo.kernels import cuda; print(cuda.unavailable_reason() or '')"
    reason = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True).stdout
    if done.returncode or reason.strip():
        why = reason.strip() or f"setup.py ended with {done.returncode}"
        print(f"WITHOUT THE CUDA BACKEND: {why}", file=sys.stderr, flush=True)


def compile_all(
    found: dict[tuple[str, str], str], card: Card, workers: int | None, until: float
) -> list[Compiled]:
    """Compile them in processes of their own, until a time of `time.monotonic`; what is done by then."""
    done: list[Compiled] = []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(card,))
    try:
        futures = {pool.submit(_compile, name, data): name for (name, _), data in found.items()}
        for future in as_completed(futures, timeout=max(until - time.monotonic(), 0.1)):
            try:
                done.append(future.result())
            except Exception as error:
                print(f"{futures[future]}: does not compile: {type(error).__name__}: {error}", flush=True)
    except TimeoutError:
        print("no time is left; the same command goes on", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return done


_was_there: list[bool] = []


def _begin(card: Card) -> None:
    aim(card)
    watch_cache(lambda kernel, hit: _was_there.append(hit))


def _compile(name: str, data: str) -> Compiled:
    kernel = compile_one(name, data)
    return Compiled(name, _was_there[-1], kernel.metadata.shared)


if __name__ == "__main__":
    sys.exit(main())
