"""Suite ``row`` under pytest-benchmark: a chunk of logits to log-probabilities and D, in bytes a second."""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import accepted, timed
from benchmarks.rows import RowProblem


def test_row(
    benchmark: BenchmarkFixture,
    row_case: tuple[str, int, int, torch.dtype],
    bench_device: torch.device,
    bench_rounds: int,
) -> None:
    backend, vocab, rows, dtype = row_case
    problem = RowProblem(bench_device, vocab, dtype, rows)
    benchmark.extra_info |= accepted(backend, problem.checked(backend))
    benchmark.group = f"V={vocab} {dtype}"
    # D overwrites the logits, so each round gets them anew.
    timed(
        benchmark, lambda: problem.run(backend), bench_device, setup=problem.refill, rounds=bench_rounds,
        warmup_rounds=2,
    )  # fmt: skip
    benchmark.extra_info["gb_per_s"] = problem.bytes_moved / benchmark.stats.stats.median / 1e9
