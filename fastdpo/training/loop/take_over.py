"""Going on under another engine than a checkpoint's, or on another number of ranks.

Every engine reads what it wrote itself; FSDP2 on any number of ranks. What another wrote is read by the first
rank, tensor by tensor, and each rank takes its part: weights, and what the optimiser keeps of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import SCHEDULER_NAME

from fastdpo.integrations.partitioned import is_partitioned, whole_shape
from fastdpo.training.loop.checkpoint_files import TensorSource, layout_of, read_run, tensors_of
from fastdpo.training.loop.engines import engine_of, is_split_as_loaded
from fastdpo.training.reference.sources import is_adapter_model

logger = logging.getLogger(__name__)


def is_native(trainer: Any, folder: Path) -> bool:
    """Whether this run's engine reads a checkpoint by itself."""
    if is_split_as_loaded(trainer.accelerator):
        return True  # or it is refused: `check_same_run`
    layout, engine = layout_of(folder), engine_of(trainer.accelerator)
    if engine is None:
        return layout == "whole"
    if engine == "FSDP2":
        # Where the head has an adapter, accelerate's file of what is trained lacks it.
        if is_adapter_model(trainer.accelerator.unwrap_model(trainer.model)):
            return False
        kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
        return layout == ("FSDP2 sharded" if "SHARDED" in kind else "FSDP2")
    told = (read_run(folder) or {}).get("ranks", {})
    ranks = told.get("ranks", len([*folder.glob("global_step*/*optim_states.pt")]))
    return (
        layout == "ZeRO"
        and ranks == trainer.accelerator.num_processes
        and told.get("engine") in (None, engine)
    )


def on_main(accelerator: Any, find: Callable[[], Any]) -> Any:
    """What the main rank finds, on every rank; what it raises is raised on all.

    A rank that went on alone would wait for the others in the next exchange.

    Raises:
        ValueError: as on the main rank; RuntimeError for any other error there.
    """
    found: list[Any] = [None, None, None]
    if accelerator.is_main_process:
        try:
            found[0] = find()
        except ValueError as error:
            found[1] = str(error)
        except Exception as error:
            logger.exception("on the first rank")
            found[2] = f"on the first rank: {type(error).__name__}: {error}"
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1])
    if found[2] is not None:
        raise RuntimeError(found[2])
    return found[0]


def take_over(trainer: Any, folder: Path, *, with_optimizer: bool = True) -> None:
    """Load a checkpoint of another engine into a run whose model and optimiser are prepared.

    Args:
        with_optimizer: False for the weights alone.

    Raises:
        ValueError: it lacks weights of this model, or has them in another shape; on every rank.
    """
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    groups = _groups(trainer, model)
    names = named_tensors(model)
    trained = [name for group in groups for name in group]
    is_main = accelerator.is_main_process
    opened: list[TensorSource] = []
    with ExitStack() as stack:

        def survey() -> dict[str, Any]:
            opened.append(stack.enter_context(tensors_of(folder, groups)))
            return _survey(opened[0], folder, names, trained if with_optimizer else [])

        keys = on_main(accelerator, survey)
        source = opened[0] if opened else None
        for known, alias in keys["weights"].items():
            put_tensor(accelerator, names[known], None if source is None else source.weight(alias))
        if keys["states"]:
            _put_states(trainer, {name: names[name] for name in trained}, keys["states"], source)
    said = "weights"
    if with_optimizer:
        path = folder / SCHEDULER_NAME
        has_schedule = on_main(accelerator, path.is_file)
        if has_schedule:
            _resume_schedule(trainer, path)
        parts = {"the optimiser's state": bool(keys["states"]), "its schedule": has_schedule}
        said = ", ".join(["weights", *(part for part, is_there in parts.items() if is_there)])
        anew = [part for part, is_there in parts.items() if not is_there]
        said += f"; anew begin {' and '.join(anew)}" if anew else ""
    if is_main:
        engine = engine_of(accelerator) or "no engine"
        is_all = keys["states"] or not with_optimizer
        logger.log(
            logging.INFO if is_all else logging.WARNING,
            "%s (written as %s, read under %s), taken over: %s",
            folder, layout_of(folder), engine, said,
        )  # fmt: skip


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers by name, those of several names by the first."""
    kept = model.state_dict(keep_vars=True) if not is_partitioned(model) else {}
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _groups(trainer: Any, model: nn.Module) -> list[list[str]]:
    """Names of the trained parameters, group by group, as transformers gives them to its optimiser."""
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [[n for n in trained if n in decayed], [n for n in trained if n not in decayed]]


def _aliases(name: str) -> Iterator[str]:
    yield name
    # A tied head is kept under one of two names.
    if name.endswith("embed_tokens.weight"):
        yield name.rpartition("model.embed_tokens.weight")[0] + "lm_head.weight"


def _survey(
    source: TensorSource, folder: Path, names: dict[str, Tensor], trained: list[str]
) -> dict[str, Any]:
    """Which of the model's tensors a checkpoint has, and what the optimiser keeps of each."""
    found, missing = {}, []
    for name, tensor in names.items():
        of_name = ((other, source.weight(other)) for other in _aliases(name))
        alias, value = next((pair for pair in of_name if pair[1] is not None), (name, None))
        if value is None:
            missing += [name] if getattr(tensor, "requires_grad", False) else []
            continue
        if tuple(value.shape) != whole_shape(tensor):
            raise ValueError(
                f"resume_from_checkpoint: {folder} has {name} in shape {tuple(value.shape)}, wanted "
                f"{whole_shape(tensor)}"
            )
        found[name] = alias
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"resume_from_checkpoint: {folder} has no {listed}, wanted all that is trained")
    states: dict[str, Any] = {}
    for name in trained:
        of_it = source.states(name)
        if not of_it or any(
            value.dim() and tuple(value.shape) != whole_shape(names[name]) for value in of_it.values()
        ):
            return {"weights": found, "states": {}}
        states[name] = {key: value.dim() > 0 for key, value in of_it.items()}
    return {"weights": found, "states": states}


