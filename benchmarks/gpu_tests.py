"""A part of tests of `benchmarks.gpu`: pytest, with a record that is written test by test.

    python -m benchmarks.gpu_tests tests-op tests/gpu/test_op_on_gpu.py --results DIR

The record is one JSON object a line: what the machine is, then each test as it begins and as it ends. A run
in the same circumstances goes on in it: with the tests that it has no outcome of, last the one that was
under way when it stopped.
Exit code: 0 where all of the part's tests are there and none failed; 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import environment
from benchmarks.results import ROOT, differing, slug


class Record:
    """The outcomes of a part's tests, on disk as they come."""

    def __init__(self, folder: Path, part: str, here: dict[str, Any]) -> None:
        """Goes on in the last record of these circumstances, if there is one."""
        self.outcomes: dict[str, str] = {}
        self.begun: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{slug(here['device'])}-{part}"
        for number in range(1, 10_000):
            self.path = folder / f"{stem}-{number}.jsonl"
            if not self.path.exists():
                self._write(environment=here)
                return
            lines = [json.loads(line) for line in self.path.read_text().splitlines()]
            if lines and not differing(lines[0]["environment"], here):
                self._read(lines[1:])
                return

    def _read(self, lines: Sequence[dict[str, Any]]) -> None:
        for line in lines:
            self.begun.add(line["test"])
            if "outcome" in line:
                self.outcomes[line["test"]] = line["outcome"]

    def _write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def begin(self, test: str) -> None:
        self._write(test=test)

    def end(self, test: str, outcome: str, seconds: float, why: str | None) -> None:
        self.outcomes[test] = outcome
        self._write(test=test, outcome=outcome, seconds=round(seconds, 3), why=why)


class Plugin:
    """Of pytest: runs what has no outcome yet, and records what comes of it."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.wanted: list[str] = []
        self.left_out: dict[str, str] = {}  # files, and why
        self._reports: list[Any] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            path, _, reason = report.longrepr
            self.left_out[path] = reason.removeprefix("Skipped: ")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.wanted = [item.nodeid for item in items]
        left = [item for item in items if item.nodeid not in self.record.outcomes]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = sorted(left, key=lambda item: item.nodeid in self.record.begun)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self.record.begin(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcomes = [report.outcome for report in self._reports]
        outcome = next((o for o in ("failed", "skipped") if o in outcomes), "passed")
        why = next((report.longreprtext for report in self._reports if report.outcome == outcome), "")
        seconds = sum(report.duration for report in self._reports)
        self.record.end(nodeid, outcome, seconds, why[-4000:] if outcome != "passed" else None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part")
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--results", type=Path, required=True)
    args, rest = parser.parse_known_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plugin = Plugin(Record(args.results, args.part, environment(device)))
    words = ["-m", "gpu", "--rootdir", str(ROOT), "--continue-on-collection-errors", *args.paths, *rest]
    code = pytest.main(words, plugins=[plugin])
    outcomes = plugin.record.outcomes
    counts = {
        name: sum(outcomes.get(t) == name for t in plugin.wanted) for name in ("passed", "failed", "skipped")
    }
    missing = sum(test not in outcomes for test in plugin.wanted)
    for path, reason in plugin.left_out.items():
        print(f"{path} is left out: {reason}")
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{args.part}: {said}, {missing} not run; {plugin.record.path} has the outcomes", flush=True)
    if missing:
        print("the same command goes on with what is left")
    is_fine = code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and plugin.wanted
    return 0 if is_fine and not counts["failed"] and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
