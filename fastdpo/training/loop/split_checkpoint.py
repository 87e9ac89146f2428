"""Checkpoints of a model that transformers split as it loaded it: whole weights and a whole optimiser.

transformers saves such a model whole, but of the optimiser only the first rank's parts, and it loads neither
into the parts of the ranks. Here both are whole in the file, by the parameters' names, so that any number of
ranks goes on from it. Every rank has to call these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.trainer import OPTIMIZER_NAME


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Over the file that has the first rank's parts."""
    state = get_optimizer_state_dict(
        trainer.model,
        _inner(trainer.optimizer),
        options=StateDictOptions(full_state_dict=True, cpu_offload=True),
    )
    if trainer.args.should_save:
        torch.save(state, folder / OPTIMIZER_NAME)


def load_optimizer(trainer: Any, folder: Path) -> None:
    """What `save_optimizer` wrote, into the parts of this rank."""
    state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(
        trainer.model, _inner(trainer.optimizer), state, options=StateDictOptions(full_state_dict=True)
    )


def load_weights(model: Any, folder: Path) -> None:
    """A checkpoint's weights, or those of its adapter, into the parts of this rank."""
    from safetensors.torch import load_file

    is_adapter = hasattr(model, "peft_config")
    names = "adapter_model*.safetensors" if is_adapter else "model*.safetensors"
    whole: dict[str, Any] = {}
    for path in sorted(folder.glob(names)):
        whole |= load_file(path)
    if is_adapter:
        adapter = model.active_adapter
        whole = {_with_adapter(name, adapter): value for name, value in whole.items()}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad or not is_adapter}
    missing = sorted(wanted - whole.keys())
    if missing:
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no weights for {missing[0]} and {len(missing) - 1} others"
        )
    # `strict`: what is tied has one name in the file, and an adapter's file nothing of its model.
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, strict=False))


def _with_adapter(name: str, adapter: str) -> str:
    """A parameter's name in the model: a file leaves the adapter's out."""
    if ".modules_to_save." in name or not (name.endswith(".weight") and ".lora_" in name):
        return name
    return f"{name.removesuffix('.weight')}.{adapter}.weight"


def _inner(optimizer: Any) -> Any:
    """What accelerate wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
