"""One micro-batch: its share of the loss, its metrics, and what to divide by.

Of pairs here; of other kinds in ``answer_step.py``, to which the functions that take any batch hand it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.functional.pairs import METRIC_STATISTICS, dpo_loss_from_logps
from fastdpo.losses.aggregate import sequence_sums
from fastdpo.losses.build import build_objective
from fastdpo.losses.gather import gather_pairs
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.weights import wpo_weights
from fastdpo.training.batches.contents import (
    Batch,
    answer_tokens,
    is_filler,
    is_pairs,
    nll_tokens,
    num_labelled,
    num_pairs,
)
from fastdpo.training.batches.forward import fused_pair_loss
from fastdpo.training.batches.pair_tokens import LossTokens, loss_tokens
from fastdpo.training.loop import answer_step
from fastdpo.training.loop.divergence_step import divergence_loss
from fastdpo.training.loop.loss_state import GetValues, StepValues
from fastdpo.training.loop.metrics import MetricSums
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import COLUMN_FIELDS, PreferenceConfig
from fastdpo.types import DPOLossOutput, PreferenceLossOutput

Result: TypeAlias = DPOLossOutput | PreferenceLossOutput

# Shares of items: their sums are whole numbers, which the fp32 mean of a batch is a rounding of.
SHARES = ("rewards/accuracies", "mean_token_accuracy")


class BatchCounts(NamedTuple):
    """What losses are divided by: pairs (or rows, or steps), and tokens of an NLL term (or all answers)."""

    pairs: Tensor | int
    nll_tokens: Tensor | int


def local_counts(batches: Sequence[Batch], device: torch.device, *, nll_on_prompt: bool = False) -> Tensor:
    """``(2,)`` int64: pairs and NLL tokens of this rank's micro-batches."""
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        if is_filler(batch):
            continue
        counts[0] += num_pairs(batch) if is_pairs(batch) else answer_step.loss_rows(batch)
        tokens = nll_tokens(batch, on_prompt=nll_on_prompt) if is_pairs(batch) else num_labelled(batch)
        counts[1] += tokens.to(device) if isinstance(tokens, Tensor) else tokens
    return counts


def no_values(batch: Batch, logps: Tensor, ref_logps: Tensor | None) -> StepValues:
    """For losses that carry nothing from step to step."""
    return StepValues()


def batch_loss(
    model: nn.Module,
    policy: nn.Module,
    batch: Batch,
    counts: BatchCounts,
    args: PreferenceConfig,
    reference: Reference,
    values: GetValues = no_values,
    *,
    over_ranks: bool = False,
) -> Result:
    """The loss of a batch as its share of the mean over ``counts``.

    Args:
        model: what the policy's forward goes through: the policy as it was wrapped.
        policy: the policy itself, for a reference that is the policy without its adapter.
        values: gives what the losses carry from step to step (``LossState``).
        over_ranks: whether every rank computes a batch now, so that a loss may be of all of them.
    """
    if not is_pairs(batch):
        return answer_step.answer_loss(model, policy, batch, counts.pairs, args, reference, values)
    if args.needs_divergences:
        return divergence_loss(model, policy, batch, counts.pairs, args, reference)
    # The reference first: its activations are gone before the policy's are made.
    ref_logps = reference.logps(policy, batch)
    is_gathered = args.gather_batch_losses and over_ranks
    tokens = loss_tokens(batch, nll_on_prompt=bool(args.nll_on_prompt))
    # Elsewhere the loss waits for log-probabilities: of all ranks, or for the step's beta or weights.
    waits = is_gathered or args.use_weighting or args.dynamic_beta is not None
    if tokens.fit_the_head and not waits:
        arguments = _pair_arguments(batch, counts, args, StepValues())
        return fused_pair_loss(model, batch, **tokens.for_the_head(ref_logps), **arguments)
    statistics = (*METRIC_STATISTICS, *(["log_sum_sq_probs"] if args.use_weighting else []))
    token = tokens.score(model, statistics)
    arguments = _pair_arguments(batch, counts, args, values(batch, token.logps, ref_logps))
    if args.use_weighting:
        assert token.log_sum_sq_probs is not None
        seen = (token.logps, token.log_sum_sq_probs, tokens.mask, tokens.bounds)
        weights = wpo_weights(*seen, max_weight=args.wpo_max_weight)
        arguments["pair_weights"] = weights * arguments.get("pair_weights", 1.0)
    result = dpo_loss_from_logps(token, tokens.mask, **tokens.for_logps(ref_logps), **arguments)
    if is_gathered:
        return result._replace(loss=_loss_over_ranks(batch, token.logps, tokens, ref_logps, arguments))
    return result


