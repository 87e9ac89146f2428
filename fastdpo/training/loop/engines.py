"""The loop under FSDP2 and DeepSpeed: which of them runs, what it takes, and frozen models split alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from fastdpo.integrations.engines import engine_around, is_split_by_tensors
from fastdpo.training.settings.engines import check_engine, told_engine
from fastdpo.training.settings.parallel import name_parallel


def engine_of(accelerator: Any) -> str | None:
    """``FSDP1``, ``FSDP2``, or ``ZeRO-0`` to ``ZeRO-3``; None of one process, or DDP."""
    state = accelerator.state
    if getattr(state, "deepspeed_plugin", None) is not None:
        return f"ZeRO-{state.deepspeed_plugin.zero_stage}"
    if getattr(state, "fsdp_plugin", None) is not None and "FSDP" in str(accelerator.distributed_type):
        return "FSDP2" if accelerator.is_fsdp2 else "FSDP1"
    return None


def settle_saving(args: Any) -> bool:
    """Whether checkpoints have the optimiser's state, of which transformers says that a model that it split
    has none: here it has (``split_checkpoint.py``), and for the length of its constructor it is not asked."""
    saves_all = not args.save_only_model
    args.save_only_model = args.save_only_model or (args.tp_size or 1) > 1
    return saves_all


def is_split(accelerator: Any) -> bool:
    """Whether every forward pass is an exchange of the ranks, which all have to make alike."""
    return is_split_as_loaded(accelerator) or engine_of(accelerator) in ("FSDP2", "ZeRO-3")


def is_split_as_loaded(accelerator: Any) -> bool:
    """Whether transformers has split the policy by its tensors, and by FSDP2 over the other ranks."""
    sizes = getattr(accelerator, "parallelism_config", None)
    return sizes is not None and sizes.tp_enabled


def averaged_ranks(accelerator: Any, args: Any) -> int:
    """How many ranks' gradients are averaged: those of a tensor-parallel group have one gradient."""
    return int(accelerator.num_processes) // (args.tp_size or 1)


def settle_tensors(args: Any, policy: Any) -> None:
    """Hold ``tp_size`` to what a model is split by.

    Raises:
        ValueError: a model that was loaded otherwise than the setting says; says how it is to be loaded.
    """
    from accelerate.state import PartialState

    own = getattr(policy, "tp_size", None) or 1
    if max(own, args.tp_size or 1) > 1 and PartialState().distributed_type == DistributedType.MULTI_CPU:
        raise ValueError(
            f"tp_size: got {args.tp_size or own} on a CPU, while accelerate has it on GPUs alone; wanted 1"
        )
    if own == (args.tp_size or 1):
        if own > 1 and hasattr(policy, "peft_config") and engine_around(policy) is not None:
            raise ValueError(
                f"tp_size: got {own} of {args.world_size} ranks and an adapter, which PEFT splits by tensors "
                f"alone; wanted {args.world_size}, or no adapter, or engine='fsdp2' without tp_size"
            )
        return
    if args.tp_size is not None:
        raise ValueError(
            f"tp_size: got {args.tp_size} and a model split over {own} ranks, wanted a path or hub id as the "
            "model, or AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig("
            f"tp_size={args.tp_size}, fsdp_size=...))"
        )
    args.tp_size = own
    name_parallel(args)


def settle_engine(args: Any, accelerator: Any) -> None:
    """Hold a run to what its engine can do, and the engine to what log-probabilities need.

    accelerate has FSDP2 round what a model returns to 16 bits, and reduce gradients in them: here neither.

    Raises:
        ValueError: a setting that does not go with the engine; says what to write instead.
    """
    engine = engine_of(accelerator)
    told = told_engine(args)
    if told is not None and told.startswith("FSDP") and engine is None:
        raise ValueError(
            f"fsdp: got {told}, which accelerate runs in several processes, one a GPU, and here are "
            f"{accelerator.num_processes} on {accelerator.device.type}: wanted torchrun or accelerate launch "
            "on GPUs, or no engine"
        )
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    check_engine(args, engine)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if engine == "FSDP2" and getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def on_device(accelerator: Any, model: nn.Module | None) -> nn.Module | None:
    """A reference or a teacher where it is used; one that will be split stays where it is."""
    if is_split_as_loaded(accelerator):
        whole = model is not None and not is_split_by_tensors(model)
        return model.to(accelerator.device) if model is not None and whole else model
    if model is None or is_split(accelerator):
        return model
    prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    return prepared


def split_frozen(accelerator: Any, model: nn.Module | None) -> nn.Module | None:
    """A reference or a teacher split as the policy is, so that each rank holds its part."""
    if model is None or not is_split(accelerator) or is_split_as_loaded(accelerator):
        return model
    return (_sharded if engine_of(accelerator) == "FSDP2" else _partitioned)(accelerator, model)


def _sharded(accelerator: Any, model: nn.Module) -> nn.Module:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule

    accelerator.state.fsdp_plugin.set_auto_wrap_policy(model)
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model).eval()
    for module in sharded.modules():
        # Units that keep their weights for the backward pass would keep them for good: there is none.
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
    return sharded


def _partitioned(accelerator: Any, model: nn.Module) -> nn.Module:
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"] = {
        name: value
        for name, value in config["zero_optimization"].items()
        if not name.startswith("offload_optimizer")
    }
    # Without training DeepSpeed asks for them all the same.
    config["train_micro_batch_size_per_gpu"] = config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = accelerator.num_processes
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # returns nothing
    partitioned: nn.Module = engine
    return partitioned
