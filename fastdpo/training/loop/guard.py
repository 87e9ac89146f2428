"""The part of the trainer that looks whether losses and gradients are finite."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from fastdpo.training.batches.batch import Batch
from fastdpo.training.data.row_numbers import row_list
from fastdpo.training.loop.saving import SavingTrainer
from fastdpo.training.loop.step import bad_rows
from fastdpo.types import PreferenceLossOutput

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss, or a gradient, is NaN or infinite; the message names the step and, of a loss, the rows."""


class GuardedTrainer(SavingTrainer):
    """What ``on_nonfinite_loss`` says; gradients are looked at where that costs no wait of its own."""

    _is_step_bad = False
    _grad_norm: Any = None

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # Under FSDP2 of this rank's part until somebody asks, which all ranks have to do.
        self._grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self._grad_norm

    def _has_bad_gradients(self) -> bool:
        """Whether those of the last step were not finite; of losses in fp16 a scaler sees to it."""
        if self._grad_norm is None or self.args.fp16:
            return False
        return not math.isfinite(float(self._grad_norm))

    def check_gradients(self) -> None:
        """Before a checkpoint, at the end, and where a loss is bad: whether the last step's were finite.

        Raises:
            NonFiniteLossError: its gradients were not finite.
        """
        if self._has_bad_gradients():
            raise NonFiniteLossError(
                f"the gradients of step {self.state.global_step} are not finite (their norm is "
                f"{float(self._grad_norm)}), though its loss is: its weights are no use; go on from the last "
                "checkpoint (on_nonfinite_loss='skip' leaves such steps out)"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_gradients()
        super()._save_checkpoint(model, trial)

    def _report_nonfinite(self, inputs: Batch, result: PreferenceLossOutput) -> None:
        self.check_gradients()
        rows = row_list(bad_rows(inputs, result))
        step = f"the loss is {result.loss.item()} at step {self.state.global_step + 1}"
        message = f"{step}, from the log-probabilities of {rows} of the training data"
        if self.args.on_nonfinite_loss == "stop":
            raise NonFiniteLossError(f"{message} (on_nonfinite_loss='skip' leaves such steps out)")
        logger.warning("%s; this optimiser step is left out", message)
        self._is_step_bad = True

    def drop_nonfinite_step(self) -> None:
        """Before an optimiser step: forget the gradients if they, or the loss of any rank, are not finite."""
        if self.args.on_nonfinite_loss != "skip":
            return
        if self._has_bad_gradients():
            if not self._is_step_bad:
                logger.warning(
                    "the gradients of step %d are not finite, though its loss is; it is left out",
                    self.state.global_step + 1,
                )
            self._is_step_bad = True
        self._grad_norm = None
        num_bad = self._over_ranks(torch.tensor(int(self._is_step_bad), device=self.accelerator.device))
        # A gradient scaler finds the bad gradients, and skips the step, by itself.
        if num_bad > 0 and self.accelerator.scaler is None:
            self.optimizer.zero_grad()
        self._is_step_bad = False
