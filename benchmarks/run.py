"""``fastdpo bench``: runs suites, keeps every case as it is measured, compares with an older file.

    fastdpo bench op row                                     # the sizes of this device, a GPU's or a CPU's
    fastdpo bench op --device cpu --preset tiny              # what the tests run
    fastdpo bench op --models llama-3-8b --tokens 4096 --tasks stash pairs
    fastdpo bench --resume benchmarks/results/FILE.json      # goes on where a run stopped
    fastdpo bench --compare OLD.json                         # runs what is in OLD again
    fastdpo bench --compare OLD.json --with NEW.json         # runs nothing

Exit code: 0; 1 where a contender of ours is wrong or raised, or a case is slower than the noise explains; 2
for a mistake in what was asked; 130 after ^C, which keeps what was measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import compare_results, report
from benchmarks.harness import environment, free_bytes
from benchmarks.problem import MODELS, TASKS
from benchmarks.results import RESULTS, ResultFile, read_result
from benchmarks.suites import PRESETS, SUITES, Case, Options, make_cases
from fastdpo.ops.backends import backend_report

try:
    from tqdm import tqdm
except ImportError:  # a GPU image's Python runs the suites with what it has
    tqdm = None

SETTINGS = ("preset", "repeats", "seconds", "models", "tokens", "tasks", "contenders", "without", "data")


def run_cases(
    cases: Sequence[Case], file: ResultFile, device: torch.device, *, max_seconds: float | None = None
) -> bool:
    """Run what the file does not hold yet; every result is on disk before the next case begins.

    Args:
        max_seconds: begin no case that, by the pace so far, would end after it.

    Returns:
        Whether all cases are in the file now.
    """
    todo = [case for case in cases if case.key not in file.done]
    if len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} of {len(cases)} cases are measured already")
    start, spent = time.monotonic(), 0.0
    said: set[tuple[str, str]] = set()
    form = "{percentage:3.0f}% |{bar:20}| {elapsed} gone, {remaining} left {postfix}"
    total = sum(case.cost for case in todo)
    with tqdm(total=total, bar_format=form, file=sys.stderr) if tqdm else nullcontext() as bar:
        for number, case in enumerate(todo):
            gone = time.monotonic() - start
            expected = gone / spent * case.cost if spent else 0.0
            if max_seconds is not None and gone + expected > max_seconds:
                print(f"stopped after {gone:.0f} s with {len(todo) - number} cases left; --resume goes on")
                return False
            if bar is not None:
                bar.set_postfix_str(case.key)
            line = _line(_run_one(case, file, device), said)
            spent += case.cost
            if bar is None:
                left = (time.monotonic() - start) / spent * (total - spent)
                print(f"{line}\n{100 * spent / total:.0f} %, about {left:.0f} s left")
            else:
                tqdm.write(line, file=sys.stdout)
                bar.update(case.cost)
    return True


def _run_one(case: Case, file: ResultFile, device: torch.device) -> dict[str, Any]:
    free = free_bytes(device)
    if case.bytes_needed > free:
        needed = f"{case.bytes_needed} bytes ({_gib(case.bytes_needed)})"
        said = f"does not fit: needs at least {needed}, {_gib(free)} are free"
        result: dict[str, Any] = {"skipped": said, "bytes_needed": case.bytes_needed, "bytes_free": free}
    else:
        try:
            result = case.run()
        except torch.OutOfMemoryError as error:
            said = f"out of memory, {_gib(free)} were free: {str(error).splitlines()[0]}"
            result = {"skipped": said, "bytes_needed": case.bytes_needed, "bytes_free": free}
    result = {"suite": case.suite, "key": case.key, "failed": {}, "not_run": {}, "contenders": {}} | result
    file.add(result)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _line(result: dict[str, Any], said: set[tuple[str, str]]) -> str:
    """One result: its name, then a line for every contender; why one does not run is said once."""
    if "skipped" in result:
        return f"{result['key']}: skipped, {result['skipped']}"
    lines = [result["key"]]
    for name, cell in result["contenders"].items():
        parts = []
        if "median_ms" in cell:
            parts.append(f"{cell['median_ms']:10.2f} ms +-{100 * cell.get('noise', 0):.0f}%")
        for key, unit, form in (
            ("ratio_to_gemm", "x GEMM", ".3f"), ("gb_per_s", "GB/s", ".0f"), ("peak_mib", "MiB", ".0f"),
            ("useful_tokens_per_s", "tokens/s", ".0f"), ("backbone_positions_per_pair", "positions", ".0f"),
            ("logps_error_nats", "nats", ".1e"), ("dhidden_relative_error", "dhidden", ".1e"),
            ("dweight_relative_error", "dweight", ".1e"),
        ):  # fmt: skip
            if cell.get(key) is not None:
                parts.append(f"{cell[key]:{form}} {unit}")
        lines.append(f"  {name:<22} " + "  ".join(parts))
    lines += [f"  {name:<22} FAILED: {reason}" for name, reason in result["failed"].items()]
    for name, reason in result["not_run"].items():
        if (name, reason) not in said:
            said.add((name, reason))
            lines.append(f"  {name:<22} not run: {reason}")
    if result.get("losses"):
        from benchmarks.step import loss_table  # of a suite whose trainers take seconds to import

        lines += [f"  {line}" for line in loss_table(result["losses"]).splitlines()]
    return "\n".join(lines)


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
        "--models", nargs="+", metavar="MODEL", help=f"of {', '.join(MODELS)}; of suite step its own sizes"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="N, positions")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--contenders", nargs="+", help="only these; the floor runs always")
    parser.add_argument("--without", nargs="+", default=[], help="all but these")
    parser.add_argument("--repeats", type=int, help="of each contender; default: 20, on `tiny` 3")
    parser.add_argument("--seconds", type=float, help="about how long to time one case; default: 12")
    parser.add_argument(
        "--max_seconds", type=float, help="begin no case that would end later; --resume goes on"
    )
    parser.add_argument("--data", help="suite step: preference pairs, JSONL; default: pairs made up")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
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
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        return _main(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace) -> int:
    old = read_result(args.compare) if args.compare else None
    if args.new is not None:
        assert old is not None
        return report(compare_results(old, read_result(args.new)))
    before = old or (read_result(args.resume) if args.resume else None)
    if before is not None and not args.suites:
        # The same settings again, but for what is asked for otherwise.
        args.suites = before["settings"].get("suites", [])
        for name in SETTINGS:
            if getattr(args, name, None) in (None, [], ()) and name in before["settings"]:
                setattr(args, name, before["settings"][name])
        args.device = args.device or before["settings"].get("device")
    device = _device(args.device)
    args.preset = args.preset or ("gpu" if device.type == "cuda" else "small")
    args.repeats = args.repeats or (3 if args.preset == "tiny" else 20)
    args.seconds = args.seconds or 12.0
    settings = {name: getattr(args, name) for name in SETTINGS}
    options = Options(device=device, **settings)
    cases = [case for suite in args.suites for case in make_cases(suite, options)]
    if old is not None:
        measured = {result["key"] for result in old["results"] if "skipped" not in result}
        cases = [case for case in cases if case.key in measured]
    if not cases:
        raise ValueError("compare: no case of the older file is among those asked for")
    info, settings = environment(device), {**settings, "suites": list(args.suites), "device": device.type}
    file = (
        ResultFile.resume(args.resume, info, settings)
        if args.resume
        else ResultFile(args.results, info, settings)
    )
    print(f"{info['device']}, torch {info['packages']['torch']}; {len(cases)} cases")
    for name, reason in backend_report().items():
        if reason:
            print(f"  backend {name} does not run here: {reason}")
    return _run_and_report(cases, file, device, args, old)


def _run_and_report(
    cases: Sequence[Case], file: ResultFile, device: torch.device, args: argparse.Namespace, old: Any
) -> int:
    try:
        is_complete = run_cases(cases, file, device, max_seconds=args.max_seconds)
    except KeyboardInterrupt:
        kept = (
            f"{file.path} keeps what was measured; --resume {file.path} goes on"
            if file.path
            else "nothing yet"
        )
        print(f"interrupted: {kept}")
        return 130
    print(f"wrote {file.path}")
    keys = {case.key for case in cases}
    wrong = [
        f"{result['key']}: {name} FAILED: {reason}"
        for result in file.results if result["key"] in keys
        for name, reason in result["failed"].items() if is_ours(name)
    ]  # fmt: skip
    print("\n".join(wrong), end="\n" if wrong else "")
    code = 0
    if old is not None and is_complete:
        code = report(compare_results(old, {"file": file.path and file.path.name, **file.payload}))
    return 1 if wrong else code


def is_ours(name: str) -> bool:
    """Whether a contender is fastdpo: a peer that fails is a result, ours is a mistake to mend."""
    return name.startswith("fastdpo") or name in ("triton", "cuda", "cpu", "reference") or name in OUR_LAYOUTS


OUR_LAYOUTS = ("padded", "packed", "shared_prompt", "auto")


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; nothing was run")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
