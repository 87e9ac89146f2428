"""Adapters of peers that this machine cannot run: how they call, and with what reason they do not."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.op import METHODS, bench_task
from benchmarks.peers import _torch_logps
from benchmarks.problem import IGNORED, PASSES, HeadProblem, Size

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)  # in name only
BF16 = torch.bfloat16
TINY = Size("tiny", 256, torch.float32, 50)
BY_NAME = {method.name: method for method in METHODS}


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of that name, and of its packages."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("task", PASSES)
def test_unsloth_is_called_as_its_trainers_do(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two functions written down in plain torch, with the arguments that theirs have."""
    called: list[str] = []

    def fused_linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        called.append("logprobs")
        assert hidden.shape[0] == targets.shape[0] == TINY.num_tokens and (targets == IGNORED).any()
        return _torch_logps(hidden, weight, targets)

    def fused_linear_cross_entropy(
        hidden: Tensor, weight: Tensor, bias: None, targets: Tensor, *, divisor: int, ignore_index: int
    ) -> Tensor:
        called.append("ce")
        assert ignore_index == IGNORED and divisor == (targets != IGNORED).sum()
        return -_torch_logps(hidden, weight, targets).sum() / divisor

    stand_in(
        monkeypatch, "unsloth_zoo.fused_losses.fused_linear", fused_linear_logprobs=fused_linear_logprobs,
        fused_linear_cross_entropy=fused_linear_cross_entropy,
    )  # fmt: skip
    result = bench_task(HeadProblem(TINY, CPU), task, [BY_NAME["unsloth"]], repeats=1, is_timed=False)
    assert set(result["contenders"]) == {"unsloth"} and called == ["ce" if task == "ce" else "logprobs"]


def test_ligers_tensor_parallel_kernel_gets_a_group_and_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Function:
        @staticmethod
        def apply(
            hidden: Tensor, weight: Tensor, target: Tensor, group: None, temperature: float, ignored: int
        ) -> Tensor:
            assert (group, temperature, ignored) == (None, 1.0, IGNORED)  # the group of all, were there one
            return -_torch_logps(hidden, weight, target)

    def configure(*, process_groups: Any, bootstrap_group: None, device: torch.device, flsce: Any) -> bool:
        made.append(flsce)
        return process_groups == {"tp": bootstrap_group}

    stand_in(
        monkeypatch, "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        LigerFusedLinearScaledCrossEntropyTPFunction=Function,
    )  # fmt: skip
    stand_in(monkeypatch, "liger_cute_kernels.nvshmem")
    sys.modules["liger_cute_kernels"].nvshmem = sys.modules["liger_cute_kernels.nvshmem"]  # type: ignore[attr-defined]
    settings = ModuleType("configure")
    settings.configure = configure  # type: ignore[attr-defined]
    settings.FusedLinearCrossEntropyConfig = lambda *sizes, group: sizes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.configure", settings)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *names, **options: made.append(names))
    problem = HeadProblem(TINY, CPU)
    for task in ("stash", "pairs"):
        problem.check(task, BY_NAME["liger-cute"].run(problem, task), is_exact=False)
    assert made == [("nccl",), (256, 64, 1003)]  # once for both tasks of a size


def reason(name: str, dtype: torch.dtype = BF16) -> str:
    found = BY_NAME[name].unavailable(GPU, dtype)
    assert found is not None
    return found


def test_peers_of_a_gpu_say_why_they_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    for module in ("unsloth_zoo", "liger_cute_kernels"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "capability (9, 0) or (10, 0) or (10, 3), this GPU has (8, 0)" in reason("liger-cute")
    assert "`pip install unsloth==" in reason("unsloth")
    assert "takes bfloat16 and float16 only, not float32" in reason("torch-linear-ce-cute", torch.float32)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert "takes bfloat16 only, not float16" in reason("liger-cute", torch.float16)
    assert "not installed" in reason("liger-cute") and "`pip install liger-cute-kernels" in reason(
        "liger-cute"
    )
    stand_in(monkeypatch, "liger_cute_kernels")
    stand_in(monkeypatch, "liger_kernel.ops.configure")
    assert "start the benchmark with torchrun" in reason("liger-cute")
    # Whichever torch runs this: before 2.15 there is no such kernel, and nothing here brings CuTe.
    wanted = "torch 2.15 has" if torch.__version__ < (2, 15) else "nvidia-cutlass-dsl"
    assert wanted in reason("torch-linear-ce-cute")
