"""Suite ``accuracy`` under pytest-benchmark: errors against fp64, in ``extra_info``.

What is timed is one call of what was checked, to have a row to put the errors in: no speed is told from it.
"""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import BY_NAME, accepted, left_out_at, skip_what_does_not_fit, timed
from benchmarks.op import admit
from benchmarks.problem import Size, problem_of


def test_accuracy(
    benchmark: BenchmarkFixture, accuracy_case: tuple[Size, str, str], bench_device: torch.device
) -> None:
    size, task, name = accuracy_case
    skip_what_does_not_fit(size.bytes_held, bench_device)
    method, problem = BY_NAME[name], problem_of(size, bench_device)
    benchmark.group = f"errors, {size.model} N={size.num_tokens} {size.dtype_name} {task}"
    benchmark.extra_info |= accepted(name, admit(method, problem, task, left_out=left_out_at(size)))
    benchmark.extra_info["timed"] = "one call of what was checked; no measurement of speed"
    timed(benchmark, lambda: method.run(problem, task), bench_device)
