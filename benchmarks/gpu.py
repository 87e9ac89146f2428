"""What ``make gpu`` measures: every suite at full sizes, in parts of under nine minutes, a result file each.

    python -m benchmarks.gpu                         # all parts, one after the other
    python -m benchmarks.gpu --part 2                # goes on in its newest file of this commit
    python -m benchmarks.gpu --part 2 --results DIR  # another folder; files of all parts can lie together
    python -m benchmarks.gpu --device cpu --quick    # the same code at tiny sizes

A part ends by itself within ``PART_SECONDS`` of its beginning, in the midst of a case if need be; the same
command again goes on with what is left. Each runs in a process of its own. Where there is no git, the
environment variable ``FASTDPO_COMMIT`` names the commit; without either no file is gone on with.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import environment
from benchmarks.results import RESULTS, ROOT, check_writable, differing, read_results

PART_SECONDS = 540.0
# Of these, for a process that starts with trainers to import, and for one that has to end.
RESERVE = 40.0
PARTS = {
    1: ["op", "--models", "llama-3-8b", "--tokens", "16384"],
    2: ["op", "--models", "llama-3-8b", "--tokens", "1024", "4096", "65536"],
    3: ["op", "--models", "gemma-3-270m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-7b"],
    4: ["op", "--models", "gemma-2-9b", "llama-3-70b"],
    5: ["row", "accuracy", "memory"],
    6: ["step", "--models", "qwen2.5-0.5b", "llama-3.2-1b"],
    7: ["step", "--models", "llama-3-8b-lora"],
}
# The tiny sizes know one model: the first part of a suite stands for all.
QUICK = {1: ["op"], 5: PARTS[5], 6: ["step"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats")
    parser.add_argument("--part", type=int, choices=PARTS, help="default: all, one after the other")
    parser.add_argument("--repeats", type=int, default=None, help="of suites op and row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--begun", type=float, help="Unix time at which what calls this began; default: now")
    args, rest = parser.parse_known_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    parts = QUICK if args.quick else PARTS
    if args.part is not None and args.part not in parts:
        print(f"part {args.part} has nothing of its own at the tiny sizes; {', '.join(map(str, parts))} have")
        return 0
    codes: list[int] = []
    begun = time.time() if args.begun is None else args.begun
    try:
        check_writable(args.results)
        for part in parts if args.part is None else [args.part]:
            codes.append(_run(part, parts[part], args, rest, begun + PART_SECONDS))
            if codes[-1] == 130:
                break
            begun = time.time()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return max(codes)


def _run(part: int, words: list[str], args: argparse.Namespace, rest: list[str], until: float) -> int:
    """One part in a process of its own; its exit code, 1 where no time is left for it."""
    left = until - RESERVE - time.time()
    if left <= 0:
        print(
            f"error: part {part}: what came before it took its {PART_SECONDS:.0f} s; call it again",
            file=sys.stderr,
        )
        return 1
    command = [sys.executable, "-m", "benchmarks.run", *words, "--device", args.device, "--part", str(part)]
    command += ["--preset", "tiny" if args.quick else "gpu", "--max_seconds", f"{left:.0f}"]
    if words[0] in ("op", "row"):
        command += ["--seconds", "6"] + ([] if args.repeats is None else ["--repeats", str(args.repeats)])
    newest = _newest(args.results, part, torch.device(args.device))
    results = args.results.resolve()
    command += ["--results", str(results)] if newest is None else ["--resume", str(results / newest)]
    process = subprocess.Popen([*command, *rest], cwd=ROOT)
    return _wait(process, until)


def _wait(process: subprocess.Popen[bytes], until: float) -> int:
    """Its exit code; one that does not end by itself is asked to, then made to: measured cases are kept."""
    left = max(until - RESERVE / 4 - time.time(), 0.1)
    for stop in (lambda: process.send_signal(signal.SIGINT), process.kill):
        ends = time.monotonic() + left
        while time.monotonic() < ends:
            try:
                return process.wait(timeout=max(ends - time.monotonic(), 0.0))
            except KeyboardInterrupt:  # the process got it too, and keeps what it measured
                continue
            except subprocess.TimeoutExpired:
                break
        stop()
        left = RESERVE / 8
    return process.wait()


def _newest(folder: Path, part: int, device: torch.device) -> str | None:
    """The name of the last file of a part that this run may go on in."""
    here = environment(device)
    alike = [
        payload["file"] for payload in read_results(folder)
        if payload.get("part") == part and not differing(payload["environment"], here)
    ]  # fmt: skip
    return alike[-1] if alike else None


if __name__ == "__main__":
    sys.exit(main())
