"""What every benchmark shares: the machine's description, peak memory, what a list of times says."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastdpo
from benchmarks.results import ROOT

PACKAGES = (
    "fastdpo", "torch", "triton", "transformers", "numpy", "trl", "liger-kernel", "cut-cross-entropy",
    "quack-kernels", "nvidia-cutlass-dsl",
)  # fmt: skip
SMI_QUERY = (
    "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,"
    "clocks_event_reasons.active"
)


@dataclass(frozen=True)
class Contender:
    """Something to time; ``prepare`` runs before every run and is not timed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


class DeviceLost(RuntimeError):
    """A CUDA error that stays: every later call of this process fails too, and only a new one helps."""

    def __init__(self, contender: str, reason: str) -> None:
        super().__init__(f"{contender}: {reason}")
        self.contender, self.reason = contender, reason


def why(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def recover(device: torch.device, contender: str, reason: str) -> None:
    """Give back what a contender that raised had held; outside its ``except``, whose traceback holds it.

    Raises:
        DeviceLost: the device answers no more.
    """
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLost(contender, reason) from error


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def in_a_process(module: str, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What ``python -m module JOB`` prints as its last line; or ``failed``, with why.

    Where it took longer than ``seconds``, or was killed, as one is that needs more memory than there is,
    ``beyond`` says which of the two.
    """
    command = [sys.executable, "-m", module, json.dumps(job)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {seconds:.0f} s", "beyond": "too long"}
    lines = done.stdout.splitlines()
    if done.returncode == -signal.SIGKILL:
        return {"failed": "its process was killed", "beyond": "does not fit"}
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return {"failed": f"its process ended with {done.returncode}: {said}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def package_version(package: str) -> str | None:
    """The version of a distribution that runs, None where there is none; of fastdpo that of the source."""
    if package == "fastdpo":
        return fastdpo.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a number depends on; what cannot be found out is None.

    ``commit`` is git's; where there is no git, that of the environment variable ``FASTDPO_COMMIT``.
    ``changes`` is "" for a clean tree, else a hash of ``git diff HEAD``.
    """
    in_git = (ROOT / ".git").exists()  # not a checkout that this one happens to lie in
    # Results of an earlier run lie about untracked and change no number.
    diff = _command("git", "diff", "HEAD", "--binary") if in_git else None
    info: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "commit": (in_git and _command("git", "rev-parse", "HEAD"))
        or os.environ.get("FASTDPO_COMMIT")
        or None,
        "has_uncommitted_changes": None if diff is None else bool(diff),
        "changes": diff and hashlib.sha256(diff.encode()).hexdigest()[:16],
        "cpu": _cpu_model(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        info["nvidia_smi"] = {"query": SMI_QUERY, "value": smi()}
        info["driver"] = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        info["device"] = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return info


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def smi() -> str | None:
    """Driver, clocks, power state and temperature as they are now; None without ``nvidia-smi``."""
    return _command("nvidia-smi", f"--query-gpu={SMI_QUERY}", "--format=csv,noheader")


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory of a run above what was held before it, in MiB.

    On a GPU what torch allocated. On a CPU the resident set of the whole process by ``VmHWM``, which is this
    process's own where ``ru_maxrss`` begins with its parent's; None where Linux does not let it be reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()
    try:
        # What earlier runs freed stays with the allocator, and would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident = _resident_kib("VmRSS")
        run()
        return (_resident_kib("VmHWM") - resident) / 1024
    except (OSError, AttributeError):
        return None


def _resident_kib(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def free_bytes(device: torch.device) -> int:
    """What a case may use: free memory, and on a GPU what torch holds without using it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def even_steps(samples: Sequence[float], num_steps: int) -> list[float]:
    """Rounds of steps of unlike size, as if all were of the mean size: each by its own median over rounds."""
    medians = [statistics.median(samples[i::num_steps]) for i in range(num_steps)]
    mean = statistics.fmean(medians)
    return [sample / medians[i % num_steps] * mean for i, sample in enumerate(samples)]


# Of a median, in its standard errors: what its notch is of normal samples, 1.57 IQR = 1.69 x 1.25 sd.
NOTCH = 1.69
MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean
BLOCKS = 4


def summarise(samples: list[float]) -> dict[str, float]:
    """Median, quartiles and noise of milliseconds.

    ``noise`` is half the width of what two medians of one version may differ by, as a share of the median,
    with some 90 % confidence (`benchmarks.compare` widens it by how many it compares). The most of: the notch
    of McGill, Tukey and Larsen (1978), 1.57 IQR / sqrt(n); half of what the two halves of the samples, in the
    order they were taken, differ by; the same multiple of the standard error that the medians of their four
    quarters have (batch means). Drift is in the last two, and not in the notch.
    """
    if len(samples) < 2:
        return {"median_ms": samples[0], "low_ms": samples[0], "high_ms": samples[0], "noise": 1.0}
    low, median, high = statistics.quantiles(samples, n=4)
    count, half = len(samples), len(samples) // 2
    drift = abs(statistics.median(samples[:half]) - statistics.median(samples[-half:])) / 2
    if count >= 2 * BLOCKS:
        cuts = [k * count // BLOCKS for k in range(BLOCKS + 1)]
        blocks = [statistics.median(samples[i:k]) for i, k in zip(cuts, cuts[1:], strict=False)]
        drift = max(drift, NOTCH * statistics.stdev(blocks) / math.sqrt(BLOCKS))
    noise = max(1.57 * (high - low) / math.sqrt(count), drift) / median
    return {"median_ms": median, "low_ms": low, "high_ms": high, "noise": noise}


def summarise_steps(samples: Sequence[float], num_steps: int) -> dict[str, float]:
    """The same of whole steps, which are of unlike size and come in rounds of ``num_steps``.

    The median is that of `even_steps`, in which the size of a step is no noise. The noise is not: of three
    rounds, one is the median that it is measured from. It is from the standard deviation over the rounds, of
    their sums (what slows a round as a whole) or of every step by itself, whichever is more.
    """
    summary = summarise(even_steps(samples, num_steps))
    rounds = [samples[i : i + num_steps] for i in range(0, len(samples), num_steps)]
    if len(rounds) < 2:
        return {**summary, "noise": 1.0}
    of_rounds = statistics.stdev([sum(times) for times in rounds])
    of_steps = math.sqrt(sum(statistics.variance(times) for times in zip(*rounds, strict=True)))
    total = statistics.fmean([sum(times) for times in rounds])
    noise = NOTCH * MEDIAN_ERROR * max(of_rounds, of_steps) / math.sqrt(len(rounds)) / total
    return {**summary, "noise": noise}
