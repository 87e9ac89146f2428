"""What goes with the engines that split a model over ranks, and what does not."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from fastdpo.training.settings.fields import SettingFields

# What a launcher tells each rank: its number on a machine, by accelerate's list.
_OF_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


def name_engine(args: SettingFields) -> None:
    """``engine`` in the words of transformers.

    Raises:
        ValueError: beside it ``fsdp``, ``fsdp_config`` or ``deepspeed``, which it stands for; or settings, or
            ``accelerate launch``, ask for what DeepSpeed does, and it is not installed.
    """
    ways = {
        f"engine: got {args.engine!r}": str(args.engine).startswith("zero"),
        "deepspeed: got its settings": args.deepspeed,
        "accelerate launch: got DeepSpeed": launches("DEEPSPEED"),
        f"sp_size: got {args.sp_size}": (args.sp_size or 1) > 1,
    }
    named = [way for way, is_asked in ways.items() if is_asked]
    given = [name for name in ("fsdp", "fsdp_config", "deepspeed") if getattr(args, name)]
    if args.engine is not None and given:
        raise ValueError(f"engine: got {args.engine!r} and {', '.join(given)}, wanted one of the two")
    if named and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"{named[0]}, which needs DeepSpeed: pip install deepspeed")
    if args.engine is None:
        return
    settings: Any = args
    if args.engine == "fsdp2":
        settings.fsdp, settings.fsdp_config = True, {"version": 2}
        return
    stage = int(args.engine.removeprefix("zero"))
    own = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    settings.deepspeed = {
        **dict.fromkeys((*names, "gradient_clipping"), "auto"),
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, **own},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def launches(what: str) -> bool:
    """Whether ``accelerate launch`` names FSDP, DEEPSPEED or a PARALLELISM_CONFIG."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() in ("1", "true", "yes")


def is_launched() -> bool:
    """Whether torchrun, ``accelerate launch``, DeepSpeed's launcher or MPI started this process as a rank."""
    return any(name in os.environ for name in _OF_RANKS)


def check_launched(args: Any) -> None:
    """Raise ValueError for an engine in a process that is no rank, before a model is loaded.

    And before accelerate's state and variables say so to whatever runs in this process next.
    """
    engine = told_engine(args)
    if engine is None or is_launched():
        return
    way = "deepspeed" if engine.startswith("ZeRO") else "fsdp"
    got = f"{way}: got {engine}" if args.engine is None else f"engine: got {args.engine!r}"
    raise ValueError(f"{got} in one process, wanted torchrun --nproc_per_node N or accelerate launch")


def told_engine(args: Any) -> str | None:
    """The engine that settings or ``accelerate launch`` name."""
    if getattr(args, "hf_deepspeed_config", None) is not None:
        stage = args.hf_deepspeed_config.config.get("zero_optimization", {}).get("stage", 0)
        return f"ZeRO-{stage}"
    plugin: Any = getattr(args, "fsdp_plugin_args", None)
    if plugin:
        return f"FSDP{plugin.get('fsdp_version', 2)}"
    if launches("FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return None


def check_engine(args: SettingFields, engine: str | None) -> None:
    """Raise ValueError for settings that an engine cannot honour, before a model is loaded or trained."""
    if engine == "FSDP1":
        raise ValueError(
            "fsdp: got version 1, which transformers gives up, wanted FSDP2: fsdp_config={'version': 2}, or "
            "fsdp_version: 2 in accelerate's file"
        )
    if engine is not None and engine.startswith("ZeRO"):
        _check_own_steps(args, engine)
    if engine not in ("FSDP2", "ZeRO-3"):
        return
    refused = {
        "offload_activations: got True, which would move weights that FSDP2 frees": engine == "FSDP2"
        and args.offload_activations,
        f"context_chunk: got {args.context_chunk}, which runs whole models": args.context_chunk is not None,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"{what}; wanted none under {engine}, or ZeRO-2 or DDP")


def _check_own_steps(args: SettingFields, engine: str) -> None:
    why = f"under {engine}, whose backward pass reduces gradients and takes steps by itself"
    if args.on_nonfinite_loss == "skip":
        raise ValueError(f"on_nonfinite_loss: got 'skip' {why}; wanted 'stop'")
    if args.longest_batch_first and "longest_batch_first" in getattr(args, "given", {}):
        raise ValueError(f"longest_batch_first: got True {why}; wanted False")
    args.longest_batch_first = False  # which is another by default on a GPU


def join_ranks(args: Any) -> None:
    """Ranks that know of each other before a model is split over them: ZeRO-3 splits it as it is loaded."""
    import deepspeed

    _ = args.device
    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
