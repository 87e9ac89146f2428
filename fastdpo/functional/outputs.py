"""What a caller gets of a batch whose loss is known: log-probabilities, rewards and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.functional.rows import Rows
from fastdpo.functional.tokens import RowOrder
from fastdpo.losses.batches import DivergencePairLogps, ListLogps, UnpairedLogps
from fastdpo.losses.inputs import Batch, PairLogps
from fastdpo.losses.metrics import (
    distillation_metrics,
    divergence_metrics,
    list_metrics,
    pair_metrics,
    token_metrics,
    unpaired_metrics,
)
from fastdpo.losses.objective import Objective
from fastdpo.losses.stable import masked_mean
from fastdpo.losses.token_batches import TokenDivergences
from fastdpo.types import DPOLossOutput, LinearLogprobOutput, PreferenceLossOutput

METRIC_STATISTICS = ("entropy", "mean_logit", "is_top1")


@dataclass(frozen=True, eq=False)
class LossResult:
    """A batch behind the objective.

    Args:
        batch: what the losses saw.
        loss: ``()``.
        token: per-token results in the order of ``rows``, ``(N,)`` each.
    """

    objective: Objective
    order: RowOrder
    rows: Rows
    batch: Batch
    loss: Tensor
    token: LinearLogprobOutput

    def of_pairs(self) -> DPOLossOutput:
        """Of chosen and rejected answers."""
        pair, objective = self.batch, self.objective
        assert isinstance(pair, PairLogps)
        rewards = objective.rewards(pair)
        statistics = {name: getattr(self.token, name) for name in METRIC_STATISTICS}
        return DPOLossOutput(
            loss=self.loss,
            chosen_logps=pair.chosen.detach(),
            rejected_logps=pair.rejected.detach(),
            ref_chosen_logps=pair.ref_chosen,
            ref_rejected_logps=pair.ref_rejected,
            chosen_rewards=rewards[0],
            rejected_rewards=rewards[1],
            metrics=pair_metrics(pair, rewards, objective.logged_logps(pair))
            | objective.further_metrics(pair)
            | token_metrics(pair, lambda values: self.rows.sums(values).view(-1, 2).t(), **statistics),
        )

    def of_rows(self) -> PreferenceLossOutput:
        """Of every other kind."""
        logps, rows = self.token.logps, self.rows
        row_logps = rows.sums(rows.weighted(logps)).detach()
        ref_logps = rows.reference(logps.dtype)
        rewards, metrics = self._rewards(row_logps)
        metrics["num_tokens"] = rows.lengths(logps.dtype).sum()
        entropy = self.token.entropy
        if entropy is not None and rows.tokens.group is not None:  # a mean over all ranks' tokens
            metrics["entropy"] = rows.sums(entropy.detach()).sum() / metrics["num_tokens"].clamp(min=1)
        elif entropy is not None:
            where = rows.tokens.in_answer
            where = torch.ones_like(logps, dtype=torch.bool) if where is None else where
            metrics["entropy"] = masked_mean(entropy.detach(), where)
        as_given = self.order.as_given
        return PreferenceLossOutput(
            loss=self.loss,
            logps=as_given(row_logps),
            ref_logps=None if ref_logps is None else as_given(ref_logps),
            rewards=rewards,
            metrics=metrics,
        )

    def _rewards(self, logps: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Rewards of the segments as they were given, where the kind has them, and its metrics."""
        objective, batch = self.objective, self.batch
        if isinstance(batch, UnpairedLogps):
            rewards = objective.answer_rewards(batch)
            return rewards, unpaired_metrics(batch, rewards)
        if isinstance(batch, ListLogps):
            rewards = objective.answer_rewards(batch)
            return self.order.as_given(rewards), list_metrics(batch, rewards)
        if isinstance(batch, DivergencePairLogps):
            both = objective.rewards(batch)
            metrics = pair_metrics(batch, both, (batch.chosen, batch.rejected))
            return torch.cat(both), metrics | divergence_metrics(batch)
        of_teacher = distillation_metrics(batch) if isinstance(batch, TokenDivergences) else {}
        return None, {"logps": masked_mean(logps, batch.is_scored), **of_teacher}