def _whole(accelerator: Any, value: Tensor | None, like: Any) -> Tensor:
    """A tensor of the main rank's on every rank, where ``like`` lies and in its dtype."""
    if value is None:
        whole = torch.empty(whole_shape(like), dtype=like.dtype, device=like.device)
    else:
        whole = value.to(like.device, like.dtype).contiguous()
    if accelerator.num_processes > 1:
        dist.broadcast(whole, 0)
    return whole


@torch.no_grad()
def put_tensor(accelerator: Any, to: Any, value: Tensor | None) -> None:
    """Give every rank its part of a weight."""
    if isinstance(to, DTensor):
        to.copy_(_part(to, value))
        return
    dtype = torch.promote_types(to.dtype, torch.float32)
    whole = _whole(accelerator, value if value is None else value.to(dtype), _Like(to, dtype))
    if not hasattr(to, "ds_id"):
        to.copy_(whole)
        if getattr(to, "_hp_mapping", None) is not None:
            to.set_full_hp_param(whole)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([to], modifier_rank=0):
        if accelerator.is_main_process:
            to.copy_(whole)
    if to.requires_grad:
        deepspeed.utils.safe_set_local_fp32_param(to, _partition(to, whole))


class _Like:
    """A shape and a place, with a dtype of its own."""

    def __init__(self, tensor: Any, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = whole_shape(tensor), tensor.device, dtype


def _part(to: DTensor, value: Tensor | None) -> DTensor:
    whole = torch.empty(to.shape, dtype=to.dtype) if value is None else value.to(to.dtype)
    return distribute_tensor(whole.to(to.device).contiguous(), to.device_mesh, to.placements)


def _partition(to: Any, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor as ZeRO-3 cuts it: in equal parts, the last one padded."""
    size = to.ds_tensor.ds_numel if hasattr(to.ds_tensor, "ds_numel") else to.ds_tensor.numel()
    padded = torch.nn.functional.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)


def _put_states(
    trainer: Any, trained: dict[str, Any], keys: dict[str, dict[str, bool]], source: TensorSource | None
) -> None:
    """Give every rank its part of what the optimiser keeps."""
    accelerator, optimizer = trainer.accelerator, trainer.optimizer.optimizer
    is_zero = (engine_of(accelerator) or "").startswith("ZeRO")
    if is_zero:
        _make_zero_states(optimizer, next(iter(keys.values())))
    own = {} if is_zero else {id(p): i for i, p in enumerate(_parameters(optimizer))}
    states: dict[int, dict[str, Tensor]] = {}
    for name, parameter in trained.items():
        values = source.states(name) if source is not None else {}
        for key, is_like_it in keys[name].items():
            if not is_like_it:
                step = _whole(accelerator, values.get(key), torch.zeros((), device=accelerator.device))
                if is_zero:
                    _set_zero_step(optimizer, key, step)
                else:
                    states.setdefault(own[id(parameter)], {})[key] = step.cpu()
            elif isinstance(parameter, DTensor):
                states.setdefault(own[id(parameter)], {})[key] = _part(parameter, values.get(key))
            else:
                whole = _whole(accelerator, values.get(key), _Like(parameter, torch.float32))
                if is_zero:
                    _put_zero_state(parameter, key, whole)
                else:
                    states.setdefault(own[id(parameter)], {})[key] = whole.to(parameter.dtype)
    if not is_zero:
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _flat(optimizer: Any) -> list[Tensor]:
    """The flat fp32 parts that DeepSpeed's optimiser of this rank has."""
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    flat: list[Tensor] = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    return flat


def _make_zero_states(optimizer: Any, keys: dict[str, bool]) -> None:
    """The optimiser's state as its first step makes it: DeepSpeed leaves that to the step."""
    for flat in _flat(optimizer):
        optimizer.optimizer.state[flat] = {
            key: torch.zeros_like(flat) if is_like_it else torch.zeros(()) for key, is_like_it in keys.items()
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def _set_zero_step(optimizer: Any, key: str, step: Tensor) -> None:
    for flat in _flat(optimizer):
        optimizer.optimizer.state[flat][key] = step.clone()  # each counts its own steps


def _put_zero_state(parameter: Any, key: str, whole: Tensor) -> None:
    import deepspeed

    if hasattr(parameter, "ds_id"):
        deepspeed.utils.safe_set_local_optimizer_state(parameter, _partition(parameter, whole), key)
    else:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, key)


def _resume_schedule(trainer: Any, path: Path) -> None:
    """The schedule where it was, and the learning rates of it.

    DeepSpeed leaves out a group of the optimiser that is empty; groups have one schedule, so the first stands
    for all.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, now in trainer.lr_scheduler.state_dict().items():
        then = state.get(name)
        if isinstance(now, list) and isinstance(then, list) and len(then) != len(now):
            state[name] = then[:1] * len(now)
    trainer.lr_scheduler.load_state_dict(state)
    for group, rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=False):
        group["lr"] = rate
