"""Suite ``memory``: peak memory of a DPO loss with its gradients, against N, V and T.

On a CPU every method is measured in a process of its own, by the ``VmHWM`` of that process, which earlier
work cannot have raised; on a GPU by what torch allocated, above inputs. Gradients that are returned count.
What is measured is checked against fp64 as well, after it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.harness import package_version, peak_mib
from benchmarks.method import Method
from benchmarks.op import METHODS, reason_not_to_run
from benchmarks.problem import HeadProblem, Size, Wrong
from benchmarks.results import ROOT

CHILD_SECONDS = 900


def memory_key(axis: str, size: Size, task: str) -> str:
    shape = f"N={size.num_tokens}/V={size.vocab_size}/T={size.length}"
    return f"memory/{axis}/{size.model}/{shape}/{size.dtype_name}/{task}"


def bench_memory(
    axis: str, size: Size, task: str, device: torch.device, left_out: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """One point of a curve over ``axis`` (``N``, ``V`` or ``T``) for every method."""
    left_out = left_out or {}
    wanted = [m for m in METHODS if task in m.tasks]
    reasons = {m.name: left_out.get(m.name) or m.unavailable(device, size.dtype) for m in wanted}
    not_run = {name: reason for name, reason in reasons.items() if reason is not None}
    names = [name for name in reasons if name not in not_run]
    # On a GPU torch's own counters are per run, and a process a method would mostly start CUDA.
    batches = [names] if device.type == "cuda" else [[name] for name in names]
    found: dict[str, dict[str, Any]] = {}
    for batch in batches:
        found |= _in_a_process(size, task, device, batch)
    return {
        "suite": "memory", "key": memory_key(axis, size, task), "axis": axis, "model": size.model,
        "task": task, "dtype": size.dtype_name, "num_tokens": size.num_tokens, "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size, "length": size.length, "num_labelled": size.num_labelled,
        "failed": {name: cell["failed"] for name, cell in found.items() if "failed" in cell},
        "not_run": not_run | {name: cell["not_run"] for name, cell in found.items() if "not_run" in cell},
        "contenders": {name: cell for name, cell in found.items() if "peak_mib" in cell},
    }  # fmt: skip


def _in_a_process(size: Size, task: str, device: torch.device, names: list[str]) -> dict[str, dict[str, Any]]:
    job = {
        "size": {**asdict(size), "dtype": size.dtype_name},
        "task": task,
        "device": device.type,
        "names": names,
    }
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(job)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return {name: {"failed": f"took longer than {CHILD_SECONDS} s"} for name in names}
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        why = (done.stderr.strip().splitlines() or [""])[-1][:200]
        reason = f"its process ended with {done.returncode}: {why}"
        return {name: {"failed": reason} for name in names}
    found: dict[str, dict[str, Any]] = json.loads(lines[-1])
    return found


def measure(method: Method, size: Size, task: str, device: torch.device) -> dict[str, Any]:
    """One method at one size, in this process."""
    # Libraries, thread pools and handles come with the first call, of whatever size.
    small = replace(size, model="tiny", num_tokens=64, vocab=None, sequence_length=None)
    problem = HeadProblem(size, device)
    reason = reason_not_to_run(method, problem)
    if reason is not None:
        return {"not_run": reason}
    try:
        method.run(HeadProblem(small, device), task)
        peak = peak_mib(lambda: method.run(problem, task), device)
        errors = problem.check(task, method.run(problem, task), is_exact=method.is_exact)
    except Wrong as wrong:
        return {"failed": str(wrong)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    if peak is None:
        return {"not_run": "this system does not let a process reset its peak (/proc/self/clear_refs)"}
    version = package_version(method.package)
    return {"peak_mib": peak, "package": method.package, "version": version, "rows": method.rows, **errors}


def main(argv: list[str]) -> int:
    """The child: a job as JSON, the results as the last line of what it prints."""
    job = json.loads(argv[0])
    size = Size(**{**job["size"], "dtype": getattr(torch, job["size"]["dtype"])})
    device = torch.device(job["device"])
    methods = {method.name: method for method in METHODS}
    found = {}
    for name in job["names"]:
        found[name] = measure(methods[name], size, job["task"], device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
