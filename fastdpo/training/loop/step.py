"""One micro-batch: its share of the loss, its metrics, and what to divide by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastdpo.functional.kinds import (
    DATA,
    divergence_outputs,
    divergence_settings,
    needs_token_logps,
    teacher_combination,
)
from fastdpo.functional.pairs import METRIC_STATISTICS, dpo_loss_from_logps
from fastdpo.functional.preference import preference_loss_from_logps
from fastdpo.losses.aggregate import sequence_sums
from fastdpo.losses.build import build_objective
from fastdpo.losses.gather import gather_pairs
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.weights import wpo_weights
from fastdpo.training.batches.batch import Batch
from fastdpo.training.batches.forward import divergence_logps, fused_loss, token_logps
from fastdpo.training.batches.pair_tokens import LossTokens, loss_tokens
from fastdpo.training.batches.ranks import DataRanks
from fastdpo.training.batches.router import router_losses
from fastdpo.training.loop.loss_state import GetValues, StepValues
from fastdpo.training.loop.metrics import MetricSums
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import COLUMN_FIELDS, PreferenceConfig
from fastdpo.types import DPOLossOutput, LinearLogprobOutput, PreferenceLossOutput

# Shares of items: their sums are whole numbers, which the fp32 mean of a batch is a rounding of.
SHARES = ("rewards/accuracies", "mean_token_accuracy")


class BatchCounts(NamedTuple):
    """What losses are divided by: pairs (or rows, or steps), and tokens of an NLL term (or all answers)."""

    rows: Tensor | int
    tokens: Tensor | int


def local_counts(batches: Sequence[Batch], device: torch.device, *, nll_on_prompt: bool = False) -> Tensor:
    """``(2,)`` int64: ``BatchCounts`` of this rank's micro-batches."""
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        if batch.is_filler:
            continue
        counts[0] += batch.loss_rows
        tokens = batch.nll_tokens(on_prompt=nll_on_prompt) if batch.kind.is_paired else batch.num_labelled
        counts[1] += tokens.to(device) if isinstance(tokens, Tensor) else tokens
    return counts


def no_values(batch: Batch, logps: Tensor | None, ref_logps: Tensor | None) -> StepValues:
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
    router: float = 0.0,
    over_ranks: DataRanks | None = None,
) -> PreferenceLossOutput:
    """The loss of a batch as its share of the mean over ``counts``; of pairs, numbers are chosen first.

    Args:
        model: what the policy's forward goes through: the policy as it was wrapped.
        policy: the policy itself, for a reference that is the policy without its adapter.
        values: gives what the losses carry from step to step (``LossState``).
        router: weight of a mixture of experts' load-balancing loss, whose mean is over micro-batches, each
            as many times as it has rows.
        over_ranks: the ranks, where each of them computes a batch now, so that a loss may be of all of them.
    """
    if args.needs_divergences:
        with router_losses(are_wanted=router != 0) as found:
            result = _divergence_loss(model, policy, batch, counts, args, reference)
        return _with_router(result, found, router, batch.loss_rows / counts.rows)
    # The reference first: its activations are gone before the policy's are made.
    ref_logps = reference.logps(policy, batch)
    with router_losses(are_wanted=router != 0) as found:
        if batch.kind.is_paired:
            result = _pair_loss(model, batch, ref_logps, counts, args, values, over_ranks=over_ranks)
        else:
            result = _row_loss(model, batch, ref_logps, counts, args, values)
    return _with_router(result, found, router, batch.loss_rows / counts.rows)


def _with_router(
    result: PreferenceLossOutput, found: Sequence[Tensor], router: float, share: float | Tensor
) -> PreferenceLossOutput:
    """The loss with what the routers add to it."""
    if router == 0:
        return result
    assert found, "a model whose class has a router loss gave none"
    aux_loss = found[-1].to(result.loss.device)
    loss = result.loss + (router * share * aux_loss).to(result.loss.dtype)
    return result._replace(loss=loss, metrics={**result.metrics, "aux_loss": aux_loss.detach()})


