"""Suites ``op`` and ``accuracy``: every mode and every peer on one head, beside the products it is made of.

The floor is plain ``torch.mm`` in the inputs' dtype over all labelled rows at once, in the same loop: X W^T
for ``score``, and D W where dhidden is wanted, and D^T X for dweight. Equal for all: the tokens, the labels,
the dtypes, the task (values and gradients, forward and backward), the device and the loop in which they take
turns. Each is checked against fp64 first; one that is wrong, or raises, is reported with what was wrong, and
not timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import (
    Contender,
    free_bytes,
    package_version,
    peak_mib,
    recover,
    smi,
    summarise,
    why,
)
from benchmarks.method import Method
from benchmarks.ours import OURS
from benchmarks.peers import PEERS
from benchmarks.problem import PASSES, HeadProblem, Size, Wrong
from benchmarks.timing import of_host, time_interleaved

METHODS: tuple[Method, ...] = (*OURS, *PEERS)
EQUAL = "tokens, labels, dtypes, task (forward and backward), device, taking turns"


def op_key(suite: str, size: Size, task: str) -> str:
    share = f"{size.ignored_percent}% ignored"
    return f"{suite}/{size.model}/N={size.num_tokens}/{share}/{size.dtype_name}/{task}"


def bench_task(
    problem: HeadProblem,
    task: str,
    methods: Sequence[Method] = METHODS,
    *,
    repeats: int,
    seconds: float | None = None,
    is_timed: bool = True,
    left_out: Mapping[str, str] | None = None,
    lost_to: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One task by every method that computes it: errors, milliseconds, peak memory.

    Args:
        repeats, seconds: as in ``time_interleaved``.
        is_timed: False for errors alone.
        left_out: reasons for methods that are not to run, by name.
        lost_to: reasons for methods that took the device with them in an earlier process: they failed.

    Returns:
        ``contenders``, and with a reason each ``failed`` (raised, or is wrong) and ``not_run`` (cannot run
        here, does not fit, or was left out).

    Raises:
        DeviceLost: after an error of a contender the device answers no more.
    """
    cells: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    not_run: dict[str, str] = {}
    turns: list[Contender] = []
    floor_bytes = problem.size.floor_bytes(task) if is_timed else 0
    for method in methods:
        if task not in method.tasks:
            continue
        found = admit(
            method, problem, task, beside=floor_bytes, with_peak=is_timed and problem.device.type == "cuda",
            left_out=left_out, lost_to=lost_to,
        )  # fmt: skip
        if "failed" in found or "not_run" in found:
            failed |= {method.name: found["failed"]} if "failed" in found else {}
            not_run |= {method.name: found["not_run"]} if "not_run" in found else {}
            continue
        cells[method.name] = found
        turns.append(Contender(method.name, lambda m=method: m.run(problem, task)))  # type: ignore[misc]
    size, suite = problem.size, "op" if is_timed else "accuracy"
    result = {
        "suite": suite, "key": op_key(suite, size, task),
        "model": size.model, "hidden_size": size.hidden_size, "vocab_size": size.vocab_size,
        "num_tokens": size.num_tokens, "num_labelled": size.num_labelled, "length": size.length,
        "ignored_percent": size.ignored_percent, "dtype": size.dtype_name, "task": task,
        "gemm_passes": PASSES[task], "equal": EQUAL, "failed": failed, "not_run": not_run,
        "contenders": cells,
    }  # fmt: skip
    if not is_timed or not cells:
        return result
    before = smi() if problem.device.type == "cuda" else None
    reason = None
    try:
        turns.insert(0, problem.floor(task))
    except torch.OutOfMemoryError as error:  # without its floor a time is still a time
        reason = failed["gemm"] = why(error)
    if reason is not None:
        recover(problem.device, "gemm", reason)
    samples = time_interleaved(
        turns, problem.device, repeats=repeats, warmup=min(3, repeats), seconds=seconds, failed=failed
    )
    after = smi() if problem.device.type == "cuda" else None
    for name in failed:
        cells.pop(name, None)
    if "gemm" in samples:
        cells["gemm"] = {"rows": "labelled", "what": "the products alone"}
    for name, found in samples.items():
        values = [sample.ms for sample in found]
        cells[name] |= {**summarise(values), **of_host(found, problem.device), "samples_ms": values}
    for name in samples if "gemm" in samples else ():
        cells[name]["ratio_to_gemm"] = cells[name]["median_ms"] / cells["gemm"]["median_ms"]
    return {**result, "smi": [before, after]}


def admit(
    method: Method,
    problem: HeadProblem,
    task: str,
    *,
    beside: int = 0,
    with_peak: bool = False,
    left_out: Mapping[str, str] | None = None,
    lost_to: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What there is to know of a method before it is timed, under `fastdpo bench` and pytest-benchmark alike.

    Returns:
        ``not_run`` or ``failed`` with why; otherwise its errors, version and which rows it projects.

    Raises:
        DeviceLost: after its check the device answers no more.
    """
    if method.name in (lost_to or {}):
        return {"failed": (lost_to or {})[method.name]}
    reason = (left_out or {}).get(method.name) or reason_not_to_run(method, problem, beside)
    if reason is not None:
        return {"not_run": reason}
    found = checked(method, problem, task, with_peak=with_peak)
    recover(problem.device, method.name, found.get("failed", "the device was lost after its check"))
    if "failed" in found or "not_run" in found:
        return found
    return {
        "rows": method.rows, "what": method.what, "package": method.package,
        "version": package_version(method.package), **found,
    }  # fmt: skip


def checked(method: Method, problem: HeadProblem, task: str, *, with_peak: bool) -> dict[str, Any]:
    """A method's errors against fp64, and its peak memory on a GPU; or ``failed`` or ``not_run`` with why."""
    try:
        errors: dict[str, Any] = problem.check(task, method.run(problem, task), is_exact=method.is_exact)
        if with_peak:  # a CPU's needs a process of its own: suite `memory`
            errors["peak_mib"] = peak_mib(lambda: method.run(problem, task), problem.device)
        return errors
    except Wrong as wrong:
        return {"failed": str(wrong)}
    except Exception as error:  # whatever a peer raises is its result, and no reason to lose the others'
        if isinstance(error, ModuleNotFoundError) and method.package != "fastdpo":
            return {"not_run": f"not installed: no module {error.name}"}  # imported only when it is called
        return {"failed": why(error)}


def reason_not_to_run(method: Method, problem: HeadProblem, beside: int = 0) -> str | None:
    """Why a method cannot run this problem here, with the bytes it would need; None if it can.

    Args:
        beside: bytes that will be held while it runs, for what it takes turns with.
    """
    reason = method.unavailable(problem.device, problem.size.dtype)
    needed = method.bytes_needed(problem.size)
    needed += beside if needed else 0
    if reason is None and needed > (free := free_bytes(problem.device)):
        of = f", {beside} of them for the floor" if beside else ""
        return f"does not fit: needs about {needed} bytes ({needed / 2**30:.1f} GiB){of}, {free} are free"
    return reason
