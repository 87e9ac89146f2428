"""pytest-benchmark's way into the suites: ``pytest benchmarks --benchmark-only``.

    pytest benchmarks --benchmark-only -k "pairs and trl"
    pytest benchmarks --benchmark-only --bench-preset small --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare

The cases, contenders and checks are those of ``fastdpo bench``; pytest-benchmark times one contender to its
end before the next begins, so that a clock that drifts hits them unalike. Ratios between contenders, and the
tables, come from ``fastdpo bench``, where they take turns; this is for a contender against its own past.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.op import METHODS
from benchmarks.problem import Size
from benchmarks.rows import VOCABULARIES
from benchmarks.suites import PRESETS, op_sizes
from fastdpo.ops.backends import DEVICE_TYPE, unavailable_reason

FLOOR = "gemm"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdpo")
    group.addoption("--bench-preset", choices=PRESETS, help="sizes; default: gpu on a GPU, tiny on a CPU")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    group.addoption("--bench-rounds", type=int, default=10)


def device_of(config: pytest.Config) -> torch.device:
    name = config.getoption("--bench-device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda needs a CUDA device, and torch sees none")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = device_of(metafunc.config)
    preset = metafunc.config.getoption("--bench-preset") or ("gpu" if device.type == "cuda" else "tiny")
    if "head_case" in metafunc.fixturenames:
        names = [FLOOR, *(method.name for method in METHODS)]
        computes = {method.name: method.tasks for method in METHODS}
        cases = [
            pytest.param((size, task, name), id=f"{_id(size)}-{task}-{name}")
            for size, tasks in op_sizes(preset) for task in tasks for name in names
            if task in computes.get(name, (task,))
        ]  # fmt: skip
        metafunc.parametrize("head_case", cases)
    if "row_case" in metafunc.fixturenames:
        found = [name for name in DEVICE_TYPE if unavailable_reason(name, device) is None] or ["reference"]
        widths = (4001,) if preset == "tiny" else VOCABULARIES
        metafunc.parametrize(
            "row_case",
            [
                pytest.param((name, vocab, dtype), id=f"V={vocab}-{str(dtype).removeprefix('torch.')}-{name}")
                for vocab in widths for dtype in (torch.float32, torch.bfloat16) for name in found
            ],
        )  # fmt: skip


def _id(size: Size) -> str:
    return f"{size.model}-N={size.num_tokens}-{size.ignored_percent}%-{size.dtype_name}"


@pytest.fixture
def bench_device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture
def bench_rounds(request: pytest.FixtureRequest) -> int:
    rounds: int = request.config.getoption("--bench-rounds")
    return rounds
