"""Every case of every suite on a GPU that is not there.

    python -m benchmarks.dry                             # all suites at full sizes, on an H200
    python -m benchmarks.dry op memory --card b200
    python -m benchmarks.dry op --models llama-3-8b --tasks stash pairs --preset tiny

Inputs, contenders, checks, plans, launches and the memory of each are made as on the card; nothing is
computed, and no number that comes of it says anything. Prints what raises; exit code 1 where something does
that is no peer's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers.trainer  # noqa: F401  bitsandbytes, which it imports, would look for CUDA's own functions

from benchmarks.dry.claims import Claims
from benchmarks.dry.device import CARDS, Card, Pretence
from benchmarks.dry.launches import Launches
from benchmarks.dry.ours import prepare, take_for_granted

SUITES = ("op", "row", "step", "memory", "accuracy")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument(
        "--card", type=read_card, default=CARDS["h200"], help=f"{', '.join(CARDS)}, or one as JSON"
    )
    parser.add_argument("--launches", type=Path, help="a file to record Triton's launches in")
    parser.add_argument("--preset", default="gpu", help="which sizes")
    for name in ("models", "tasks", "contenders"):
        parser.add_argument(f"--{name}", nargs="+")
    parser.add_argument("--tokens", nargs="+", type=int)
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def read_card(text: str) -> Card:
    """A card by name, or as `Card.to_json` writes one."""
    if text in CARDS:
        return CARDS[text]
    if text.startswith("{"):
        return Card.from_json(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, wanted one of {', '.join(CARDS)}")


def _run(args: argparse.Namespace) -> int:
    pretence, launches = Pretence(args.card), Launches(args.launches)
    claims = Claims(lambda: pretence.mode.made_up)
    claims.install()
    with pretence:
        launches.install(pretence)
        prepare(pretence)
        take_for_granted(pretence)
        from benchmarks.suites import Options, check_options, make_cases

        options = Options(
            torch.device("cuda"), args.preset, repeats=1, seconds=0.0, models=args.models, tokens=args.tokens,
            tasks=args.tasks, contenders=args.contenders, is_brief=True,
        )  # fmt: skip
        suites = args.suites or SUITES
        check_options(suites, options, [])
        cases = [case for suite in suites for case in make_cases(suite, options)]
        if "step" in suites:
            _few_layers()  # what all of them need is known by now
        failed, said = 0, set[str]()
        for case in cases:
            claims.begin()
            start = time.monotonic()
            problems = _problems(case, pretence)
            failed += sum(is_ours for is_ours, _ in problems)
            lines = [line for _, line in problems if line not in said]
            said.update(lines)
            print("\n  ".join([f"{case.key}: {time.monotonic() - start:.1f} s", *lines]), flush=True)
    print(
        f"{launches.count} launches of {len(launches.specialisations)} specialisations; "
        f"{claims.left_aside} claims left aside, which hang on values"
    )
    return int(failed > 0)


def _few_layers() -> None:
    """Two layers show what twenty-four of the same kind do."""
    from benchmarks.step_contenders import SIZES

    for name, size in SIZES.items():
        SIZES[name] = replace(size, layers=2)


def _problems(case: Any, pretence: Pretence) -> list[tuple[bool, str]]:
    """What is wrong with a case: whether it is ours to mend, and what it is."""
    from benchmarks.harness import why
    from benchmarks.method import is_ours
    from benchmarks.problem import problem_of
    from benchmarks.run import why_not

    if (reason := why_not(case, pretence.card.memory)) is not None:
        return [(False, f"not run: {reason}")]
    try:
        result = case.run()
    except torch.OutOfMemoryError as error:
        problem_of.cache_clear()
        return [(False, f"not run: {error}")]
    except Exception as error:
        return [(True, f"FAILED: {why(error)}")]
    found = [(is_ours(name), f"{name} FAILED: {reason}") for name, reason in result["failed"].items()]
    return found + [(False, f"{name} not run: {reason}") for name, reason in result["not_run"].items()]


if __name__ == "__main__":
    sys.exit(main())
