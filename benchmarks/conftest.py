"""pytest-benchmark's way into the suites: ``pytest benchmarks --benchmark-only``.

    pytest benchmarks --benchmark-only -k "test_op and pairs and trl"
    pytest benchmarks --benchmark-only --bench-preset small --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare

The cases, contenders and checks are those of ``fastdpo bench``; pytest-benchmark times one contender to its
end before the next begins, so that a clock that drifts hits them unalike. Ratios between contenders, and the
tables, come from ``fastdpo bench``, where they take turns; this is for a contender against its own past.

One of ours that is wrong, or raises, fails; a peer that does is an expected failure with what was wrong; one
that does not run here is skipped with the reason. Neither is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

from benchmarks.harness import free_bytes
from benchmarks.method import is_ours
from benchmarks.op import METHODS
from benchmarks.problem import Size
from benchmarks.sizes import (
    COMPILED,
    PRESETS,
    accuracy_sizes,
    is_compiled_at,
    memory_points,
    op_sizes,
    preset_of,
    row_backends,
    row_sizes,
    step_sizes,
)
from benchmarks.suites import step_names
from benchmarks.timing import Ahead, Stamp

FLOOR = "gemm"
BY_NAME = {method.name: method for method in METHODS}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdpo")
    group.addoption("--bench-preset", choices=PRESETS, help="sizes; default: gpu on a GPU, tiny on a CPU")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    group.addoption("--bench-rounds", type=int, default=10, help="of suites op, row and step")


def device_of(config: pytest.Config) -> torch.device:
    name = config.getoption("--bench-device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda needs a CUDA device, and torch sees none")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = device_of(metafunc.config)
    preset = metafunc.config.getoption("--bench-preset")
    preset = preset or (preset_of(device) if device.type == "cuda" else "tiny")
    for fixture, cases_of in CASES.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, list(cases_of(preset, device)))


def _op_cases(preset: str, device: torch.device) -> Iterable[Any]:
    for size, tasks in op_sizes(preset):
        for task in tasks:
            yield _head_case(size, task, FLOOR)
            yield from _of_methods(size, task)


def _accuracy_cases(preset: str, device: torch.device) -> Iterable[Any]:
    for size, tasks in accuracy_sizes(preset):
        for task in tasks:
            yield from _of_methods(size, task)


def _memory_cases(preset: str, device: torch.device) -> Iterable[Any]:
    for size, task in memory_points(preset):
        yield from _of_methods(size, task, f"V={size.vocab_size}-T={size.length}-")


def _of_methods(size: Size, task: str, shape: str = "") -> Iterable[Any]:
    return (_head_case(size, task, m.name, shape) for m in METHODS if task in m.tasks)


def _head_case(size: Size, task: str, name: str, shape: str = "") -> Any:
    where = f"{size.model}-N={size.num_tokens}-{shape}{size.ignored_percent}%-{size.dtype_name}"
    return pytest.param((size, task, name), id=f"{where}-{task}-{name}")


def _row_cases(preset: str, device: torch.device) -> Iterable[Any]:
    for vocab, rows, dtype in row_sizes(preset):
        for name in row_backends(device):
            words = f"V={vocab}-{str(dtype).removeprefix('torch.')}-{name}"
            yield pytest.param((name, vocab, rows, dtype), id=words)


def _step_cases(preset: str, device: torch.device) -> Iterable[Any]:
    try:
        names = step_names(device)
    except ValueError as error:  # what trainers want is not installed
        yield pytest.param(None, id="none", marks=pytest.mark.skip(reason=str(error)))
        return
    for model, precision in step_sizes(preset):
        for name in names:
            yield pytest.param((model, precision, name), id=f"{model}-{precision}-{name}")


CASES: dict[str, Callable[[str, torch.device], Iterable[Any]]] = {
    "op_case": _op_cases,
    "accuracy_case": _accuracy_cases,
    "memory_case": _memory_cases,
    "row_case": _row_cases,
    "step_case": _step_cases,
}


def left_out_at(size: Size) -> dict[str, str]:
    """Reasons for contenders that are not to run at a size, as `fastdpo bench` has them."""
    return {m.name: COMPILED for m in METHODS if m.is_compiled and not is_compiled_at(size)}


def skip_what_does_not_fit(bytes_needed: int, device: torch.device) -> None:
    free = free_bytes(device)
    if bytes_needed > free:
        pytest.skip(f"does not fit: needs at least {bytes_needed} bytes, {free} are free")


def accepted(name: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a gate of the suites says of a contender, where it is to be timed; its test ends otherwise."""
    if "not_run" in found:
        pytest.skip(found["not_run"])
    if "failed" in found:
        (pytest.fail if is_ours(name) else pytest.xfail)(f"{name}: {found['failed']}")
    return found


def timed(
    benchmark: Any,
    run: Callable[..., object],
    device: torch.device,
    *,
    setup: Callable[[], tuple[Any, ...] | None] | None = None,
    rounds: int = 1,
    warmup_rounds: int = 0,
) -> None:
    """``benchmark.pedantic``; on a GPU behind a spin and by the device's own clock (`benchmarks.timing`).

    Args:
        setup: runs before each round, untimed; gives the arguments of ``run``, or None for none.
    """
    ahead = Ahead(run, device) if device.type == "cuda" else None

    def begin() -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = (setup() if setup is not None else None) or ()
        if ahead is not None:
            ahead.begin()
        return args, {}

    target = run if ahead is None else ahead.run
    benchmark.pedantic(target, setup=begin, rounds=rounds, warmup_rounds=warmup_rounds)
    if ahead is not None:
        benchmark.extra_info["host_ms"] = statistics.median(ahead.host_ms[warmup_rounds:])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU its clock is the one that is read."""
    if device_of(config).type == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=Stamp))


@pytest.fixture
def bench_device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture
def bench_rounds(request: pytest.FixtureRequest) -> int:
    rounds: int = request.config.getoption("--bench-rounds")
    return rounds
