"""``fastdpo bench``: runs suites, keeps every case as it is measured, compares with an older file.

What it takes, and its exit codes: `benchmarks.options`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import compare_results, report
from benchmarks.harness import DeviceLost, environment, free_bytes, recover, why
from benchmarks.method import WHOLE, is_ours
from benchmarks.options import SETTINGS, parse
from benchmarks.problem import problem_of
from benchmarks.results import ROOT, ResultFile, is_gpu, read_result, runs_of
from benchmarks.sizes import preset_of
from benchmarks.suites import Case, Options, check_options, contenders_of, make_cases
from fastdpo.ops.backends import backend_report

try:
    from tqdm import tqdm
except ImportError:  # a GPU image's Python runs the suites with what it has
    tqdm = None


class TimeUp(KeyboardInterrupt):
    """The time is over: no `Exception`, because it is no contender's mistake."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeUp in what is under way after ``seconds``; no limit outside the main thread."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_cases(
    cases: Sequence[Case], file: ResultFile, device: torch.device, *, max_seconds: float | None = None
) -> bool:
    """Run what the file does not hold yet; every result is on disk before the next case begins.

    Args:
        max_seconds: begin no case that, by the pace so far, would end after it; one that is under way then,
            the first too, is given up, and tried last when the run is gone on with.

    Returns:
        Whether all cases are in the file now.

    Raises:
        DeviceLost: a CUDA error that stays; what it cost is in the file, and a new process can go on.
    """
    todo = [case for case in cases if case.key not in file.done]
    if len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} of {len(cases)} cases are measured already")
    tried = {result["key"] for result in file.results}
    todo.sort(key=lambda case: case.key in tried)
    start, spent = time.monotonic(), 0.0
    said: set[tuple[str, str]] = set()
    form = "{percentage:3.0f}% |{bar:20}| {elapsed} gone, {remaining} left {postfix}"
    total = sum(case.cost for case in todo)
    with tqdm(total=total, bar_format=form, file=sys.stderr) if tqdm else nullcontext() as bar:
        for number, case in enumerate(todo):
            gone = time.monotonic() - start
            expected = gone / spent * case.cost if spent else 0.0
            left = None if max_seconds is None else max_seconds - gone
            if left is not None and expected > left:
                print(f"stopped after {gone:.0f} s with {len(todo) - number} cases left; --resume goes on")
                return False
            if bar is not None:
                bar.set_postfix_str(case.key)
            result = _run_one(case, file, device, left)
            line = _line(result, said)
            spent += case.cost
            if bar is None:
                remaining = (time.monotonic() - start) / spent * (total - spent)
                print(f"{line}\n{100 * spent / total:.0f} %, about {remaining:.0f} s left")
            else:
                tqdm.write(line, file=sys.stdout)
                bar.update(case.cost)
            if "given_up" in result:
                print(
                    f"stopped: the {max_seconds:.0f} s are over with {len(todo) - number} cases left; "
                    "--resume goes on"
                )
                return False
    return True


