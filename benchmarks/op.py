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
    smi,
    summarise,
    time_interleaved,
)
from benchmarks.method import Method
from benchmarks.ours import OURS
from benchmarks.peers import PEERS
from benchmarks.problem import PASSES, HeadProblem, Size, Wrong

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
) -> dict[str, Any]:
    """One task by every method that computes it: errors, milliseconds, peak memory.

    Args:
        repeats, seconds: as in ``time_interleaved``.
        is_timed: False for errors alone.
        left_out: reasons for methods that are not to run, by name.

    Returns:
        ``contenders``, and with a reason each ``failed`` (raised, or is wrong) and ``not_run`` (cannot run
        here, does not fit, or was left out).
    """
    cells: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    not_run: dict[str, str] = {}
    turns: list[Contender] = []
    for method in methods:
        if task not in method.tasks:
            continue
        reason = (left_out or {}).get(method.name) or reason_not_to_run(method, problem)
        if reason is not None:
            not_run[method.name] = reason
            continue
        try:
            errors = problem.check(task, method.run(problem, task), is_exact=method.is_exact)
        except Wrong as wrong:
            failed[method.name] = str(wrong)
            continue
        except Exception as error:  # whatever a peer raises is its result, and no reason to lose the others'
            failed[method.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        finally:
            if problem.device.type == "cuda":
                torch.cuda.empty_cache()
        cells[method.name] = {
            "rows": method.rows, "what": method.what, "package": method.package,
            "version": package_version(method.package), **errors,
        }  # fmt: skip
        if is_timed and problem.device.type == "cuda":  # a CPU's needs a process of its own: suite `memory`
            cells[method.name]["peak_mib"] = peak_mib(lambda m=method: m.run(problem, task), problem.device)  # type: ignore[misc]
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
    samples = time_interleaved(
        [problem.floor(task), *turns],
        problem.device,
        repeats=repeats,
        warmup=min(3, repeats),
        seconds=seconds,
    )
    after = smi() if problem.device.type == "cuda" else None
    floor = summarise(samples["gemm"])["median_ms"]
    cells["gemm"] = {"rows": "labelled", "what": "the products alone"}
    for name, values in samples.items():
        summary = summarise(values)
        cells[name] |= {**summary, "ratio_to_gemm": summary["median_ms"] / floor, "samples_ms": values}
    return {**result, "smi": [before, after]}


def reason_not_to_run(method: Method, problem: HeadProblem) -> str | None:
    """Why a method cannot run this problem here, with the bytes it would need; None if it can."""
    reason = method.unavailable(problem.device, problem.size.dtype)
    needed = method.bytes_needed(problem.size)
    if reason is None and needed > (free := free_bytes(problem.device)):
        return f"does not fit: needs about {needed} bytes ({needed / 2**30:.1f} GiB), {free} are free"
    return reason