def _pair_arguments(
    batch: Batch, counts: BatchCounts, args: PreferenceConfig, step: StepValues
) -> dict[str, Any]:
    """What losses of pairs get beside log-probabilities: the settings, and the numbers of pairs and step."""
    per_pair: dict[str, Any] = {name: batch[name] for name in COLUMN_FIELDS if name in batch}
    if step.pair_weights is not None:
        per_pair["pair_weights"] = step.pair_weights * per_pair.get("pair_weights", 1.0)
    return {
        "loss_type": args.loss_type,
        "loss_weights": args.loss_weights,
        "beta": args.beta if step.beta is None else step.beta,
        "num_pairs": counts.pairs if step.num_pairs is None else step.num_pairs,
        "num_tokens": counts.nll_tokens,
        **per_pair,
        **args.options,
    }


def _loss_over_ranks(
    batch: Batch, logps: Tensor, tokens: LossTokens, ref_logps: Tensor | None, arguments: dict[str, Any]
) -> Tensor:
    """The loss of all ranks' micro-batches as one, with the gradient of this rank's pairs.

    Its value is a rank's equal share: summed over the ranks it is the loss.
    """
    # A pair without tokens counts nowhere: that is what a filler is.
    scored = tokens.mask & (not is_filler(batch))
    sums = sequence_sums(tokens.weighted(logps), scored, tokens.bounds).chunk(2)
    sizes = sequence_sums(scored.to(logps.dtype), scored, tokens.bounds).chunk(2)
    ref = () if ref_logps is None else ref_logps.to(logps.dtype).chunk(2)
    pair = PairLogps(*sums, *sizes, *ref)
    if tokens.weights is not None or tokens.nll_mask is not None:
        nll = scored if tokens.nll_mask is None else tokens.nll_mask & (not is_filler(batch))
        likelihood, count = (
            sequence_sums(x, nll, tokens.bounds).chunk(2)[0] for x in (logps, nll.to(logps.dtype))
        )
        pair = replace(pair, nll_sum=-likelihood, nll_tokens=count)
    loss = build_objective(**arguments).loss(gather_pairs(pair))
    return loss - loss.detach() * (1 - 1 / dist.get_world_size())


def record(sums: MetricSums, batch: Batch, result: Result, *, nll_on_prompt: bool = False) -> None:
    """Add a batch's metrics: means over tokens count by token, all others by pair."""
    if isinstance(result, PreferenceLossOutput):
        return answer_step.record(sums, batch, result)
    size = num_pairs(batch)
    chosen, rejected = answer_tokens(batch)
    tokens = {
        "entropy": chosen + rejected,
        "logits/chosen": chosen,
        "logits/rejected": rejected,
        "mean_token_accuracy": chosen,
        "nll_loss": nll_tokens(batch, on_prompt=nll_on_prompt),
    }
    for name, mean in result.metrics.items():
        if name != "num_tokens":  # under this name TRL logs all input tokens since the start
            count = 0 if is_filler(batch) else tokens.get(name, size)
            sums.add_mean(name, mean, count, is_share=name in SHARES)


def bad_rows(batch: Batch, result: Result) -> list[int]:
    """Numbers of the rows whose log-probabilities are not finite; of all rows, where none is."""
    if isinstance(result, PreferenceLossOutput):
        return answer_step.bad_rows(batch, result)
    logps = (result.chosen_logps, result.rejected_logps, result.ref_chosen_logps, result.ref_rejected_logps)
    is_bad = ~torch.isfinite(torch.stack([item for item in logps if item is not None])).all(0)
    rows = batch["rows"]
    found: list[int] = sorted((rows[is_bad] if is_bad.any() else rows).tolist())
    return found


def stacked_rewards(batch: Batch, result: Result, width: int | None = None) -> Tensor:
    """``(P, 2)``: rewards of chosen and rejected; of other kinds ``answer_step.row_rewards``."""
    if isinstance(result, PreferenceLossOutput):
        return answer_step.row_rewards(batch, result, width)
    return torch.stack([result.chosen_rewards, result.rejected_rewards], dim=1)
