"""One micro-batch of another kind than pairs: its share of the loss, its metrics, what to divide by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdpo.functional.kinds import DATA
from fastdpo.functional.preference import preference_loss_from_logps
from fastdpo.training.batches.answer_collate import by_row
from fastdpo.training.batches.contents import Batch, completion_mask, is_filler, num_labelled, packed_layout
from fastdpo.training.batches.forward import token_logps
from fastdpo.training.loop.divergence_step import distillation_loss
from fastdpo.training.loop.loss_state import GetValues
from fastdpo.training.loop.metrics import MetricSums
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.types import PreferenceLossOutput

STATISTICS = ("entropy",)
PER_TOKEN = (*STATISTICS, "teachers/l1_distance")  # metrics that are means over tokens


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
    if args.needs_divergences:
        return distillation_loss(model, policy, batch, num_rows, args, reference)
    ref_logps = reference.logps(policy, batch)
    token = token_logps(model, batch, statistics=STATISTICS)
    state = values(batch, token.logps, ref_logps).named
    weights = batch.get("pair_weights")
    if weights is not None and batch["kind"] == "steps":
        weights = weights.repeat_interleave(torch.tensor(batch["num_pieces"], device=weights.device))
    result = preference_loss_from_logps(
        token,
        completion_mask(batch),
        loss_type=args.loss_type,
        loss_weights=args.loss_weights,
        ref_logps=ref_logps,
        beta=args.beta,
        row_weights=weights,
        num_rows=num_rows,
        layout=packed_layout(batch),
        **{name: batch[name] for name in DATA if name in batch},
        **state,
        **args.options,
    )
    return result._replace(metrics=result.metrics | {name: value.clone() for name, value in state.items()})


def record(sums: MetricSums, batch: Batch, result: PreferenceLossOutput) -> None:
    """Add a batch's metrics: means over tokens count by token, of good answers by these, others by row."""
    size: Tensor | int = loss_rows(batch)
    counts: dict[str, Tensor | int] = {name: num_labelled(batch) for name in PER_TOKEN}
    if batch["kind"] == "unpaired":
        desirable = batch["is_desirable"].sum()
        for group in ("rewards", "logps"):
            counts |= {f"{group}/chosen": desirable, f"{group}/rejected": size - desirable}
    for name, mean in result.metrics.items():
        if name == "num_tokens":
            continue  # under this name TRL logs all input tokens since the start
        if name == "rewards/margins" and batch["kind"] == "unpaired":
            continue  # of the means over all batches: ``with_margins``
        count = 0 if is_filler(batch) else counts.get(name, size)
        # The mean of none is NaN, and has to add nothing; of some, a NaN is to be seen.
        if isinstance(count, Tensor):
            known = mean.where((count > 0).to(mean.device), 0)
        else:
            known = mean if count > 0 else torch.zeros_like(mean)
        sums.add_mean(name, known, count, is_share=name == "rewards/accuracies")


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
