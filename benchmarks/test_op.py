"""Suite ``op`` under pytest-benchmark.

One of ours that is wrong fails; a peer that is wrong, or raises, is an expected failure with what was wrong,
and one that does not run here is skipped with the reason.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import FLOOR
from benchmarks.harness import free_bytes, package_version, peak_mib
from benchmarks.op import METHODS, reason_not_to_run
from benchmarks.problem import PASSES, Size, problem_of

BY_NAME = {method.name: method for method in METHODS}


def test_op(
    benchmark: BenchmarkFixture,
    head_case: tuple[Size, str, str],
    bench_device: torch.device,
    bench_rounds: int,
) -> None:
    size, task, name = head_case
    needed, free = size.bytes_needed(task), free_bytes(bench_device)
    if needed > free:
        pytest.skip(f"does not fit: needs at least {needed} bytes, {free} are free")
    problem = problem_of(size, bench_device)
    benchmark.group = f"{size.model} N={size.num_tokens} {size.ignored_percent}% {size.dtype_name} {task}"
    benchmark.extra_info |= {"gemm_passes": PASSES[task], "num_labelled": size.num_labelled}
    if name == FLOOR:
        run = problem.floor(task).run
    else:
        method = BY_NAME[name]
        if method.is_compiled and size.model == "tiny":
            pytest.skip("compiled anew for every size, which is all that a tiny one would time")
        if (reason := reason_not_to_run(method, problem)) is not None:
            pytest.skip(reason)

        def run() -> object:
            return method.run(problem, task)

        try:
            errors = problem.check(task, method.run(problem, task), is_exact=method.is_exact)
        except Exception as error:
            if method.package == "fastdpo":
                raise
            pytest.xfail(f"{type(error).__name__}: {error}")
        version = package_version(method.package)
        benchmark.extra_info |= {**errors, "rows": method.rows, "package": method.package, "version": version}
        if bench_device.type == "cuda":
            benchmark.extra_info["peak_mib"] = peak_mib(run, bench_device)
    benchmark.pedantic(synchronised(run, bench_device), rounds=bench_rounds, warmup_rounds=2)


def synchronised(run: object, device: torch.device) -> object:
    """A GPU's work ends when it is waited for; pytest-benchmark reads a clock of the host."""
    assert callable(run)

    def whole() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return whole
