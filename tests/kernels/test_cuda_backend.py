"""When the CUDA backend refuses; what it computes is tested for every backend in test_rows.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo.kernels import cuda, native
from fastdpo.kernels.contract import LogitTransform, RowOutputs


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(cuda, "cuda_problem", lambda: None)
    return monkeypatch


def pretend_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())


class FakeExtension(SimpleNamespace):
    """An extension whose probe gives ``answers``, one after the other."""

    cuda_archs, cuda_runtime_version = "sm_80 sm_90a compute_90", 13000

    def __init__(self, *answers: int, driver: int = 13000) -> None:
        super().__init__(answers=list(answers), driver=driver, asked=0)

    def cuda_driver_version(self) -> int:
        return int(self.driver)

    def cuda_probe(self) -> tuple[int, str, int]:
        self.asked += 1
        error = self.answers.pop(0)
        return error, f"meaning of {error}" if error else "", 90


@pytest.fixture
def pretend(built: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a Hopper GPU with an extension that answers so."""

    def make(*answers: int, driver: int = 13000) -> FakeExtension:
        pretend_device(built, (9, 0))
        fake = FakeExtension(*answers, driver=driver)
        built.setattr(native, "_C", fake)
        cuda._launch_problem.cache_clear()
        return fake

    yield make
    cuda._launch_problem.cache_clear()


def test_the_driver_is_asked_once_for_each_device(pretend: Any) -> None:
    fake = pretend(0, 35)
    assert all(cuda.unavailable_reason(torch.device("cuda")) is None for _ in range(3))
    assert cuda.unavailable_reason(torch.device("cuda", 0)) is None and fake.asked == 1
    reason = cuda.unavailable_reason(torch.device("cuda", 1))
    assert reason is not None and fake.asked == 2
    assert cuda.unavailable_reason(torch.device("cuda", 1)) == reason and fake.asked == 2


@pytest.mark.parametrize(
    ("error", "driver", "said"),
    [
        (35, 12080, ("CUDA 13.0", "no more than CUDA 12.8", "update the driver")),
        (35, 0, ("there is no NVIDIA driver",)),
        (
            209,
            13000,
            ("sm_80 sm_90a compute_90", "Pretended GPU (compute capability 9.0)", "install fastdpo"),
        ),
        (222, 13000, ("meaning of 222", "install fastdpo again")),
        (999, 13000, ("the driver answers: meaning of 999 (error 999)",)),
    ],
)
def test_what_cannot_run_says_why(pretend: Any, error: int, driver: int, said: tuple[str, ...]) -> None:
    pretend(error, driver=driver)
    reason = str(cuda.unavailable_reason(torch.device("cuda")))
    assert all(text in reason for text in said), reason


def test_no_memory_for_the_code_is_no_answer(pretend: Any) -> None:
    pretend(2, 0)
    with pytest.raises(torch.OutOfMemoryError, match="cuda:0"):
        cuda.unavailable_reason(torch.device("cuda"))
    assert cuda.unavailable_reason(torch.device("cuda")) is None


@pytest.mark.skipif(native.cuda_problem() is not None, reason=str(native.cuda_problem()))
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the driver where there is none")
def test_the_real_probe_without_a_driver() -> None:
    """It answers, and the same again: no error is left behind."""
    error, meaning, _ = native._C.cuda_probe()
    assert error != 0 and meaning
    assert native._C.cuda_probe()[0] == error


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
    built.setattr(cuda, "_launch_problem", lambda index: None)
    reason = cuda.unavailable_reason(torch.device("cuda"))
    if is_enough:
        assert reason is None
    else:
        assert reason == "it needs compute capability 8.0 or higher, Pretended GPU has 7.5"


def run_on(logits: torch.Tensor) -> None:
    outputs = RowOutputs(torch.empty(1), torch.empty(1))
    cuda.row_kernel(logits, torch.zeros(1, dtype=torch.int64), LogitTransform(), outputs)
