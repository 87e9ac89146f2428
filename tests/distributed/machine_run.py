"""One rank of a step under an engine: the bytes it holds, and those of its collectives; JSON lines."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fastdpo import patch_model
from fastdpo.training.loop.trainer import PreferenceTrainer
from tests.distributed.cases import MACHINES
from tests.distributed.loop_run import settings
from tests.distributed.problem import Collectives, batch, dpo, part, print_results, tiny
from tests.distributed.ranks import leave
from tests.distributed.tensor_run import _loaded
from tests.training.conftest import tiny_llama
from tests.training.loop.ddp_run import pairs


class Counted(TrainerCallback):
    """The collectives of the last step, and the gradients that its optimiser found."""

    def __init__(self) -> None:
        self.collectives = Collectives()
        self.gradients = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        deepspeed = _deepspeed(optimizer)
        if deepspeed is None:
            return
        # ZeRO-1 has whole gradients until a backward pass is over, where it takes its part of them.
        name = (
            "step"
            if getattr(deepspeed, "partition_gradients", True)
            else "independent_gradient_partition_epilogue"
        )
        setattr(deepspeed, name, self._counting(getattr(deepspeed, name), deepspeed, model))

    def _counting(self, function: Any, deepspeed: Any, model: Any) -> Any:
        def counting(*given: Any, **options: Any) -> Any:
            flat = getattr(deepspeed, "grad_partitions_flat_buffer", None)
            parts = getattr(deepspeed, "averaged_gradients", {}).values()
            kept = [flat] if flat is not None else [t for of_group in parts for t in of_group or ()]
            whole = [p.grad for p in model.parameters() if p.grad is not None]
            self.gradients = _local([*kept, *whole])
            return function(*given, **options)

        return counting

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.collectives = Collectives()
        self.collectives.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients = self.gradients or _local(p.grad for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.collectives.__exit__(None, None, None)


def _deepspeed(optimizer: Any) -> Any:
    """DeepSpeed's optimiser within accelerate's, if it is one."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "optimizer") else None


def _local(tensors: Iterable[Tensor]) -> int:
    """Bytes of what this rank has of them, each once."""
    own: list[Any] = [t.to_local() if isinstance(t, DTensor) else getattr(t, "ds_tensor", t) for t in tensors]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in own}.values())


def _of_optimizer(optimizer: Any) -> int:
    """Moments, and under DeepSpeed the fp32 copies of what is trained."""
    copies: list[Tensor] = []
    deepspeed = _deepspeed(optimizer)
    if deepspeed is not None:
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
        copies = next(getattr(deepspeed, name) for name in names if hasattr(deepspeed, name))
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    moments = [
        t for of_one in optimizer.state.values() for t in of_one.values() if isinstance(t, Tensor) and t.dim()
    ]
    return _local([*copies, *moments])


def _deepspeed_settings(stage: int, persistent: int) -> dict[str, Any]:
    """What ``engine`` writes, but that no weight of this small model is kept between its passes."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    gathers = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    small = {"stage3_param_persistence_threshold": persistent}
    return {
        **dict.fromkeys((*names, "gradient_clipping"), "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, **gathers, **small},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _case(
    engine: str,
    *,
    lora: bool = False,
    reference: str = "none",
    bf16: bool = False,
    persistent: int = 0,
    tensors: int = 1,
    data: int = 2,
    replicas: int = 1,
) -> dict[str, Any]:
    if tensors > 1:
        return _of_tensors(tensors, data)
    told = {"engine": engine, "deepspeed": None}
    if engine.startswith("zero"):
        told = {"engine": None, "deepspeed": _deepspeed_settings(int(engine[-1]), persistent)}
    else:
        told = {"engine": "hsdp" if replicas > 1 else None if engine == "ddp" else engine}
    loss = {"loss_type": "simpo"} if reference == "none" else {"loss_type": "sigmoid", "reference": reference}
    counted = Counted()
    with tempfile.TemporaryDirectory() as folder:
        args = settings(
            Path(folder),
            told.pop("engine"),
            max_steps=2,
            gradient_accumulation_steps=1,
            bf16=bf16,
            **told,
            **loss,
        )
        trainer = PreferenceTrainer(
            tiny_llama(1),
            args,
            train_dataset=pairs(24, 0, is_even=True),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
            if lora
            else None,
            ref_model=tiny_llama(2) if reference == "copy" else None,
            callbacks=[counted],
        )
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    second = getattr(getattr(trainer, "reference", None), "model", None) if reference == "copy" else None
    return {
        "sent": dict(counted.collectives.sent),
        "weights": _local(model.parameters()),
        "gradients": counted.gradients,
        "optimizer": _of_optimizer(trainer.optimizer),
        "reference": 0 if second is None else _local(second.parameters()),
    }


def _of_tensors(tensors: int, data: int) -> dict[str, Any]:
    model = patch_model(_loaded(tiny(), tensors, data))
    optimizer = torch.optim.AdamW(model.parameters())
    rows = part(batch(), range(4)[dist.get_rank() // tensors * 2 :][:2])
    for _ in range(2):
        optimizer.zero_grad()
        with Collectives() as counted:
            dpo(model, rows, "logps").backward()
        gradients = _local(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
    return {
        "sent": dict(counted.sent),
        "weights": _local(model.parameters()),
        "gradients": gradients,
        "optimizer": _of_optimizer(optimizer),
        "reference": 0,
        "labelled": int((rows["labels"][:, 1:] != -100).sum()),
        "tokens": rows["labels"].numel(),
    }


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    its = {n: c for n, c in MACHINES.items() if n in sys.argv[1:]}
    if any(case["engine"].startswith("zero") for case in its.values()):
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # a build of minutes; gloo does without
    sys.argv[1:] = []
    print_results(its, _case)
    leave()
