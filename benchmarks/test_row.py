"""Suite ``row`` under pytest-benchmark: a chunk of logits to log-probabilities and D, in bytes a second."""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.rows import RowProblem
from benchmarks.test_op import synchronised


def test_row(
    benchmark: BenchmarkFixture,
    row_case: tuple[str, int, torch.dtype],
    bench_device: torch.device,
    bench_rounds: int,
) -> None:
    backend, vocab, dtype = row_case
    problem = RowProblem(bench_device, vocab, dtype, rows=2048 if bench_device.type == "cuda" else 64)
    reason = problem.wrong(backend)
    assert reason is None, reason
    benchmark.group = f"V={vocab} {dtype}"
    run = synchronised(lambda: problem.run(backend), bench_device)
    # D overwrites the logits, so each round gets them anew.
    benchmark.pedantic(run, setup=problem.refill, rounds=bench_rounds, warmup_rounds=2)
    benchmark.extra_info["gb_per_s"] = problem.bytes_moved / benchmark.stats.stats.median / 1e9
