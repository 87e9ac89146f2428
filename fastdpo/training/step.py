"""One micro-batch: its share of the loss, its metrics, and what to divide by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.functional import METRIC_STATISTICS, dpo_loss_from_logps
from fastdpo.training.batches import (
    Batch,
    answer_tokens,
    completion_mask,
    is_filler,
    num_pairs,
    packed_layout,
)
from fastdpo.training.config import COLUMN_FIELDS, PreferenceConfig
from fastdpo.training.metrics import MetricSums
from fastdpo.training.reference import Reference
from fastdpo.training.scoring import token_logps
from fastdpo.types import DPOLossOutput

# Shares of items: their sums are whole numbers, which the fp32 mean of a batch is a rounding of.
SHARES = ("rewards/accuracies", "mean_token_accuracy")


class BatchCounts(NamedTuple):
    """What losses are divided by: pairs, and labelled tokens of the chosen answers."""

    pairs: Tensor | int
    chosen_tokens: Tensor | int


def local_counts(batches: Sequence[Batch], device: torch.device) -> Tensor:
    """``(2,)`` int64: pairs and chosen tokens of this rank's micro-batches."""
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        if is_filler(batch):
            continue
        counts[0] += num_pairs(batch)
        chosen, _ = answer_tokens(batch)
        counts[1] += chosen.to(device) if isinstance(chosen, Tensor) else chosen
    return counts


def pair_loss(
    model: nn.Module,
    policy: nn.Module,
    batch: Batch,
    counts: BatchCounts,
    args: PreferenceConfig,
    reference: Reference,
) -> DPOLossOutput:
    """The loss of a batch as its share of the mean over ``counts``.

    Args:
        model: what the policy's forward goes through: the policy as it was wrapped.
        policy: the policy itself, for a reference that is the policy without its adapter.
    """
    # The reference first: its activations are gone before the policy's are made.
    ref_logps = reference.logps(policy, batch)
    token = token_logps(model, batch, statistics=METRIC_STATISTICS)
    per_pair: dict[str, Any] = {name: batch[name] for name in COLUMN_FIELDS if name in batch}
    return dpo_loss_from_logps(
        token,
        completion_mask(batch),
        ref_logps=ref_logps,
        layout=packed_layout(batch),
        loss_type=args.loss_type,
        loss_weights=args.loss_weights,
        beta=args.beta,
        num_pairs=counts.pairs,
        num_tokens=counts.chosen_tokens,
        **per_pair,
        **args.options,
    )


def record(sums: MetricSums, batch: Batch, result: DPOLossOutput) -> None:
    """Add a batch's metrics: means over tokens count by token, all others by pair."""
    size = num_pairs(batch)
    chosen, rejected = answer_tokens(batch)
    tokens = {
        "entropy": chosen + rejected,
        "logits/chosen": chosen,
        "logits/rejected": rejected,
        "mean_token_accuracy": chosen,
    }
    for name, mean in result.metrics.items():
        if name != "num_tokens":  # under this name TRL logs all input tokens since the start
            count = 0 if is_filler(batch) else tokens.get(name, size)
            sums.add_mean(name, mean, count, is_share=name in SHARES)


def bad_rows(batch: Batch, result: DPOLossOutput) -> list[int]:
    """Numbers of the rows whose log-probabilities are not finite; of all rows, where none is."""
    logps = (result.chosen_logps, result.rejected_logps, result.ref_chosen_logps, result.ref_rejected_logps)
    is_bad = ~torch.isfinite(torch.stack([item for item in logps if item is not None])).all(0)
    rows = batch["rows"]
    found: list[int] = sorted((rows[is_bad] if is_bad.any() else rows).tolist())
    return found


def stacked_rewards(result: DPOLossOutput) -> Tensor:
    """``(P, 2)``: rewards of chosen and rejected."""
    return torch.stack([result.chosen_rewards, result.rejected_rewards], dim=1)
