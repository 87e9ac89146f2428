"""Signs of likelihood over-optimisation: how the policy's most likely tokens change beside the answers.

Source: arXiv:2410.11677 sec. 4: the entropy and the mass of the ten most likely tokens both fall while the
margin between chosen and rejected answers still grows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.ops.linear_logprob import linear_logprob
from fastdpo.training.batches.batch import PaddedBatch
from fastdpo.training.batches.forward import head_states
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.settings.steps import MonitorOptions

STATISTICS = ("topk_mass", "topk_entropy")
logger = logging.getLogger(__name__)


class OverOptimisationMonitor(MonitorOptions, TrainerCallback):
    """Adds ``topk_mass`` and ``topk_entropy`` of the answers' tokens to every evaluation.

    Under ``eval_``: ``topk_mass/chosen``, ``topk_entropy/rejected`` and so on; of unpaired answers chosen are
    the desirable ones, of other kinds of data it is ``.../answers``. Entropy is in nats (the paper has bits).

    Args:
        topk: how many of the most likely tokens.
        num_rows: rows of the evaluation data that are looked at, the first ones.
        renormalize: divide the probabilities by their sum before the entropy; the paper leaves open which it
            has.
        patience: after so many evaluations running in which mass and entropy of the chosen (or all) answers
            fell and ``rewards/margins`` grew, a warning is logged.
        stop: whether training then ends.

    Raises:
        ValueError: a number below 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        # Of each evaluation set, by the prefix of its metrics.
        self._last: dict[str, Mapping[str, float]] = {}
        self._signs: dict[str, int] = {}

    @torch.no_grad()
    def measure(
        self, model: nn.Module, dataset: RowDataset, collator: Any, *, batch_size: int, device: torch.device
    ) -> dict[str, float]:
        """Means over the tokens of each group of answers.

        Args:
            model: the policy, not wrapped.
            collator: makes padded batches.
        """
        was_training = model.training
        model.eval()
        sums: dict[str, Tensor] = {}
        count = min(self.num_rows, len(dataset))
        for start in range(0, count, batch_size):
            batch = collator([dataset[i] for i in range(start, min(start + batch_size, count))])
            self._add(sums, model, batch.to(device))
        model.train(was_training)
        return {name: float(total / tokens) for name, (total, tokens) in sums.items() if tokens > 0}

    def _add(self, sums: dict[str, Tensor], model: nn.Module, batch: PaddedBatch) -> None:
        states = head_states(model, batch)
        labels = batch.sequences.labels[:, 1:]
        options: dict[str, Any] = {"outputs": STATISTICS, "topk": self.topk}
        found = linear_logprob(states.hidden[:, :-1], states.lm_head, labels, **options)
        mass, entropy = found.topk_mass, found.topk_entropy
        assert mass is not None and entropy is not None
        mass, entropy = mass.double(), entropy.double()
        mask = labels >= 0
        if self.renormalize:
            # Of q = p / M: -sum q log q = H / M + log M.
            entropy = torch.where(mask, entropy / mass + mass.log(), 0)
        for group, rows in _groups(batch).items():
            of_group = mask & rows[:, None]
            for name, values in (("topk_mass", mass), ("topk_entropy", entropy)):
                part = torch.stack([values[of_group].sum(), of_group.sum()])
                key = f"{name}/{group}"
                sums[key] = part if key not in sums else sums[key] + part

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        signs = self._count(metrics or {})
        if signs < self.patience:
            return
        if state.is_world_process_zero:
            logger.warning(
                "step %d: mass and entropy of the %d most likely tokens have fallen in %d evaluations "
                "running while the margin grew: a sign of over-optimisation (arXiv:2410.11677)",
                state.global_step, self.topk, signs,
            )  # fmt: skip
        if self.stop:
            control.should_training_stop = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run goes on from the evaluations that its checkpoint's log has."""
        if state.log_history:
            self._last, self._signs = {}, {}
        for entry in state.log_history:
            self._count(entry)

    def _count(self, now: Mapping[str, float]) -> int:
        """Take an evaluation's metrics: how many of its set have had the sign, running, with this one."""
        for name in now:
            prefix, found, group = name.partition("topk_mass/")
            falling, growing = [f"{prefix}{what}/{group}" for what in STATISTICS], f"{prefix}rewards/margins"
            if not found or group == "rejected" or not all(key in now for key in (*falling, growing)):
                continue
            last = self._last.get(prefix, now)
            is_sign = all(now[key] < last[key] for key in falling) and now[growing] > last[growing]
            self._last[prefix] = now
            self._signs[prefix] = self._signs.get(prefix, 0) + 1 if is_sign else 0
            return self._signs[prefix]
        return 0


def _groups(batch: PaddedBatch) -> dict[str, Tensor]:
    """Masks over the sequences: chosen and rejected, or all."""
    sequences = torch.arange(sum(batch.num_answers), device=batch.rows.device)
    if batch.kind.name == "unpaired":
        is_chosen = batch.numbers["is_desirable"]
    elif batch.kind.is_paired:
        is_chosen = sequences < batch.num_rows
    else:
        return {"answers": sequences >= 0}
    return {"chosen": is_chosen, "rejected": ~is_chosen}
