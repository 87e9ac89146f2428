"""What ``make gpu`` runs: every suite at full sizes, in parts of under ten minutes, into one result file.

    python -m benchmarks.gpu                    # all parts, one after the other
    python -m benchmarks.gpu --part 2           # goes on in the newest file of this commit, or begins one
    python -m benchmarks.gpu --device cpu --quick    # the same code at tiny sizes

A part that runs out of its time stops before a case; the same command again goes on with what is left.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import run
from benchmarks.harness import environment
from benchmarks.results import RESULTS, SAME, read_results
from benchmarks.suites import REAL_MODELS

PART_SECONDS = 540.0
OTHERS = [model for model in REAL_MODELS if model != "llama-3-8b"]
PARTS = {
    1: ["op", "--models", "llama-3-8b"],
    2: ["op", "--models", *OTHERS],
    3: ["row", "accuracy", "memory"],
    4: ["step"],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats")
    parser.add_argument("--part", type=int, choices=PARTS, help="default: all, one after the other")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args, rest = parser.parse_known_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    codes = []
    for part in [args.part] if args.part else PARTS:
        words = list(PARTS[part])
        if args.quick and "--models" in words:
            if part == 2:
                continue  # one tiny model stands for all
            words = words[: words.index("--models")]
        words += ["--device", args.device, "--preset", "tiny" if args.quick else "gpu"]
        words += ["--seconds", "6", "--max_seconds", str(PART_SECONDS)]
        words += [] if args.repeats is None else ["--repeats", str(args.repeats)]
        newest = _newest(args.results, torch.device(args.device))
        words += ["--results", str(args.results)] if newest is None else ["--resume", str(newest)]
        codes.append(run.main([*words, *rest]))
        if codes[-1] == 130:
            break
    return max(codes)


def _newest(folder: Path, device: torch.device) -> Path | None:
    """The last result file that this run may go on in."""
    if not folder.is_dir():
        return None
    here = environment(device)
    alike = [
        payload for payload in read_results(folder)
        if all(payload["environment"].get(name) == here.get(name) for name in SAME)
    ]  # fmt: skip
    return folder / alike[-1]["file"] if alike else None


if __name__ == "__main__":
    sys.exit(main())
