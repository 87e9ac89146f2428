"""The half of the trainer that writes: models with settings and a card, checkpoints, and back from those."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import SCHEDULER_NAME

from fastdpo.training.loop.checkpoint_files import check_checkpoint, write_run
from fastdpo.training.loop.engines import engine_of, is_split_as_loaded
from fastdpo.training.loop.evaluation import EvaluatingTrainer
from fastdpo.training.loop.folders import find_checkpoint, forget, full_disk_named, rotate, warn_of_unfinished
from fastdpo.training.loop.progress import load_progress, save_progress
from fastdpo.training.loop.reference_sync import load_reference, save_reference
from fastdpo.training.loop.run_record import has_own_card, settings_of, write_card, write_settings
from fastdpo.training.loop.same_run import check_same_run, description
from fastdpo.training.loop.split_checkpoint import load_optimizer, load_weights, save_optimizer
from fastdpo.training.loop.take_over import is_native, on_main, take_over
from fastdpo.training.reference.sources import is_adapter_model

logger = logging.getLogger(__name__)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The weights of a model that FSDP2 splits, whole on the main rank's CPU; every rank takes part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(model, options=options)
    return found


class SavingTrainer(EvaluatingTrainer):
    """What ``PreferenceTrainer`` keeps of a run, and goes on from."""

    _is_in_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``: a folder that ``from_pretrained`` loads, under each engine.

        A checkpoint of sharded state dicts has an adapter whole, and else no second copy of the weights.

        Raises:
            OSError: the disk is full; says so, whatever the libraries raise.
        """
        with full_disk_named(Path(output_dir or self.args.output_dir or "."), "the model"):
            self._save_model(output_dir, _internal_call)
        if self._is_in_checkpoint:
            # transformers removes earlier checkpoints before this one is whole: `rotate` does so afterwards.
            self.args.save_total_limit = None

    def _save_model(self, output_dir: str | None, _internal_call: bool) -> None:
        if self._is_sharded():
            is_adapter = is_adapter_model(self.accelerator.unwrap_model(self.model))
            if _internal_call and not is_adapter:
                return
            self._save(output_dir, state_dict=whole_weights(self.model))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        super().save_model(output_dir, _internal_call)

    def _is_sharded(self) -> bool:
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        return engine_of(self.accelerator) == "FSDP2" and "SHARDED" in str(plugin.state_dict_type)

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
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        limit, self._is_in_checkpoint = self.args.save_total_limit, True
        try:
            with full_disk_named(folder, "the checkpoint"):
                # What an earlier attempt left would be taken for this one's.
                on_main(self.accelerator, lambda: forget(folder))
                folder.mkdir(parents=True, exist_ok=True)
                save_progress(self, folder)
                self.loss_state.save(folder)
                save_reference(self, folder)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    # The last: without it the checkpoint was not written to its end.
                    write_run(folder, description(self))
        finally:
            self.args.save_total_limit, self._is_in_checkpoint = limit, False
        if self.args.should_save:
            rotate(folder.parent, limit, folder, self.state.best_model_checkpoint)

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
        elif is_native(self, Path(resume_from_checkpoint)):
            # Before models are prepared; what another engine wrote comes in afterwards.
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _find_checkpoint(self, resume: str | bool | None) -> str | None:
        """The checkpoint to go on from, held to this run; None for a fresh one."""

        def find() -> str | None:
            found = find_checkpoint(self.args, self.args.resume_from_checkpoint if resume is None else resume)
            if found is not None:
                check_same_run(self, Path(found))
                warn_of_unfinished(self.args, Path(found))
            return found

        found: str | None = on_main(self.accelerator, find)
        return found

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        is_own = resume_from_checkpoint is None or is_native(self, Path(resume_from_checkpoint))
        own = resume_from_checkpoint if is_own else None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, own)
        if not is_own:
            take_over(self, Path(resume_from_checkpoint))
        return prepared

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        on_main(self.accelerator, lambda: check_checkpoint(best))
        if is_native(self, best):
            super()._load_best_model()
        else:
            take_over(self, best, with_optimizer=False)

    def restore_progress(self) -> None:
        """At the start of a resumed run: the sums since the last log, the losses' state, the reference."""
        if self.resumed_from is not None:
            load_progress(self, Path(self.resumed_from))
            self.loss_state.load(Path(self.resumed_from))
            load_reference(self, Path(self.resumed_from))
