"""``auto``: which kernel runs on which GPU, what takes its place, and what doctor says of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdpo import doctor
from fastdpo.ops import backends
from fastdpo.ops.backends import explain_auto, resolve_backend, resolve_divergence_backend

CUDA = torch.device("cuda", 0)
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of a capability, on which backends are not available for ``reasons``."""
    pretended = SimpleNamespace(capability=(9, 0), reasons={}, memory=141 * GIB, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: pretended.capability)

    def properties(index: int) -> SimpleNamespace:
        major, minor = pretended.capability
        numbers = {"major": major, "minor": minor, "multi_processor_count": 16}
        return SimpleNamespace(name=pretended.name, total_memory=pretended.memory, **numbers)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    whole = backends.unavailable_reason

    def reason(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
        on_gpu = device.type == "cuda" and name != "reference" and dtype != torch.float64
        return pretended.reasons.get(name) if on_gpu else whole(name, device, dtype)

    monkeypatch.setattr(backends, "unavailable_reason", reason)
    backends._warn_of_no_kernel.cache_clear()
    return pretended


@pytest.mark.parametrize(
    ("capability", "first"),
    [((8, 0), "triton"), ((8, 9), "triton"), ((9, 0), "cuda"), ((10, 0), "cuda"), ((12, 0), "cuda")],
)
def test_the_row_kernel_hangs_on_the_gpu_alone(
    gpu: SimpleNamespace, capability: tuple[int, int], first: str
) -> None:
    gpu.capability = capability
    assert {resolve_backend("auto", CUDA, dtype) for dtype in (torch.float32, torch.bfloat16)} == {first}
    assert resolve_backend("auto", CUDA, torch.float64) == "reference"
    assert explain_auto(CUDA).startswith(f"{first}: ")


def test_kernels_that_only_triton_has_stay_triton_s(gpu: SimpleNamespace) -> None:
    assert resolve_backend("auto", CUDA) == "cuda"
    assert resolve_backend("auto", CUDA, torch.float32, "lean") == "triton"
    assert resolve_divergence_backend("auto", CUDA, torch.float32) == "triton"
    gpu.reasons = {"triton": "triton is not installed"}
    assert resolve_backend("auto", CUDA, torch.float32, "lean") == "cuda"
    assert resolve_divergence_backend("auto", CUDA, torch.float32) == "reference"


@pytest.mark.promise(44)
def test_what_does_not_run_is_passed_over_and_named(gpu: SimpleNamespace) -> None:
    gpu.reasons = {"cuda": "the driver is too old"}
    assert resolve_backend("auto", CUDA) == "triton"
    assert explain_auto(CUDA) == "triton, since cuda does not run: the driver is too old"
    with pytest.raises(ValueError, match="'cuda' does not run on cuda:0: the driver is too old"):
        resolve_backend("cuda", CUDA)
    gpu.reasons["triton"] = "no C compiler"
    with pytest.warns(RuntimeWarning, match="cuda: the driver is too old; triton: no C compiler"):
        assert resolve_backend("auto", CUDA) == "reference"


def test_doctor_says_what_runs_on_a_gpu_and_why(gpu: SimpleNamespace) -> None:
    sections = doctor().sections
    kernels, devices = dict(sections["Kernels"]), dict(sections["Devices"])
    assert kernels["auto on cuda:0"].startswith("cuda: a cluster of thread blocks")
    assert devices["cuda:0"] == "NVIDIA H200, 141 GiB, 16 multiprocessors, compute capability 9.0"
    assert "cuda:0 budgets" not in devices
    gpu.reasons = {"cuda": "the driver is too old"}
    assert dict(doctor().sections["Kernels"])["auto on cuda:0"].startswith("triton, since cuda does not run")


@pytest.mark.parametrize(
    ("name", "memory"), [("NVIDIA GeForce RTX 4060", 8 * GIB), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5 * GIB)]
)
def test_doctor_says_what_the_budgets_are_of_a_small_gpu(
    gpu: SimpleNamespace, name: str, memory: int
) -> None:
    gpu.name, gpu.memory, gpu.capability = name, memory, (8, 0)
    devices = dict(doctor().sections["Devices"])
    assert f"{1536 * 2**20 / memory:.0%} of it" in devices["cuda:0 budgets"]
    assert "Execution(workspace_mib=128, cache_mib=256)" in devices["cuda:0 budgets"]
