"""Ranks in groups: they share the tensors of every layer, have parts of its rows, or one copy of the model.

``tp_size``, ``sp_size`` and ``dp_replicate_size`` are accelerate's, whose ``ParallelismConfig`` says the
same, in Python or by ``accelerate launch``. transformers splits a model's tensors as it loads it, and over
the other ranks by FSDP2; rows are split here; copies of a model that FSDP2 splits are accelerate's.
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
    """``tp_size``, ``sp_size`` and ``dp_replicate_size`` from themselves, or from accelerate's words.

    Raises:
        ValueError: sizes that do not go together, or that do not divide the number of processes.
    """
    settings: Any = args
    told = _told_sizes(args)
    if told is not None:
        _take_told(args, told)
    settings.parallelism_config = None  # what is said by it is said now; transformers makes its own
    sizes = {name: getattr(args, name) or 1 for name in ("tp_size", "sp_size", "dp_replicate_size")}
    # Beside sp_size accelerate's sizes need not be all processes, unless they say how a model is split.
    if told is not None and (sizes["sp_size"] == 1 or sizes["dp_replicate_size"] * told["dp_shard_size"] > 1):
        sizes["dp_shard_size"] = told["dp_shard_size"]
    if math.prod(sizes.values()) == 1:
        return
    tp, sp, replicas = sizes["tp_size"], sizes["sp_size"], sizes["dp_replicate_size"]
    if tp > 1 and sp > 1:
        raise ValueError(f"tp_size, sp_size: got {tp} and {sp}, wanted one of the two above 1")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    _check_product(sizes, world)
    others = world // (tp * sp * replicas)
    shards = sizes.get("dp_shard_size", others if replicas > 1 else 1)
    if tp > 1:
        if replicas > 1 and shards == 1:
            raise ValueError(
                f"dp_replicate_size: got {replicas} with tp_size {tp} on {world} processes, which leaves "
                "none to split the model over by FSDP2, wanted more processes, or a smaller tp_size"
            )
        _settle_tensors(args)
        if replicas > 1:  # transformers' copies count as shards to accelerate, whose variables name them too
            settings.parallelism_config = _config(tp_size=tp, dp_shard_size=world // tp)
        return
    if sp > 1:
        _settle_sequences(args)
    _settle_replicas(args, replicas, sp * others, shards)


def _check_product(sizes: dict[str, int], world: int) -> None:
    """Raise ValueError for sizes that do not divide the processes, or, all told, are not all of them."""
    product, is_all = math.prod(sizes.values()), "dp_shard_size" in sizes
    if world % product or (is_all and product != world):
        named = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        wanted = str(product) if is_all else f"a multiple of {product}"
        raise ValueError(
            f"{named}: got {world} processes, wanted {wanted}: torchrun --nproc_per_node, or accelerate "
            "launch --num_processes"
        )


def _take_told(args: Any, told: dict[str, int]) -> None:
    for name in ("tp_size", "sp_size", "dp_replicate_size"):
        if getattr(args, name) not in (None, told[name]):
            raise ValueError(
                f"{name}: got {getattr(args, name)}, and {told[name]} in parallelism_config, wanted one"
            )
        setattr(args, name, told[name])
        if told[name] > 1:
            args.given[name] = told[name]
    args.given.pop("parallelism_config", None)
    if told["cp_size"] > 1:
        raise ValueError(
            f"cp_size: got {told['cp_size']}, whose attention in torch takes causal rows on a GPU alone, no "
            "packed ones, and puts their tokens in another order; wanted sp_size, for rows of any kind"
        )


def _told_sizes(args: Any) -> dict[str, int] | None:
    """The sizes that a ``ParallelismConfig`` names, or ``accelerate launch``."""
    given = getattr(args, "parallelism_config", None)
    # By the sizes: the word that they count is taken back below, for accelerate's own ears.
    is_launched = any(f"PARALLELISM_CONFIG_{name.upper()}" in os.environ for name in _SIZES)
    if isinstance(given, str) or not (given or is_launched):
        if given and str(given).lower() not in ("none", "null"):
            raise ValueError(
                f"parallelism_config: got {given!r}, wanted accelerate's ParallelismConfig in Python, or "
                "--tp_size or --sp_size"
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
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"{what}; wanted none with tp_size")
    if args.longest_batch_first and "longest_batch_first" in args.given:
        raise ValueError("longest_batch_first: got True with tp_size, wanted False")
    args.longest_batch_first = False  # the default on a GPU


def _settle_sequences(args: Any) -> None:
    """Parts of sequences: to an engine their ranks are as ranks with data of their own."""
    refused = {
        f"loss_type: got {', '.join(args.loss_type)}, with divergences": args.needs_divergences,
        f"context_chunk: got {args.context_chunk}": args.context_chunk is not None,
        "longest_batch_first: got True": args.longest_batch_first and "longest_batch_first" in args.given,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"{what}; wanted none with sp_size")
    args.longest_batch_first = False  # the default on a GPU
    if launches("PARALLELISM_CONFIG"):  # accelerate would exchange batches and attention once more
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"


def _settle_replicas(args: Any, replicas: int, split_over: int, shards: int) -> None:
    """FSDP2 over groups of ranks, each with all of the model (HSDP): accelerate makes the mesh.

    Args:
        split_over: how many ranks have parts of the model; those that share rows are among them.
        shards: how many of them are asked for.
    """
    is_zero = args.engine in ("zero2", "zero3") or args.deepspeed or launches("DEEPSPEED")
    is_fsdp = args.engine == "fsdp2" or args.fsdp or args.fsdp_config or launches("FSDP")
    if is_zero and replicas > 1:
        raise ValueError(
            f"dp_replicate_size: got {replicas} under DeepSpeed, wanted engine='fsdp2', or none: replicas of "
            "a split model are FSDP2's"
        )
    if not is_fsdp and not is_zero and shards > 1:
        raise ValueError(
            f"dp_shard_size: got {shards}, and dp_replicate_size {replicas}, without an engine that splits a "
            "model, wanted engine='fsdp2'; or neither size, for DDP"
        )
    if is_fsdp and split_over == 1:
        raise ValueError(
            f"dp_replicate_size: got {replicas} of {replicas} processes under FSDP2, which leaves one to "
            f"split a model over; wanted at most {replicas // 2}, or no engine, for DDP"
        )
    if is_fsdp and replicas > 1:
        # To FSDP2 ranks that share rows are as ranks with rows of their own.
        args.parallelism_config = _config(dp_replicate_size=replicas, dp_shard_size=split_over)


def _config(**sizes: int) -> Any:
    """accelerate's words for these sizes, and 1 for the others, whatever its variables say."""
    from accelerate import ParallelismConfig

    return ParallelismConfig(**{**dict.fromkeys(_SIZES, 1), **sizes})


def check_same_settings(args: Any) -> None:
    """Raise ValueError, on every rank, where ranks have other sizes than the first: they would hang."""
    if args.world_size == 1 or not torch.distributed.is_initialized():
        return
    own = {name: getattr(args, name) for name in ("tp_size", "sp_size", "dp_replicate_size", "engine")}
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

    replicas = args.dp_replicate_size or 1
    split = DistributedConfig(
        tp_size=args.tp_size,
        tp_plan="auto",
        fsdp_size=args.world_size // args.tp_size // replicas,
        dp_replicate_size=replicas,
    )
    return {"distributed_config": split}
