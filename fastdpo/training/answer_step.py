"""One micro-batch of another kind than pairs: its share of the loss, its metrics, what to divide by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastdpo.losses import ListLogps, StepLogps, TokenLogps, UnpairedLogps
from fastdpo.losses.aggregate import segment_sums, sequence_sums
from fastdpo.losses.inputs import Batch as LossBatch
from fastdpo.losses.metrics import list_metrics, unpaired_metrics
from fastdpo.losses.objective import build_objective
from fastdpo.losses.stable import masked_mean
from fastdpo.training.answer_collate import by_row
from fastdpo.training.batches import Batch, completion_mask, is_filler, is_in_rows, num_labelled
from fastdpo.training.config import PreferenceConfig
from fastdpo.training.loss_state import GetValues
from fastdpo.training.metrics import MetricSums
from fastdpo.training.reference import Reference
from fastdpo.training.scoring import token_logps
from fastdpo.types import LinearLogprobOutput, PreferenceLossOutput

STATISTICS = ("entropy",)


def loss_rows(batch: Batch) -> int:
    """What the batch's loss is a mean over: rows, or steps."""
    return batch["num_segments"] if batch["kind"] == "steps" else len(batch["rows"])


def answer_loss(
    model: nn.Module,
    policy: nn.Module,
    batch: Batch,
    num_rows: Tensor | int,
    args: PreferenceConfig,
    reference: Reference,
    values: GetValues,
) -> PreferenceLossOutput:
    """The loss of a batch as its share of the mean over ``num_rows``; the rest as of ``batch_loss``."""
    ref_logps = reference.logps(policy, batch)
    token = token_logps(model, batch, statistics=STATISTICS)
    state = values(batch, token.logps, ref_logps).named
    made = loss_batch(batch, token.logps, ref_logps, state)
    weights = batch.get("pair_weights")
    if weights is not None and batch["kind"] == "steps":
        weights = weights.repeat_interleave(torch.tensor(batch["num_pieces"], device=weights.device))
    objective = build_objective(
        args.loss_type,
        args.loss_weights,
        beta=args.beta,
        pair_weights=weights,
        num_pairs=num_rows,
        **args.options,
    )
    objective.check(made)
    rewards, metrics = None, {}
    if isinstance(made, UnpairedLogps):
        rewards = objective.answer_rewards(made)
        metrics = unpaired_metrics(made, rewards)
    elif isinstance(made, ListLogps):
        rewards = objective.answer_rewards(made)
        metrics = list_metrics(made, rewards)
    metrics |= _token_metrics(token, batch) | {name: value.clone() for name, value in state.items()}
    sums = made.sums(made.logps) if isinstance(made, TokenLogps) else made.logps  # type: ignore[attr-defined]
    ref_sums = ref_logps
    if isinstance(made, TokenLogps):
        ref_sums = None if made.ref_logps is None else made.sums(made.ref_logps)
    if rewards is None:
        metrics["logps"] = masked_mean(sums.detach(), made.is_scored)
    return PreferenceLossOutput(
        loss=objective.loss(made), logps=sums.detach(), ref_logps=ref_sums, rewards=rewards, metrics=metrics
    )


def loss_batch(
    batch: Batch, logps: Tensor, ref_logps: Tensor | None, state: Mapping[str, Tensor] | None = None
) -> LossBatch:
    """What the losses see of a batch.

    Args:
        logps: per token, in the shape of the batch's labels (in rows, ``(N,)``).
        ref_logps: ``scoring.reference_values`` of the reference.
        state: ``kl``, ``reward_shift``: what the losses carry from batch to batch.
    """
    mask = completion_mask(batch)
    bounds = batch["cu_seqlens"] if is_in_rows(batch) else None
    if batch["kind"] == "samples":
        return TokenLogps(logps, mask, bounds, ref_logps, batch["win_rates"])
    if "segment_ids" in batch:
        ids = batch["segment_ids"].masked_fill(~mask, -1)
        sums, tokens = (segment_sums(x, ids, batch["num_segments"]) for x in (logps, mask.to(logps.dtype)))
    else:
        sums, tokens = (sequence_sums(x, mask, bounds) for x in (logps, mask.to(logps.dtype)))
    if batch["kind"] == "steps":
        return StepLogps(sums, batch["advantages"], tokens, ref_logps)
    if batch["kind"] == "unpaired":
        return UnpairedLogps(sums, batch["is_desirable"], tokens, ref_logps, **(state or {}))
    return ListLogps(
        sums,
        tokens,
        batch["group_ids"],
        batch.get("scores"),
        ref_logps,
        batch["num_groups"],
        batch["max_candidates"],
    )


def _token_metrics(token: LinearLogprobOutput, batch: Batch) -> dict[str, Tensor]:
    mask = completion_mask(batch)
    return {name: masked_mean(getattr(token, name), mask) for name in STATISTICS}


def record(sums: MetricSums, batch: Batch, result: PreferenceLossOutput) -> None:
    """Add a batch's metrics: means over tokens count by token, of good answers by these, others by row."""
    size: Tensor | int = loss_rows(batch)
    counts: dict[str, Tensor | int] = {name: num_labelled(batch) for name in STATISTICS}
    if batch["kind"] == "unpaired":
        desirable = batch["is_desirable"].sum()
        for group in ("rewards", "logps"):
            counts |= {f"{group}/chosen": desirable, f"{group}/rejected": size - desirable}
    for name, mean in result.metrics.items():
        if name == "rewards/margins" and batch["kind"] == "unpaired":
            continue  # of the means over all batches: ``with_margins``
        count = 0 if is_filler(batch) else counts.get(name, size)
        sums.add_mean(name, mean.nan_to_num(), count, is_share=name == "rewards/accuracies")


def with_margins(means: dict[str, float]) -> dict[str, float]:
    """The difference of the means of desirable and undesirable answers, beside them."""
    if "rewards/chosen" in means and "rewards/rejected" in means and "rewards/margins" not in means:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def bad_rows(batch: Batch, result: PreferenceLossOutput) -> list[int]:
    """Numbers of the rows whose log-probabilities are not finite; of all rows, where none is."""
    logps = [values for values in (result.logps, result.ref_logps) if values is not None]
    is_bad = ~torch.isfinite(torch.stack(logps)).all(0)
    rows = batch["rows"].repeat_interleave(torch.tensor(_judged(batch), device=is_bad.device))
    found: list[int] = sorted(set((rows[is_bad] if is_bad.any() else rows).tolist()))
    return found


def row_rewards(batch: Batch, result: PreferenceLossOutput, width: int | None = None) -> Tensor:
    """``(R, width)``: rewards of each row's answers (items, of a ranking), NaN behind the last.

    Where losses have no reward of an answer, its log-ratio to the reference; of steps their sum.
    """
    values = result.rewards
    counts = _judged(batch)
    if values is None:
        values = result.logps if result.ref_logps is None else result.logps - result.ref_logps
        if batch["kind"] == "steps":
            values = torch.stack([part.sum() for part in values.split(list(counts))])
            counts = (1,) * len(counts)
    return by_row(values, counts, max(counts) if width is None else width)


def _judged(batch: Batch) -> tuple[int, ...]:
    """How many of ``result.logps`` each row has."""
    counts: tuple[int, ...] = batch["num_pieces"] if "num_pieces" in batch else batch["num_answers"]
    return counts
