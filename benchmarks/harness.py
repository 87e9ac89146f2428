"""What every benchmark shares: the machine's description, interleaved timing, peak memory, result files."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class Contender:
    """Something to time; ``prepare`` runs before every run and is not timed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a number depends on."""
    info: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _command("git", "rev-parse", "HEAD"),
        "has_uncommitted_changes": bool(_command("git", "status", "--porcelain")),
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        info["nvidia_smi"] = {
            "query": query,
            "value": _command("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        }
    else:
        info["device"] = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return info


def time_interleaved(
    contenders: list[Contender], device: torch.device, *, repeats: int = 20, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of every run of every contender; they take turns, so that drift hits all alike."""
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for round_ in range(warmup + repeats):
        for contender in contenders:
            if contender.prepare is not None:
                contender.prepare()
            elapsed = _time_once(contender.run, device)
            if round_ >= warmup:
                samples[contender.name].append(elapsed)
    return samples


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Peak allocated memory of a run above what was allocated before it, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def summarise(samples: list[float]) -> dict[str, float]:
    """Median and quartiles of milliseconds."""
    if len(samples) < 2:
        return {"median_ms": samples[0], "low_ms": samples[0], "high_ms": samples[0]}
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_ms": median, "low_ms": low, "high_ms": high}


def write_results(payload: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``<device>-<date>.json``; an existing file is never overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    device = payload["environment"]["device"].replace("NVIDIA", "").strip().lower()
    slug = "".join(c if c.isalnum() else "-" for c in device).strip("-")
    day = payload["environment"]["date"][:10]
    path, number = folder / f"{slug}-{day}.json", 2
    while path.exists():
        path, number = folder / f"{slug}-{day}-{number}.json", number + 1
    path.write_text(json.dumps({"schema": SCHEMA, **payload}, indent=1) + "\n")
    return path


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files, oldest first.

    Raises:
        ValueError: a file of another schema, by name.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        payload = json.loads(path.read_text())
        if payload.get("schema") != SCHEMA:
            raise ValueError(f"{path.name}: schema {payload.get('schema')!r}, this version reads {SCHEMA}")
        found.append({"file": path.name, **payload})
    return sorted(found, key=lambda payload: payload["environment"]["date"])
