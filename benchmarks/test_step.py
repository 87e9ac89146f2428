"""Suite ``step`` under pytest-benchmark: a round is one whole optimiser step of one contender.

Each contender's first steps are compared with fp64 before it is timed. Rounds go through the batches of
``fastdpo bench`` in turn, which are of unlike size: as many rounds, the same batches.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import accepted, skip_what_does_not_fit, timed
from benchmarks.suites import step_bytes

if TYPE_CHECKING:
    from benchmarks.step import Run
    from benchmarks.step_truth import Truth

CHECK_STEPS, BATCHES = 2, 6


@lru_cache(maxsize=1)
def _run_of(model: str, precision: str, device: torch.device) -> tuple[Run, Truth]:
    """One size at a time, with its truth: its contenders follow each other."""
    from benchmarks.step import make_run  # trainers take seconds to import

    run = make_run(model, device, precision, steps=BATCHES)
    return run, run.truth(CHECK_STEPS)


def test_step(
    benchmark: BenchmarkFixture,
    step_case: tuple[str, str, str],
    bench_device: torch.device,
    bench_rounds: int,
) -> None:
    from benchmarks.step import checked

    model, precision, name = step_case
    skip_what_does_not_fit(step_bytes(model, precision), bench_device)
    run, truth = _run_of(model, precision, bench_device)
    found = dict(accepted(name, checked(run, name, truth, CHECK_STEPS)))
    benchmark.group = f"step, {model} {precision}, {run.size.pairs} pairs"
    kept = ("losses", "tokens", "positions", "peak_mib")
    benchmark.extra_info |= {**{key: found[key] for key in kept}, **found["errors"]}
    contender = None
    try:
        contender = run.build(name)
        batches = cycle(run.inputs(contender, BATCHES))

        # The first step warms up: allocators, thread pools, Adam's state.
        timed(
            benchmark, contender.step, bench_device, setup=lambda: (next(batches),), rounds=bench_rounds,
            warmup_rounds=1,
        )  # fmt: skip
    finally:
        del contender  # what it holds would be missing for the next
        run.free()
