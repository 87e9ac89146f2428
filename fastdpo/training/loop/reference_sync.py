"""TR-DPO: the reference copy follows the policy, every so many steps; each rank moves its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdpo.integrations.partitioned import gathered
from fastdpo.losses.reference_updates import mix_parameters
from fastdpo.training.loop.base import BaseTrainer
from fastdpo.training.loop.take_over import named_tensors, on_main, put_tensor, whole_shape

REFERENCE_FILE = "reference_model.pt"


def sync_reference(trainer: BaseTrainer) -> None:
    """After an optimiser step: mix the policy into the reference where it is time to."""
    args = trainer.args
    if not args.sync_ref_model or trainer.state.global_step % args.ref_model_sync_steps != 0:
        return
    reference = trainer.accelerator.unwrap_model(trainer.reference.model)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    for target, source in zip(reference.parameters(), policy.parameters(), strict=True):
        _mix(target, source, args.ref_model_mixup_alpha)


def _mix(target: Any, source: Any, weight: float) -> None:
    if isinstance(target, DTensor):  # both models are cut alike
        mix_parameters([target.to_local()], [source.to_local()], weight)
    elif hasattr(target, "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters
        # Whole on every rank for a moment, as weights that ZeRO-3 never cuts are for good.
        with gathered([source]), gathered([target], modifier_rank=0):
            mix_parameters([target], [source], weight)
    else:
        mix_parameters([target], [source], weight)


def save_reference(trainer: BaseTrainer, folder: Path) -> None:
    """The moved reference into a checkpoint, whole; it is nowhere else. Every rank takes part."""
    if not trainer.args.sync_ref_model:
        return
    reference = trainer.accelerator.unwrap_model(trainer.reference.model)
    found: dict[str, Tensor] = {}
    for name, tensor in named_tensors(reference).items():
        with gathered([tensor]):
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if trainer.accelerator.is_main_process:  # of the others each would keep a whole model for nothing
                found[name] = value.detach().to("cpu", copy=hasattr(tensor, "ds_id"))
    if trainer.accelerator.is_main_process:
        torch.save(found, folder / REFERENCE_FILE)


def load_reference(trainer: BaseTrainer, folder: Path) -> None:
    """The reference as it was at a checkpoint, of whatever engine.

    Raises:
        ValueError: the checkpoint has none, or of another model, so what the run went on with is not known.
    """
    if not trainer.args.sync_ref_model:
        return
    path, accelerator = folder / REFERENCE_FILE, trainer.accelerator
    wanted = named_tensors(accelerator.unwrap_model(trainer.reference.model))
    saved: dict[str, Tensor] = {}

    def read() -> list[str]:
        if not path.exists():
            raise ValueError(
                f"sync_ref_model: {path} is missing, wanted the reference as the checkpoint left it"
            )
        saved.update(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        # ZeRO-3 saves no buffers, which do not move.
        known = [n for n, t in wanted.items() if n in saved or isinstance(t, nn.Parameter)]
        other = [n for n in known if n not in saved or saved[n].shape != whole_shape(wanted[n])]
        if other:
            got = tuple(saved[other[0]].shape) if other[0] in saved else None
            wants = whole_shape(wanted[other[0]])
            raise ValueError(f"sync_ref_model: {path} has {other[0]} in shape {got}, wanted {wants}")
        return known

    for name in on_main(accelerator, read):
        put_tensor(accelerator, wanted[name], saved.get(name))
