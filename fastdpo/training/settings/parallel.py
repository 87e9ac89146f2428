"""Tensor parallelism: ranks that share the tensors of every layer, and see one batch.

``tp_size`` is accelerate's, whose ``ParallelismConfig`` says the same, in Python or by ``accelerate launch``.
transformers splits a model's tensors as it loads it, and over the other ranks by FSDP2.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from fastdpo.training.settings.engines import launches
from fastdpo.training.settings.fields import SettingFields

_SIZES = ("tp_size", "sp_size", "cp_size", "dp_replicate_size", "dp_shard_size")


def name_parallel(args: SettingFields) -> None:
    """``tp_size`` and ``dp_replicate_size`` from themselves, or from accelerate's words for them.

    Raises:
        ValueError: sizes that do not go together, or that do not divide the number of processes.
    """
    settings: Any = args
    told = _told_sizes(args)
    if told is not None:
        if args.tp_size not in (None, told["tp_size"]):
            raise ValueError(
                f"tp_size: got {args.tp_size}, and {told['tp_size']} in parallelism_config, wanted one"
            )
        args.tp_size = told["tp_size"]
        settings.given.pop("parallelism_config", None)
        settings.given |= {"tp_size": args.tp_size} if args.tp_size > 1 else {}
        for name in ("cp_size", "sp_size"):
            if told[name] > 1:
                raise ValueError(
                    f"{name}: got {told[name]}, wanted 1: the loop does not split sequences in this version; "
                    "`sequence_group` of fused_dpo_loss does, in a loop of your own"
                )
        if args.tp_size == 1 and told["dp_replicate_size"] * told["dp_shard_size"] > 1:
            raise ValueError(
                f"parallelism_config: got dp_shard_size {told['dp_shard_size']} and dp_replicate_size "
                f"{told['dp_replicate_size']} without tp_size, wanted engine='fsdp2', or none for DDP"
            )
    tp = args.tp_size or 1
    settings.dp_replicate_size = told["dp_replicate_size"] if told is not None and tp > 1 else 1
    settings.parallelism_config = None  # what is said by it is said now; transformers makes its own
    if tp == 1:
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = {"tp_size": tp}
    if told is not None:
        sizes |= {name: told[name] for name in ("dp_replicate_size", "dp_shard_size")}
    product = math.prod(sizes.values())
    if world % product or (told is not None and product != world):
        named = ", ".join(f"{name} {size}" for name, size in sizes.items())
        wanted = f"a multiple of {tp}" if told is None else str(product)
        raise ValueError(
            f"{named}: got {world} processes, wanted {wanted}: torchrun --nproc_per_node, or accelerate "
            "launch --num_processes"
        )
    _settle_tensors(args)


def _told_sizes(args: Any) -> dict[str, int] | None:
    """The sizes that a ``ParallelismConfig`` names, or ``accelerate launch``."""
    given = getattr(args, "parallelism_config", None)
    is_launched = launches("PARALLELISM_CONFIG")
    if isinstance(given, str) or not (given or is_launched):
        if given and str(given).lower() not in ("none", "null"):
            raise ValueError(
                f"parallelism_config: got {given!r}, wanted accelerate's ParallelismConfig in Python, or "
                "--tp_size"
            )
        return None
    if not given:
        from accelerate import ParallelismConfig

        given = ParallelismConfig()
    found = {name: getattr(given, name, None) for name in _SIZES}
    if any(not isinstance(value, int) for value in found.values()):
        raise ValueError(
            f"parallelism_config: got a {type(given).__name__}, wanted accelerate's ParallelismConfig"
        )
    return {name: int(value or 1) for name, value in found.items()}


def _settle_tensors(args: Any) -> None:
    """Tensor parallelism, and FSDP2 over the other ranks: transformers brings both as it loads a model."""
    if args.engine in ("zero2", "zero3") or args.deepspeed or launches("DEEPSPEED"):
        raise ValueError(
            f"tp_size: got {args.tp_size} with DeepSpeed, wanted engine='fsdp2' or none: transformers splits "
            "tensors and, over the other ranks, FSDP2's units"
        )
    if args.fsdp or args.fsdp_config:
        raise ValueError(
            f"tp_size: got {args.tp_size} and fsdp or fsdp_config, wanted engine='fsdp2' or none: over the "
            "ranks that tp_size leaves, transformers splits the model as it loads it"
        )
    if launches("FSDP"):  # accelerate would split the model once more
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    args.engine = None
    refused = {
        "sync_ref_model: got True, whose steps mix whole models": args.sync_ref_model,
        "offload_activations: got True, which would move split weights": args.offload_activations,
        f"context_chunk: got {args.context_chunk}, which runs whole models": args.context_chunk is not None,
        f"loss_type: got {', '.join(args.loss_type)}, with divergences from a head that would have to be "
        "whole": args.needs_divergences,
        f"mode: got {args.mode!r}, which a split vocabulary has not": args.mode == "pairs",
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"{what}; wanted none with tp_size")
    if args.longest_batch_first and "longest_batch_first" in args.given:
        raise ValueError("longest_batch_first: got True with tp_size, wanted False")
    args.longest_batch_first = False  # the default on a GPU


def check_same_settings(args: Any) -> None:
    """Raise ValueError, on every rank, where ranks have other sizes than the first: they would hang."""
    if args.world_size == 1 or not torch.distributed.is_initialized():
        return
    own = {name: getattr(args, name) for name in ("tp_size", "dp_replicate_size", "engine")}
    found: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(found, own)
    for rank, other in enumerate(found):
        for name, value in other.items():
            if value != found[0][name]:
                raise ValueError(
                    f"{name}: got {value!r} on rank {rank} and {found[0][name]!r} on rank 0, wanted one"
                )


def loading_of(args: Any) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that split a model over the ranks as it is loaded."""
    if (args.tp_size or 1) == 1:
        return {}
    from transformers.distributed import DistributedConfig

    replicas = args.dp_replicate_size
    split = DistributedConfig(
        tp_size=args.tp_size,
        tp_plan="auto",
        fsdp_size=args.world_size // args.tp_size // replicas,
        dp_replicate_size=replicas,
    )
    return {"distributed_config": split}
