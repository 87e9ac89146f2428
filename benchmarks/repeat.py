"""Whether two runs of this version agree within the noise that they state: the suites twice, and compared.

    python -m benchmarks.repeat op row step                            # the sizes of this device
    python -m benchmarks.repeat op --models llama-3-8b --tokens 16384  # whatever `fastdpo bench` takes
    python -m benchmarks.repeat op row --first FILE.json               # the second run alone, after ^C

Each run is a process and a result file of its own; nothing else should keep the machine busy meanwhile. Every
contender is compared, peers too, in both directions.

Exit code: 0 where all agree; 1 where one does not, or was not timed twice; otherwise that of `fastdpo bench`,
with what was measured kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import agreement, compare_results, report
from benchmarks.results import ROOT, SAME, check_writable, read_result

FOLDER = ROOT / ".benchmarks" / "repeat"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.repeat", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the two result files")
    parser.add_argument("--first", type=Path, help="the first run's file, where it is there already")
    args, words = parser.parse_known_args(argv)
    try:
        for name in ("--compare", "--with", "--resume"):
            if name in words:
                raise ValueError(f"{name}: this command compares the two runs that it makes")
        check_writable(args.results)
        files = [] if args.first is None else [args.first]
        for path in files:  # better before the second run than after it
            read_result(path)
        while len(files) < 2:
            print(f"run {len(files) + 1} of 2", flush=True)
            code, path = _run(words, args.results.resolve())
            if code != 0 or path is None:
                kept = "" if path is None else f"; {path} keeps what was measured"
                print(f"run {len(files) + 1} ended with {code}, so there is nothing to compare{kept}")
                return code or 1
            files.append(path)
        first, second = (read_result(path) for path in files)
        _same_version(first, second)
        compared = compare_results(first, second)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(compared)
    said, agree = agreement(compared)
    if compared.versions:  # the commit of both is unknown: `report` does not call them one version
        print(said)
    return int(not agree)


def _run(words: Sequence[str], folder: Path) -> tuple[int, Path | None]:
    """Exit code and result file of one run in a process of its own."""
    before = set(folder.glob("*.json"))
    command = [sys.executable, "-m", "benchmarks.run", *words, "--results", str(folder)]
    process = subprocess.Popen(command)
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the process got it too, and keeps what it measured
            continue
    made = sorted(set(folder.glob("*.json")) - before)
    return code, made[0] if len(made) == 1 else None


def _same_version(first: dict[str, Any], second: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: they were made by other code, or on another machine.
    """
    old, new = first["environment"], second["environment"]
    unlike = [
        f"{name} was {old.get(name)}, is {new.get(name)}" for name in SAME if old.get(name) != new.get(name)
    ]
    if unlike:
        raise ValueError(f"--first: {first['file']} is of another version: {'; '.join(unlike)}")


if __name__ == "__main__":
    sys.exit(main())
