"""The evaluation half of the trainer: exact means over the rows of a data set, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from fastdpo.training.batches.layouts import padded_collator
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.loop.base import BaseTrainer
from fastdpo.training.loop.engines import is_split
from fastdpo.training.loop.over_optimisation import OverOptimisationMonitor
from fastdpo.training.loop.step import BatchCounts, batch_loss, record, row_rewards, with_margins


class EvaluatingTrainer(BaseTrainer):
    """The evaluation of ``PreferenceTrainer``."""

    _eval_counts: BatchCounts | None = None
    _eval_rows: int | None = None
    _eval_width: int | None = None

    @property
    def is_evaluated(self) -> bool:
        """Whether the log has an evaluation of the model as it is now."""
        last = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        has_metrics = any(name.startswith("eval_") for entry in last for name in entry)
        # The best model takes the last one's place at the end.
        return has_metrics and not self.args.load_best_model_at_end

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ``Trainer.evaluate``; ``eval_dataset`` may be whatever the constructor takes."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            self.eval_dataset = self._with_reference(self.eval_dataset)
        else:
            eval_dataset = self._with_reference(self._prepare_data(eval_dataset, may_be_many=True))
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """As ``Trainer.predict``; ``predictions`` are the rewards ``(P, 2)`` of chosen and rejected.

        Of other kinds of data those of each row's answers, ``(R, K)``, NaN behind the last.
        """
        return super().predict(
            self._with_reference(self._prepare_data(test_dataset)), ignore_keys, metric_key_prefix
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As ``Trainer.evaluation_loop``, with exact means over the rows that are evaluated."""
        dataset: RowDataset = dataloader.dataset
        evaluated = self._evaluated(dataset, dataloader)
        self._eval_rows = len(evaluated)
        on_prompt = bool(self.args.nll_on_prompt)
        self._eval_counts = BatchCounts(
            evaluated.num_loss_rows, evaluated.num_nll_tokens(on_prompt=on_prompt)
        )
        self._eval_width = dataset.width
        self._sums["eval"].clear()
        size = self.args.per_device_eval_batch_size
        self.gather_function = self.ranks.gathered_for_metrics  # for the length of a loop
        with self.compute_loss_context_manager():
            self.loss_state.begin_evaluation(self.model, dataset, self.data_collator, size)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.loss_state.end_evaluation()
        means = with_margins(self._sums["eval"].means(self._over_ranks))
        means["num_tokens"] = self._total_input_tokens()
        for monitor in self.callback_handler.callbacks:
            if isinstance(monitor, OverOptimisationMonitor):
                means |= self._measure(monitor, dataset)
        means = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    def _evaluated(self, dataset: RowDataset, dataloader: Any) -> RowDataset:
        """The rows that batches are made of: the first ones, without those of a round that is not full."""
        if not self.args.dataloader_drop_last:
            return dataset
        count = len(dataloader) * dataloader.total_batch_size
        return dataset.subset(torch.arange(min(count, len(dataset))))

    def _measure(self, monitor: OverOptimisationMonitor, dataset: RowDataset) -> dict[str, float]:
        # The same on every rank, and small: no rank waits for another.
        with self.compute_loss_context_manager():
            return monitor.measure(
                self.accelerator.unwrap_model(self.model),
                dataset,
                padded_collator(self.args, 0),
                batch_size=self.args.per_device_eval_batch_size,
                device=self.accelerator.device,
            )

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, rewards ``(P, 2)`` (of other kinds ``(R, K)``) and a label of 0 per row."""
        inputs = self._prepare_inputs(inputs)
        width = self._eval_width or 2
        rewards = torch.zeros(inputs.num_rows, width, device=self.accelerator.device)
        loss = rewards.new_zeros(())
        kept, sums = self._rows_without_repeats(len(rewards)), self._sums["eval"]
        # For a split model's forward pass the other ranks wait, and in the end for names of metrics.
        if kept > 0 or not sums or is_split(self.accelerator):
            batch = inputs.first(max(kept, 1))
            counts = self._eval_counts or self._count([batch])
            # The unwrapped model: ranks may have unlike numbers of batches, and DDP's forward waits for all.
            with self.compute_loss_context_manager():
                result = batch_loss(
                    self.model, self.model, batch, counts, self.args, self.reference, self.loss_state.frozen,
                    router=self.router,
                )  # fmt: skip
            if kept == 0:
                batch = replace(batch, is_filler=True)
            record(sums, batch, result, nll_on_prompt=bool(self.args.nll_on_prompt))
            # A share of the mean over all rows; scaled so that the mean over rows adds the shares up.
            share = result.loss * (self._eval_rows or kept) / kept if kept else rewards.new_zeros(())
            sums.add_mean("loss", share, kept)
        if kept > 0:
            rewards[:kept], loss = row_rewards(batch, result, width), result.loss
        return (
            (loss, None, None) if prediction_loss_only else (loss, rewards, torch.zeros_like(rewards[:, 0]))
        )

    def _rows_without_repeats(self, size: int) -> int:
        """How many rows of this rank's batch are no repeats, which fill up the last round of the ranks."""
        state = self.accelerator.gradient_state
        if self.ranks.count == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(max(state.remainder - self.ranks.index * size, 0), size)