def _run_one(case: Case, file: ResultFile, device: torch.device, left: float | None = None) -> dict[str, Any]:
    """One case, kept in the file whatever becomes of it.

    Raises:
        DeviceLost: as `run_cases`; the contender that it was lost to has failed in the file.
    """
    free = free_bytes(device)
    sizes = {"bytes_needed": case.bytes_needed, "bytes_free": free}
    result: dict[str, Any] = {}
    reason, lost = None, None
    if (skipped := why_not(case, free)) is not None:
        result = {"skipped": skipped, **sizes}
    else:
        try:
            with time_limit(left):
                result = case.run()
        except torch.OutOfMemoryError as error:
            reason = f"out of memory, {_gib(free)} were free: {str(error).splitlines()[0]}"
            result = {"skipped": reason, **sizes}
        except DeviceLost as error:
            lost = error
        except TimeUp:
            result = {"skipped": f"given up: the {left:.0f} s that were left are over", "given_up": True}
        except Exception as error:  # of no contender's own: the others' cases are still to be had
            reason = why(error)
            result = {"failed": {WHOLE: reason}}
    if reason is not None or "given_up" in result:
        problem_of.cache_clear()
        try:
            recover(device, WHOLE, reason or "given up")
        except DeviceLost as error:
            lost = error
    if lost is not None:
        result = _lost(case, file, lost)
    result = {"suite": case.suite, "key": case.key, "failed": {}, "not_run": {}, "contenders": {}} | result
    file.add({**result, "settings": dict(case.settings)})
    if lost is not None:
        raise lost
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def why_not(case: Case, free: int) -> str | None:
    """Why a case is not begun where so many bytes are free, or None."""
    if case.lacking is not None:
        return f"needs {case.lacking}, which is not installed"
    if case.bytes_needed > free:
        needed = f"{case.bytes_needed} bytes ({_gib(case.bytes_needed)})"
        return f"does not fit: needs at least {needed}, {_gib(free)} are free"
    return None


def _lost(case: Case, file: ResultFile, lost: DeviceLost) -> dict[str, Any]:
    """What is kept of a case that lost the device: a new process tries again without who lost it."""
    before = next((r.get("lost_to", {}) for r in file.results if r["key"] == case.key), {})
    reason = f"{lost.reason}; the device answered no more"
    if lost.contender in before or lost.contender not in contenders_of(case.suite):
        return {"failed": {**before, lost.contender: reason}}
    said = f"the device was lost to {lost.contender}: {lost.reason}; to be tried again without it"
    return {"skipped": said, "lost_to": {**before, lost.contender: reason}}


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
            ("ratio_to_gemm", "x GEMM", ".3f"), ("gb_per_s", "GB/s", ".0f"), ("host_ms", "ms host", ".2f"),
            ("peak_mib", "MiB", ".0f"),
            ("useful_tokens_per_s", "tokens/s", ".0f"), ("backbone_positions_per_pair", "positions", ".0f"),
            ("logps_error_nats", "nats", ".1e"), ("dhidden_relative_error", "dhidden", ".1e"),
            ("dweight_relative_error", "dweight", ".1e"), ("loss_error_nats", "nats", ".1e"),
            ("gradient_norm_relative_error", "gradient norm", ".1e"),
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


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        return _main(args, argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace, argv: Sequence[str]) -> int:
    start = time.monotonic()
    old = read_result(args.compare) if args.compare else None
    if args.new is not None:
        assert old is not None
        return report(compare_results(old, read_result(args.new)))
    resumed = read_result(args.resume) if args.resume else None
    asked = {name: value for name in SETTINGS if (value := getattr(args, name)) not in (None, [])}
    plans: list[dict[str, Any]] = [{"suites": args.suites}]
    before = old or resumed
    if before is not None and not args.suites:
        plans = plans_of_results(before) if before is old else runs_of(before)
        args.device = args.device or plans[0].get("device")
    device = _device(args.device)
    # Of an older file: what each plan measured there; of suites that were named: whatever it measured.
    keys = [set(plan.get("keys", _measured(old))) for plan in plans]
    plans = [_filled({**plan, **asked}, device) for plan in plans]
    lost = {result["key"]: result.get("lost_to", {}) for result in (resumed or {}).get("results", ())}
    cases: dict[str, Case] = {}
    every = list(dict.fromkeys(suite for plan in plans for suite in plan["suites"]))
    for plan, wanted in zip(plans, keys, strict=True):
        options = Options(device=device, lost=lost, **{name: plan[name] for name in SETTINGS})
        check_options(every, options, list(asked))
        for case in (case for suite in plan["suites"] for case in make_cases(suite, options)):
            if old is None or case.key in wanted:
                cases.setdefault(case.key, case)
    if not cases:
        raise ValueError("compare: no case of the older file is among those asked for")
    info = environment(device)
    file = ResultFile(args.results, info, plans[0], part=args.part)
    if args.resume:
        file = ResultFile.resume(args.resume, info, plans[0])
    elif len(plans) > 1:
        file.payload["runs"] = plans
    print(f"{info['device']}, torch {info['packages']['torch']}; {len(cases)} cases")
    if any(plan["preset"] == "tiny" for plan in plans):
        print("  tiny sizes show that everything runs and agrees; they say nothing about speed")
    for name, reason in backend_report().items():
        if reason:
            print(f"  backend {name} does not run here: {reason}")
    try:
        return _run_and_report(list(cases.values()), file, device, args, old)
    except DeviceLost as error:
        print(f"{error}\nthe device answers no more in this process; a new one goes on", flush=True)
        assert file.path is not None
        left = None if args.max_seconds is None else args.max_seconds - (time.monotonic() - start)
        if left is not None and left <= 0:
            return 1
        return go_on_in_a_new_process(argv, file.path, left)


