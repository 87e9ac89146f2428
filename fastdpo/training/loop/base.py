"""What the parts of ``PreferenceTrainer`` know of it: names and types, and who fills them in."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from fastdpo.training.batches.batch import Batch
from fastdpo.training.batches.ranks import DataRanks
from fastdpo.training.loop.loss_state import LossState
from fastdpo.training.loop.metrics import MetricSums
from fastdpo.training.loop.step import BatchCounts
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig


class BaseTrainer(Trainer):
    """``Trainer`` with what evaluation, checkpoints and callbacks use of ``PreferenceTrainer``."""

    args: PreferenceConfig
    # transformers has these as optional; a PreferenceTrainer is never without them.
    model: Any
    optimizer: Any
    data_collator: Any
    reference: Reference
    loss_state: LossState
    ranks: DataRanks
    told: dict[str, Any]
    """Settings beside ``args`` that the run was told, for ``settings.yaml``."""
    has_ref_model: bool
    router: float
    """Weight of a mixture of experts' load-balancing loss."""
    data_hash: str | None = None
    resumed_from: str | None = None
    _sums: dict[str, MetricSums]
    _input_tokens: Tensor

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A batch on this rank's device."""
        if not isinstance(inputs, Batch):
            raise TypeError(f"data_collator: got a {type(inputs).__name__}, wanted a PaddedBatch")
        return inputs.to(self.accelerator.device)

    # Data, of the trainer itself

    def _prepare_data(self, data: Any, *, may_be_many: bool = False, may_stream: bool = False) -> Any:
        raise NotImplementedError

    def _with_reference(self, data: Any) -> Any:
        raise NotImplementedError

    # Steps, likewise

    def _count(self, batches: list[Batch]) -> BatchCounts:
        raise NotImplementedError

    def _over_ranks(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _total_input_tokens(self) -> int:
        raise NotImplementedError

    # Moments of transformers' loop, which `TrainerHooks` calls

    def restore_progress(self) -> None:
        """When training begins."""
        raise NotImplementedError

    def drop_nonfinite_step(self) -> None:
        """Before a step of the optimiser."""
        raise NotImplementedError

    def step_ended(self) -> None:
        """After it."""
        raise NotImplementedError