def _row_loss(
    model: nn.Module,
    batch: Batch,
    ref_logps: Tensor | None,
    counts: BatchCounts,
    args: PreferenceConfig,
    values: GetValues,
) -> PreferenceLossOutput:
    """The loss of answers, lists, steps or samples; made inside the model's forward where it can be."""
    arguments = _row_arguments(batch, counts, args)
    if args.makes_loss_in_head:
        state = values(batch, None, ref_logps).named
        del arguments["layout"]  # the patched model settles it
        if ref_logps is not None and ref_logps.dim() == 2:  # per token, of padded sequences
            # The reference stands where a token is, and is wanted where it is predicted.
            ref_logps = ref_logps.roll(-1, 1)
        result: Any = fused_loss(model, batch, ref_logps=ref_logps, **arguments, **state)
    else:
        token = token_logps(model, batch, statistics=("entropy",))
        state = values(batch, token.logps, ref_logps).named
        arguments |= state
        result = preference_loss_from_logps(token, batch.mask, ref_logps=ref_logps, **arguments)
    named = {name: value.clone() for name, value in state.items()}
    found: PreferenceLossOutput = result._replace(metrics=result.metrics | named)
    return found


def _row_arguments(batch: Batch, counts: BatchCounts, args: PreferenceConfig) -> dict[str, Any]:
    """What ``preference_loss_from_logps`` gets beside log-probabilities: settings, and the rows' numbers."""
    numbers = batch.numbers
    weights = numbers.get("pair_weights")
    if weights is not None and batch.kind.name == "steps":
        weights = weights.repeat_interleave(torch.tensor(batch.num_pieces, device=weights.device))
    of_rows = {name: numbers[name] for name in (*DATA, *COLUMN_FIELDS) if name in numbers}
    of_rows.pop("pair_weights", None)
    if batch.segment_ids is not None:
        of_rows["segment_ids"] = batch.segment_ids
    return {
        "loss_type": args.loss_type,
        "loss_weights": args.loss_weights,
        "beta": args.beta,
        "row_weights": weights,
        "num_rows": counts.rows,
        "layout": batch.layout,
        **of_rows,
        **args.options,
    }


def _divergence_loss(
    model: nn.Module,
    policy: nn.Module,
    batch: Batch,
    counts: BatchCounts,
    args: PreferenceConfig,
    reference: Reference,
) -> PreferenceLossOutput:
    """The loss of a batch that has divergences over the whole vocabulary: from the reference, or a teacher.

    The other models are not asked for log-probabilities but for what their heads see; all comes back from
    the policy's forward pass, log-probabilities and divergences out of the same logits.
    """
    objective = build_objective(args.loss_type, args.loss_weights, beta=args.beta, **args.options)
    names, of_tokens = divergence_outputs(objective), needs_token_logps(objective)
    settings = {"logps_requires_grad": of_tokens, **divergence_settings(objective)}
    combination = teacher_combination(objective) if args.needs_teacher else None
    teachers = reference.teachers(policy, batch, combination, **settings)
    found = divergence_logps(model, batch, teachers, names)
    assert found.logps is not None
    return preference_loss_from_logps(
        LinearLogprobOutput(found.logps),
        batch.mask,
        ref_logps=found.ref_logps if of_tokens else None,
        **{name: getattr(found, name) for name in names},
        **_row_arguments(batch, counts, args),
    )