def _filled(plan: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A request with the defaults of the device for what it leaves open."""
    preset = plan.get("preset") or preset_of(device)
    defaults = {
        "preset": preset, "repeats": 3 if preset == "tiny" else 20, "seconds": 12.0, "without": [],
        "suites": [], "device": device.type,
    }  # fmt: skip
    given = {name: plan.get(name) for name in (*SETTINGS, "suites")}
    return {**given, **{name: given.get(name) or value for name, value in defaults.items()}}


def _measured(payload: Mapping[str, Any] | None) -> set[str]:
    return {result["key"] for result in (payload or {}).get("results", ()) if "skipped" not in result}


def plans_of_results(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """What would measure a file's results again: their settings, less what picks cases, each once.

    Raises:
        ValueError: it has none.
    """
    found: dict[str, dict[str, Any]] = {}
    for result in payload["results"]:
        settings = result.get("settings") or payload["settings"]
        plan = {name: settings.get(name) or None for name in SETTINGS}
        plan |= {"models": None, "tokens": None, "tasks": None, "suites": []}
        plan = found.setdefault(json.dumps(plan, sort_keys=True), {**plan, "keys": []})
        plan["suites"] += [] if result["suite"] in plan["suites"] else [result["suite"]]
        plan["keys"] += [] if "skipped" in result else [result["key"]]
    if not found:
        raise ValueError(f"{payload['file']}: got no results, wanted some to compare with")
    return [{"device": "cuda" if is_gpu(payload) else "cpu", **plan} for plan in found.values()]


def go_on_in_a_new_process(argv: Sequence[str], path: Path, left: float | None) -> int:
    """Never returns where it works: this process becomes one with no CUDA in it yet."""
    words = [sys.executable, "-m", "benchmarks.run", *argv, "--resume", str(path)]
    words += [] if left is None else ["--max_seconds", f"{left:.0f}"]
    places = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.stdout.flush()
    os.execve(words[0], words, {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))})


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
    paged = _write_page(file.folder, args.page) if args.page else 0
    keys = {case.key for case in cases}
    wrong = [
        f"{result['key']}: {name} FAILED: {reason}"
        for result in file.results if result["key"] in keys
        for name, reason in result["failed"].items() if is_ours(name) or name == WHOLE
    ]  # fmt: skip
    print("\n".join(wrong), end="\n" if wrong else "")
    code = 0
    if old is not None and is_complete:
        code = report(compare_results(old, {"file": file.path and file.path.name, **file.payload}))
    return 1 if wrong else code or paged


def _write_page(results: Path, page: Path) -> int:
    """Tables and plots of all files of a folder; 0, or 2 where they cannot be written."""
    from benchmarks import tables  # which the suites do without

    code = tables.main(["--results", str(results), "--page", str(page)])
    if code == 0:
        print(f"wrote {page / 'benchmarks.md'} and its plots")
    return code


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; nothing was run")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
