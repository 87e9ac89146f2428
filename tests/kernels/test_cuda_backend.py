"""When the CUDA backend refuses; what it computes is tested for every backend in test_rows.py."""

from __future__ import annotations

import pytest
import torch

from fastdpo.kernels import cuda
from fastdpo.kernels.contract import LogitTransform, RowOutputs


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(cuda, "cuda_problem", lambda: None)
    return monkeypatch


def pretend_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")


def test_reason_of_an_extension_without_cuda_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_problem", lambda: "built without CUDA: do this")
    assert cuda.unavailable_reason() == "built without CUDA: do this"
    with pytest.raises(RuntimeError, match="do this"):
        run_on(torch.zeros(1, 4))


def test_other_devices_are_refused(built: pytest.MonkeyPatch) -> None:
    assert "got cpu" in str(cuda.unavailable_reason(torch.device("cpu")))
    with pytest.raises(RuntimeError, match="it runs on CUDA tensors, got cpu"):
        run_on(torch.zeros(1, 4))


def test_no_device_is_a_reason(built: pytest.MonkeyPatch) -> None:
    built.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable_reason() == "no CUDA device is available to torch"


@pytest.mark.parametrize(("capability", "is_enough"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_capability(built: pytest.MonkeyPatch, capability: tuple[int, int], is_enough: bool) -> None:
    pretend_device(built, capability)
    reason = cuda.unavailable_reason(torch.device("cuda"))
    if is_enough:
        assert reason is None
    else:
        assert reason == "it needs compute capability 8.0 or higher, Pretended GPU has 7.5"


def run_on(logits: torch.Tensor) -> None:
    outputs = RowOutputs(torch.empty(1), torch.empty(1))
    cuda.row_kernel(logits, torch.zeros(1, dtype=torch.int64), LogitTransform(), outputs)