def _pair_loss(
    model: nn.Module,
    batch: Batch,
    ref_logps: Tensor | None,
    counts: BatchCounts,
    args: PreferenceConfig,
    values: GetValues,
    *,
    over_ranks: DataRanks | None,
) -> PreferenceLossOutput:
    ranks = over_ranks if args.gather_batch_losses and over_ranks and over_ranks.count > 1 else None
    tokens = loss_tokens(batch, nll_on_prompt=bool(args.nll_on_prompt))
    # Elsewhere the loss waits for log-probabilities: of all ranks, or for the step's beta or weights.
    waits = (
        ranks is not None or (args.sp_size or 1) > 1 or args.use_weighting or args.dynamic_beta is not None
    )
    if tokens.fit_the_head and not waits:
        arguments = _pair_arguments(batch, counts, args, StepValues())
        found: Any = fused_loss(model, batch, **tokens.for_the_head(ref_logps), **arguments)
        return _of_answers(found)
    statistics = (*METRIC_STATISTICS, *(["log_sum_sq_probs"] if args.use_weighting else []))
    token = tokens.score(model, statistics)
    arguments = _pair_arguments(batch, counts, args, values(batch, token.logps, ref_logps))
    if args.use_weighting:
        assert token.log_sum_sq_probs is not None
        seen = (token.logps, token.log_sum_sq_probs, tokens.mask, tokens.bounds)
        weights = wpo_weights(*seen, max_weight=args.wpo_max_weight)
        arguments["pair_weights"] = weights * arguments.get("pair_weights", 1.0)
    result = _of_answers(dpo_loss_from_logps(token, tokens.mask, **tokens.for_logps(ref_logps), **arguments))
    if ranks is not None:
        return result._replace(loss=_loss_over_ranks(ranks, batch, token.logps, tokens, ref_logps, arguments))
    return result


def _of_answers(result: DPOLossOutput) -> PreferenceLossOutput:
    """A loss of pairs with its numbers per answer, chosen ones first."""

    def both(chosen: Tensor | None, rejected: Tensor | None) -> Tensor | None:
        return None if chosen is None or rejected is None else torch.cat([chosen, rejected])

    return PreferenceLossOutput(
        result.loss,
        torch.cat([result.chosen_logps, result.rejected_logps]),
        both(result.ref_chosen_logps, result.ref_rejected_logps),
        torch.cat([result.chosen_rewards, result.rejected_rewards]),
        result.metrics,
    )


def _pair_arguments(
    batch: Batch, counts: BatchCounts, args: PreferenceConfig, step: StepValues
) -> dict[str, Any]:
    """What losses of pairs get beside log-probabilities: the settings, and the numbers of pairs and step."""
    per_pair = {name: batch.numbers[name] for name in COLUMN_FIELDS if name in batch.numbers}
    if step.pair_weights is not None:
        per_pair["pair_weights"] = step.pair_weights * per_pair.get("pair_weights", 1.0)
    return {
        "loss_type": args.loss_type,
        "loss_weights": args.loss_weights,
        "beta": args.beta if step.beta is None else step.beta,
        "num_pairs": counts.rows if step.num_pairs is None else step.num_pairs,
        "num_tokens": counts.tokens,
        **per_pair,
        **args.options,
    }


def _loss_over_ranks(
    ranks: DataRanks,
    batch: Batch,
    logps: Tensor,
    tokens: LossTokens,
    ref_logps: Tensor | None,
    arguments: dict[str, Any],
) -> Tensor:
    """The loss of all ranks' micro-batches as one, with the gradient of this rank's pairs.

    Its value is a rank's equal share: summed over the ranks it is the loss.
    """
    # A pair without tokens counts nowhere: that is what a filler is.
    scored = tokens.mask & (not batch.is_filler)
    sums = sequence_sums(tokens.weighted(logps), scored, tokens.bounds).chunk(2)
    sizes = sequence_sums(scored.to(logps.dtype), scored, tokens.bounds).chunk(2)
    ref = () if ref_logps is None else ref_logps.to(logps.dtype).chunk(2)
    pair = PairLogps(*sums, *sizes, *ref)
    if tokens.weights is not None or tokens.nll_mask is not None:
        nll = scored if tokens.nll_mask is None else tokens.nll_mask & (not batch.is_filler)
        likelihood, count = (
            sequence_sums(x, nll, tokens.bounds).chunk(2)[0] for x in (logps, nll.to(logps.dtype))
        )
        pair = replace(pair, nll_sum=-likelihood, nll_tokens=count)
    loss = build_objective(**arguments).loss(gather_pairs(pair, ranks.group))
    return loss - loss.detach() * (1 - 1 / ranks.count)


