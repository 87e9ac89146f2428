"""The half of the trainer that writes: models with settings and a card, checkpoints, and back from those."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import SCHEDULER_NAME

from fastdpo.training.loop.engines import is_split_as_loaded
from fastdpo.training.loop.evaluation import EvaluatingTrainer
from fastdpo.training.loop.folders import find_checkpoint, warn_of_unfinished
from fastdpo.training.loop.progress import load_progress, save_progress
from fastdpo.training.loop.reference_sync import load_reference, save_reference
from fastdpo.training.loop.run_record import has_own_card, settings_of, write_card, write_settings
from fastdpo.training.loop.same_run import check_same_run, write_run
from fastdpo.training.loop.split_checkpoint import load_optimizer, load_weights, save_optimizer

logger = logging.getLogger(__name__)


class SavingTrainer(EvaluatingTrainer):
    """What ``PreferenceTrainer`` keeps of a run, and goes on from."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        is_anothers = has_own_card(folder)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        write_settings({**self.told, **settings_of(self.args)}, folder)
        if not is_anothers:
            write_card(self, folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the model in the output directory, unless it has another than ours."""
        folder = Path(self.args.output_dir or ".")
        if self.is_world_process_zero() and not has_own_card(folder):
            write_card(self, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        save_progress(self, folder)
        self.loss_state.save(folder)
        save_reference(self, folder)
        if self.args.should_save:
            write_run(self, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if is_split_as_loaded(self.accelerator):
            save_optimizer(self, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_split_as_loaded(self.accelerator):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self, Path(checkpoint))
        state = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        assert self.lr_scheduler is not None  # made with the optimiser
        self.lr_scheduler.load_state_dict(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_split_as_loaded(self.accelerator):
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _find_checkpoint(self, resume: str | bool | None) -> str | None:
        """The checkpoint to go on from, held to this run; None for a fresh one."""
        found = find_checkpoint(self.args, self.args.resume_from_checkpoint if resume is None else resume)
        if found is not None:
            check_same_run(self, Path(found))
            warn_of_unfinished(self.args, Path(found))
        return found

    def restore_progress(self) -> None:
        """At the start of a resumed run: the sums since the last log, the losses' state, the reference."""
        if self.resumed_from is not None:
            load_progress(self, Path(self.resumed_from))
            self.loss_state.load(Path(self.resumed_from))
            load_reference(self, Path(self.resumed_from))
