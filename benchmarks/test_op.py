"""Suite ``op`` under pytest-benchmark: a task of the head by one contender."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import BY_NAME, FLOOR, accepted, left_out_at, skip_what_does_not_fit, timed
from benchmarks.op import admit
from benchmarks.problem import PASSES, Size, problem_of


def test_op(
    benchmark: BenchmarkFixture,
    op_case: tuple[Size, str, str],
    bench_device: torch.device,
    bench_rounds: int,
) -> None:
    size, task, name = op_case
    skip_what_does_not_fit(size.bytes_needed(task), bench_device)
    problem = problem_of(size, bench_device)
    benchmark.group = f"{size.model} N={size.num_tokens} {size.ignored_percent}% {size.dtype_name} {task}"
    benchmark.extra_info |= {"gemm_passes": PASSES[task], "num_labelled": size.num_labelled}
    if name == FLOOR:
        run = problem.floor(task).run
    else:
        method = BY_NAME[name]

        def run() -> object:
            return method.run(problem, task)

        on_gpu = bench_device.type == "cuda"
        found = admit(method, problem, task, with_peak=on_gpu, left_out=left_out_at(size))
        benchmark.extra_info |= accepted(name, found)
    try:
        timed(benchmark, run, bench_device, rounds=bench_rounds, warmup_rounds=2)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"does not fit: {error}")