def record(
    sums: MetricSums, batch: Batch, result: PreferenceLossOutput, *, nll_on_prompt: bool = False
) -> None:
    """Add a batch's metrics: means over tokens count by token, of good answers by these, others by row."""
    counts = _metric_counts(batch, nll_on_prompt)
    for name, mean in result.metrics.items():
        if name == "num_tokens":
            continue  # under this name TRL logs all input tokens since the start
        if name == "rewards/margins" and batch.kind.name == "unpaired":
            continue  # of the means over all batches: ``with_margins``
        count = 0 if batch.is_filler else counts.get(name, batch.loss_rows)
        # The mean of none is NaN, and has to add nothing; of some, a NaN is to be seen.
        if isinstance(count, Tensor):
            known = mean.where((count > 0).to(mean.device), 0)
        else:
            known = mean if count > 0 else torch.zeros_like(mean)
        sums.add_mean(name, known, count, is_share=name in SHARES)


def _metric_counts(batch: Batch, nll_on_prompt: bool) -> Mapping[str, Tensor | int]:
    """Of metrics that are no means over the loss's rows: what they are means over."""
    if not batch.kind.is_paired:
        labelled = batch.num_labelled
        counts = {"entropy": labelled, "teachers/l1_distance": labelled}
        if batch.kind.name == "unpaired":
            desirable = batch.numbers["is_desirable"].sum()
            for group in ("rewards", "logps"):
                counts |= {f"{group}/chosen": desirable, f"{group}/rejected": batch.num_rows - desirable}
        return counts
    chosen, rejected = batch.tokens_of(slice(batch.num_rows)), batch.tokens_of(slice(batch.num_rows, None))
    return {
        "entropy": chosen + rejected,
        "logits/chosen": chosen,
        "logits/rejected": rejected,
        "mean_token_accuracy": chosen,
        "nll_loss": batch.nll_tokens(on_prompt=nll_on_prompt),
    }


def with_margins(means: dict[str, float]) -> dict[str, float]:
    """The difference of the means of desirable and undesirable answers, beside them."""
    if "rewards/chosen" in means and "rewards/rejected" in means and "rewards/margins" not in means:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def bad_rows(batch: Batch, result: PreferenceLossOutput) -> list[int]:
    """Numbers of the rows whose log-probabilities are not finite; of all rows, where none is."""
    logps = [values for values in (result.logps, result.ref_logps) if values is not None]
    is_bad = batch.by_row(~torch.isfinite(torch.stack(logps)).all(0))
    rows = batch.rows.repeat_interleave(torch.tensor(batch.judged, device=is_bad.device))
    found: list[int] = sorted(set((rows[is_bad] if is_bad.any() else rows).tolist()))
    return found


def row_rewards(batch: Batch, result: PreferenceLossOutput, width: int | None = None) -> Tensor:
    """``(R, width)``: rewards of each row's answers (items, of a ranking), NaN behind the last.

    Of pairs ``(P, 2)``, chosen and rejected. Where losses have no reward of an answer, its log-ratio to the
    reference; of steps their sum.
    """
    values, counts = result.rewards, batch.judged
    if values is None:
        values = result.logps if result.ref_logps is None else result.logps - result.ref_logps
        if batch.kind.name == "steps":
            values = torch.stack([part.sum() for part in values.split(list(counts))])
            counts = (1,) * len(counts)
    parts = list(batch.by_row(values).split(list(counts)))
    dense = pad_sequence(parts, batch_first=True, padding_value=torch.nan)
    more = max(counts) if width is None else width
    return torch.nn.functional.pad(dense, (0, more - dense.shape[1]), value=torch.nan)
