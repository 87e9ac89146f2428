"""TR-DPO: the reference copy follows the policy, every so many steps."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from fastdpo.losses.reference_updates import mix_parameters
from fastdpo.training.loop.base import BaseTrainer

REFERENCE_FILE = "reference_model.pt"
logger = logging.getLogger(__name__)


def sync_reference(trainer: BaseTrainer) -> None:
    """After an optimiser step: mix the policy into the reference where it is time to."""
    args = trainer.args
    if not args.sync_ref_model or trainer.state.global_step % args.ref_model_sync_steps != 0:
        return
    reference = trainer.accelerator.unwrap_model(trainer.reference.model)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    mix_parameters(reference.parameters(), policy.parameters(), args.ref_model_mixup_alpha)


def save_reference(trainer: BaseTrainer, folder: Path) -> None:
    """The moved reference into a checkpoint; it is nowhere else."""
    if trainer.args.sync_ref_model and trainer.accelerator.is_main_process:
        reference = trainer.accelerator.unwrap_model(trainer.reference.model)
        torch.save(reference.state_dict(), folder / REFERENCE_FILE)


def load_reference(trainer: BaseTrainer, folder: Path) -> None:
    """The reference as it was at a checkpoint.

    Raises:
        ValueError: the checkpoint has none, so what the run went on with is not known.
    """
    if not trainer.args.sync_ref_model:
        return
    path = folder / REFERENCE_FILE
    if not path.exists():
        raise ValueError(f"sync_ref_model: {path} is missing, wanted the reference as the checkpoint left it")
    reference = trainer.accelerator.unwrap_model(trainer.reference.model)
    reference.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
