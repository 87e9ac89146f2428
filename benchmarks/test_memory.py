"""Suite ``memory`` under pytest-benchmark: the peak above inputs, in ``extra_info``.

What is timed is the measurement's own call once more, in this process: no speed is told from it.
"""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import BY_NAME, accepted, left_out_at, skip_what_does_not_fit, timed
from benchmarks.memory import measure_apart
from benchmarks.problem import Size, problem_of


def test_memory(
    benchmark: BenchmarkFixture, memory_case: tuple[Size, str, str], bench_device: torch.device
) -> None:
    size, task, name = memory_case
    skip_what_does_not_fit(size.bytes_held, bench_device)
    method = BY_NAME[name]
    reason = left_out_at(size).get(name)
    found = {"not_run": reason} if reason else measure_apart(method, size, task, bench_device)
    benchmark.group = f"memory, {size.model} N={size.num_tokens} V={size.vocab_size} T={size.length} {task}"
    benchmark.extra_info |= accepted(name, found)
    benchmark.extra_info["timed"] = "one call more, after the measurement; no measurement of speed"
    problem = problem_of(size, bench_device)
    timed(benchmark, lambda: method.run(problem, task), bench_device)
