"""Tests and suites on a GPU that is not there, in as many processes as there are cores."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.dry.device import CARDS, Card
from benchmarks.results import ROOT


def jobs(
    card: Card, tests: Sequence[str], suites: Sequence[Sequence[str]], launches: Path | None = None
) -> dict[str, list[str]]:
    """Commands by name: each file of tests, and each of the words for `benchmarks.run`.

    Args:
        launches: a folder for what each launches of Triton, a file each; None: it is not kept.
    """
    found: dict[str, list[str]] = {}
    for path in tests:
        found[path] = ["pytest", "-p", "benchmarks.dry.plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
        found[path] += ["-m", "gpu", path, "--dry-card", card.to_json()]
    for words in suites:
        found[" ".join(words)] = ["benchmarks.dry", *words, "--card", card.to_json()]
    if launches is not None:
        for number, command in enumerate(found.values()):
            option = "--launches" if command[0] == "benchmarks.dry" else "--dry-launches"
            command += [option, str(launches / f"{number}.jsonl")]
    return {name: [sys.executable, "-W", "ignore", "-m", *command] for name, command in found.items()}


def run_jobs(
    commands: dict[str, list[str]], workers: int | None = None, until: float = math.inf
) -> dict[str, str]:
    """Run them side by side, saying how each ended; what those printed that failed, by name.

    Args:
        until: a time of `time.monotonic` at which what still runs is ended.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_path())}
    failed: dict[str, str] = {}

    def run(name: str) -> None:
        start = time.monotonic()
        try:
            done = subprocess.run(
                commands[name], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                timeout=None if until == math.inf else max(until - start, 0.1),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            code, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode(errors="replace")
            code, text = 1, f"{text}\nno time was left for it"
        if code:
            failed[name] = text
        last = (text.strip().splitlines() or [""])[-1].strip("= ")
        print(f"{'FAILED ' if code else ''}{name}: {time.monotonic() - start:.0f} s; {last}", flush=True)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        list(pool.map(run, commands))
    return failed


def _path() -> list[str]:
    return [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def dry_run(card: str, tests: Sequence[str], suites: Sequence[Sequence[str]]) -> int:
    """All of them; 1 where one fails, with what it said.

    Raises:
        ValueError: no such card.
    """
    if card not in CARDS:
        raise ValueError(f"card: got {card!r}, wanted one of {', '.join(CARDS)}")
    print(f"a dry run, as on {CARDS[card].name}: nothing is computed, and nothing measured", flush=True)
    failed = run_jobs(jobs(CARDS[card], tests, suites))
    for name, text in failed.items():
        print(f"\n{name}\n{text}")
    print(f"{len(failed)} of {len(tests) + len(suites)} failed")
    return int(bool(failed))
