"""``fastdpo bench``: runs suites, keeps every case as it is measured, compares with an older file.

    fastdpo bench op row                                     # the sizes of this device, a GPU's or a CPU's
    fastdpo bench op --device cpu --preset tiny              # what the tests run
    fastdpo bench op memory accuracy --results DIR --page DIR  # JSON, tables and plots in a folder of yours
    fastdpo bench op --models llama-3-8b --tokens 4096 --tasks stash pairs
    fastdpo bench --resume benchmarks/results/FILE.json      # goes on where a run stopped
    fastdpo bench --compare OLD.json                         # runs what is in OLD again
    fastdpo bench --compare OLD.json --with NEW.json         # runs nothing

Exit code: 0; 1 where a contender of ours is wrong, raised, is slower than the noise explains, or is gone
where it was; 2 for a mistake in what was asked; 130 after ^C, which keeps what was measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.problem import MODELS, TASKS
from benchmarks.results import RESULTS
from benchmarks.sizes import PRESETS
from benchmarks.suites import SUITES

# What is kept of a request, and may be asked for otherwise when a file is gone on with or compared.
SETTINGS = ("preset", "repeats", "seconds", "models", "tokens", "tasks", "contenders", "without", "data")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastdpo bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    parser.add_argument(
        "--preset", choices=PRESETS, help="which sizes; default: gpu on a GPU, small on a CPU"
    )
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL", help=f"of {', '.join(MODELS)}; of step and context their own"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, help="N, positions; of suite context T, its row's tokens"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--contenders", nargs="+", help="only these; the floor runs always")
    parser.add_argument("--without", nargs="+", default=[], help="all but these")
    parser.add_argument("--repeats", type=int, help="op, row: of each contender; default: 20, on `tiny` 3")
    parser.add_argument("--seconds", type=float, help="op, row: about how long to time a case; default: 12")
    parser.add_argument(
        "--max_seconds", type=float, help="begin no case that would end later, give up one that does"
    )
    parser.add_argument("--data", help="suite step: preference pairs, JSONL; default: pairs made up")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--page", type=Path, metavar="DIR", help="write their tables and plots there")
    parser.add_argument("--part", type=int, help="number that the result file's name says")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a result file to go on with")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="a result file to compare with")
    parser.add_argument("--with", type=Path, metavar="NEW", dest="new", help="compare this file; run nothing")
    args = parser.parse_args(list(argv))
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        parser.error(f"suite: got {unknown[0]!r}, wanted one of {', '.join(SUITES)}")
    if args.new is not None and args.compare is None:
        parser.error("--with is for --compare OLD")
    if not (args.suites or args.resume or args.compare):
        parser.error(f"name a suite: {', '.join(SUITES)}")
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats: got {args.repeats}, wanted 1 at least")
    for name in ("seconds", "max_seconds"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            parser.error(f"--{name}: got {value}, wanted a number of seconds above 0")
    if args.new is not None:
        for name in ("suites", "resume", "device", "max_seconds", "page", *SETTINGS):
            if getattr(args, name) not in (None, []):
                parser.error(f"--{name}: got {getattr(args, name)}, but --with runs nothing")
    return args
