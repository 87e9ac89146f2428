"""What runs beside the loop: ``metrics.jsonl``, ``curves.png``, and the trainer's own hooks."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.training.batches.budget import TokenBudgetSampler
from fastdpo.training.batches.samplers import LikeLengthSampler
from fastdpo.training.loop.announce import announce
from fastdpo.training.loop.base import BaseTrainer
from fastdpo.training.loop.curves import CURVES_FILE, draw_curves
from fastdpo.training.loop.largest_batch import try_largest_batch
from fastdpo.training.written import errors_named, placed

METRICS_FILE = "metrics.jsonl"
logger = logging.getLogger(__name__)


class MetricsFileCallback(TrainerCallback):
    """Append every log to ``metrics.jsonl``, one JSON object a line; numbers that are not finite are null.

    A resumed run first drops what was logged after its checkpoint, so that no step appears twice.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = Path(args.output_dir or ".") / METRICS_FILE
        if state.is_world_process_zero and path.exists():
            keep_until(path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        path = Path(args.output_dir or ".") / METRICS_FILE
        with errors_named(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **_finite(logs)}) + "\n")


def keep_until(path: Path, step: int) -> None:
    """Drop from a metrics file what came after ``step``, run summaries, and lines that are no log.

    The last one may be half-written; of others that were changed a line in the log says how many.
    """
    kept, broken = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines[:-1]:
        try:
            entry = json.loads(line)
            is_before = entry["step"] <= step
        except (ValueError, TypeError, KeyError):
            broken += 1
            continue
        if is_before and "train_runtime" not in entry:
            kept.append(line + "\n")
    if broken:
        logger.warning("%s: %d lines that are no log are left out", path, broken)
    with placed(path) as file:
        file.write("".join(kept).encode())


def _finite(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in logs.items()
    }


class CurvesCallback(TrainerCallback):
    """Draw ``curves.png`` from the log at the end of training, and again with a last evaluation."""

    def __init__(self) -> None:
        self.is_over = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_over = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_over = True
        self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_over and state.is_world_process_zero:
            draw_curves(state.log_history, Path(args.output_dir or ".") / CURVES_FILE)


class TrainerHooks(TrainerCallback):
    """The moments of transformers' loop that ``PreferenceTrainer`` has to step into."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.restore_progress()
        if state.is_world_process_zero:
            announce(self.trainer, self.trainer.resumed_from)
        if self.trainer.args.longest_batch_first:
            try_largest_batch(self.trainer)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        # accelerate's loader tells a sampler the epoch, but not through the wrappers of a resumed rank.
        sampler = train_dataloader.batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        sampler = sampler if isinstance(sampler, TokenBudgetSampler) else getattr(sampler, "sampler", None)
        if isinstance(sampler, LikeLengthSampler | TokenBudgetSampler):
            sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.drop_nonfinite_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.step_ended()
