"""Suite ``memory``: peak memory of a DPO loss with its gradients, against N, V and T.

On a CPU every method is measured in a process of its own, by the ``VmHWM`` of that process, which earlier
work cannot have raised and which imports no other peer; on a GPU in this process, by what torch allocated
above inputs. Gradients that are returned count. What is measured is checked against fp64 as well, after it.
A point that lies on several curves is measured once, and named after the first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.harness import in_a_process, package_version, peak_mib, recover
from benchmarks.method import Method
from benchmarks.op import METHODS, checked, reason_not_to_run
from benchmarks.problem import HeadProblem, Outcome, Size, problem_of

CHILD_SECONDS = 900


def memory_key(axis: str, size: Size, task: str) -> str:
    shape = f"N={size.num_tokens}/V={size.vocab_size}/T={size.length}"
    return f"memory/{axis}/{size.model}/{shape}/{size.dtype_name}/{task}"


def bench_memory(
    axes: Sequence[str],
    size: Size,
    task: str,
    device: torch.device,
    left_out: Mapping[str, str] | None = None,
    lost_to: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One point of the curves over ``axes`` (of ``N``, ``V`` and ``T``) for every method.

    Args:
        left_out: reasons for methods that are not to run, by name.
        lost_to: reasons for methods that took the device with them in an earlier process: they failed.

    Raises:
        DeviceLost: after an error of a method the device answers no more.
    """
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        if task not in method.tasks:
            continue
        reason = (left_out or {}).get(method.name)
        if reason is not None:
            found[method.name] = {"not_run": reason}
        elif method.name in (lost_to or {}):
            found[method.name] = {"failed": (lost_to or {})[method.name]}
        else:
            found[method.name] = measure_apart(method, size, task, device)
    not_run = {name: cell["not_run"] for name, cell in found.items() if "not_run" in cell}
    return {
        "suite": "memory", "key": memory_key(axes[0], size, task), "axes": list(axes), "model": size.model,
        "task": task, "dtype": size.dtype_name, "num_tokens": size.num_tokens, "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size, "length": size.length, "num_labelled": size.num_labelled,
        "failed": {name: cell["failed"] for name, cell in found.items() if "failed" in cell},
        "not_run": not_run,
        "contenders": {name: cell for name, cell in found.items() if "peak_mib" in cell},
    }  # fmt: skip


def measure_apart(method: Method, size: Size, task: str, device: torch.device) -> dict[str, Any]:
    """`measure` where nothing else can be in its peak: on a CPU a process of its own.

    Raises:
        DeviceLost: after it the device answers no more.
    """
    reason = method.unavailable(device, size.dtype)
    if reason is not None:
        return {"not_run": reason}
    if device.type != "cuda":
        return _in_a_process(size, task, device, method.name)
    found = measure(method, size, task, device)  # torch's own counters are per run
    recover(device, method.name, found.get("failed", "the device was lost after it"))
    return found


def _in_a_process(size: Size, task: str, device: torch.device, name: str) -> dict[str, Any]:
    job = {
        "size": {**asdict(size), "dtype": size.dtype_name},
        "task": task,
        "device": device.type,
        "name": name,
    }
    found = in_a_process("benchmarks.memory", job, CHILD_SECONDS)
    return {key: value for key, value in found.items() if key != "beyond"}  # here a failure as others


def measure(method: Method, size: Size, task: str, device: torch.device) -> dict[str, Any]:
    """One method at one size, in this process: its peak and its errors, or ``failed`` or ``not_run``.

    One that is wrong has no peak: what a wrong kernel takes is nobody's memory.
    """
    # Libraries, thread pools and handles come with the first call, of whatever size.
    small = replace(size, model="tiny", num_tokens=64, vocab=None, sequence_length=None)
    problem = problem_of(size, device)
    reason = reason_not_to_run(method, problem)
    if reason is not None:
        return {"not_run": reason}
    peak: float | None = None

    def run(of: HeadProblem, its_task: str) -> Outcome:
        # Before the check, whose fp64 is more than any method's.
        nonlocal peak
        method.run(HeadProblem(small, device), its_task)
        peak = peak_mib(lambda: method.run(of, its_task), device)
        return method.run(of, its_task)

    found = checked(replace(method, run=run), problem, task, with_peak=False)
    if "failed" in found or "not_run" in found:
        return found
    if peak is None:
        return {"not_run": "this system does not let a process reset its peak (/proc/self/clear_refs)"}
    version = package_version(method.package)
    return {"peak_mib": peak, "package": method.package, "version": version, "rows": method.rows, **found}


def main(argv: list[str]) -> int:
    """The child: a job as JSON, the result as the last line of what it prints."""
    job = json.loads(argv[0])
    size = Size(**{**job["size"], "dtype": getattr(torch, job["size"]["dtype"])})
    device = torch.device(job["device"])
    (method,) = (method for method in METHODS if method.name == job["name"])
    print(json.dumps(measure(method, size, job["task"], device)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
