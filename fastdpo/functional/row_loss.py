"""Per token -> per row -> loss, rewards and metrics, of every kind of batch beside pairs' sums.

The second half of ``fused_preference_loss``, as ``pair_loss.py`` is that of ``fused_dpo_loss``. A row is what
the losses judge: an answer, a candidate of a list, a piece of an answer (``segment_ids``), or a pair with
divergences, whose chosen answers stand before the rejected ones. Of a loss that distils a teacher it is an
answer, and its numbers are divergences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.losses.aggregate import segment_sums, sequence_sums
from fastdpo.losses.batches import DivergencePairLogps, ListLogps, StepLogps, UnpairedLogps
from fastdpo.losses.distillation import aligndistil_coefficients
from fastdpo.losses.inputs import Batch, PairLogps
from fastdpo.losses.metrics import (
    distillation_metrics,
    divergence_metrics,
    list_metrics,
    pair_metrics,
    unpaired_metrics,
)
from fastdpo.losses.objective import Objective
from fastdpo.losses.stable import masked_mean
from fastdpo.losses.token_batches import TokenDivergences, TokenLogps
from fastdpo.ops.checks import fail
from fastdpo.types import LinearLogprobOutput, PreferenceLossOutput, TeacherCombination

# What each kind of batch may be told beside its tokens, and what it must be.
EXTRAS: dict[type, tuple[str, ...]] = {
    UnpairedLogps: ("is_desirable", "kl", "reward_shift"),
    ListLogps: ("group_ids", "scores", "num_groups", "max_candidates", "segment_ids", "num_segments"),
    StepLogps: ("segment_ids", "num_segments", "advantages"),
    TokenLogps: ("win_rates",),
    DivergencePairLogps: ("forward_kl",),
    TokenDivergences: ("reverse_kl", "forward_kl", "jsd", "l1_distance"),
}
REQUIRED = {
    UnpairedLogps: ("is_desirable",),
    ListLogps: ("group_ids",),
    StepLogps: ("segment_ids", "advantages"),
}
# Kinds whose numbers are of whole distributions, and which of those there are.
DIVERGENT: dict[type, tuple[str, ...]] = {
    kind: EXTRAS[kind] for kind in (DivergencePairLogps, TokenDivergences)
}
DIVERGENCES = tuple(name for names in DIVERGENT.values() for name in names)
# What comes with a batch, as ``fused_preference_loss`` names it.
DATA = tuple(dict.fromkeys(name for names in EXTRAS.values() for name in names if name not in DIVERGENCES))


@dataclass(frozen=True, eq=False)
class RowSums:
    """Per-token numbers to numbers per row.

    Args:
        mask: ``(B, T)`` or packed ``(N_all,)`` bool: the answers' tokens.
        cu_seqlens: ``(B + 1,)`` bounds of packed answers, or None.
        token_weights: the mask's shape; weigh the log-probabilities of both models.
        segment_ids: the mask's shape; rows are segments then.
        num_segments: their number, or None to read it off.
    """

    mask: Tensor
    cu_seqlens: Tensor | None = None
    token_weights: Tensor | None = None
    segment_ids: Tensor | None = None
    num_segments: int | None = None

    def logps(self, values: Tensor) -> Tensor:
        """``(rows,)`` weighted sums; sums that are there already stay as they are."""
        if values.shape != self.mask.shape:
            return values
        return self.plain(self.weighted(values))

    def weighted(self, values: Tensor) -> Tensor:
        """Per token, times the weights where there are any; these may be NaN where masked away."""
        if self.token_weights is None:
            return values
        return values * self.token_weights.to(values.dtype).where(self.mask, 0)

    def plain(self, values: Tensor) -> Tensor:
        """``(rows,)`` sums, whatever the weights of the log-probabilities."""
        if self.segment_ids is None:
            return sequence_sums(values, self.mask, self.cu_seqlens)
        return segment_sums(values, self.segment_ids.masked_fill(~self.mask, -1), self.num_rows)

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """``(rows,)`` numbers of tokens."""
        return self.plain(self.mask.to(dtype))

    @property
    def num_rows(self) -> int:
        """Answers, or segments; the device is waited for where nobody has said how many of these."""
        if self.segment_ids is None:
            return len(self.mask) if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        if self.num_segments is not None:
            return int(self.num_segments)
        return int(self.segment_ids.max()) + 1 if self.segment_ids.numel() else 0


def check_kind(objective: Objective, extras: Mapping[str, Any], made_later: Sequence[str] = ()) -> None:
    """Raise ValueError unless losses are of a kind that is handled here, with all it needs and no more.

    ``made_later``: names of ``REQUIRED`` that are not the caller's to give.
    """
    kind, names = objective.inputs, loss_names(objective)
    if kind is PairLogps:
        wanted = "losses of another kind than pairs; for these use fused_dpo_loss or dpo_loss_from_logps"
        raise fail("loss_type", names, wanted)
    if kind not in EXTRAS:
        raise fail("loss_type", names, f"losses of {', '.join(known.__name__ for known in EXTRAS)}")
    for name in extras:
        if name not in EXTRAS[kind]:
            raise ValueError(f"{name}: got a value that {names} does not use, wanted None")
    needed = divergence_outputs(objective) if kind in DIVERGENT else REQUIRED.get(kind, ())
    for name in needed:
        if name not in extras and name not in made_later:
            raise ValueError(f"{name}: got None, wanted a value for {names}")
    for name in extras:
        if name in DIVERGENCES and name not in needed:
            raise ValueError(f"{name}: got a value, wanted None: {names} is of {', '.join(needed)}")
    if "num_segments" in extras and "segment_ids" not in extras:
        raise fail("num_segments", "a value without segment_ids", "segment_ids as well")


def check_divergent_batch(objective: Objective, num_sequences: int, **unused: Tensor | None) -> None:
    """Raise ValueError unless a batch can be one of divergences, and has none of what these do not use."""
    for name, value in unused.items():
        if value is not None:
            raise fail(name, f"a value that {loss_names(objective)} does not use", "None")
    if objective.inputs is DivergencePairLogps and num_sequences % 2:
        raise fail("labels", f"{num_sequences} sequences", "chosen and rejected ones, an even number")


def divergence_outputs(objective: Objective) -> tuple[str, ...]:
    """What losses with divergences ask ``token_divergence`` for, beside log-probabilities.

    Raises:
        ValueError: losses of different divergences.
    """
    if objective.inputs is DivergencePairLogps:
        return DIVERGENT[DivergencePairLogps]
    choosers = [(term.spec.divergence, term.arguments) for term in objective.terms]
    kinds = {"reverse_kl" if choose is None else choose(arguments) for choose, arguments in choosers}
    if len(kinds) > 1:
        raise fail("loss_type", f"{loss_names(objective)} of {', '.join(sorted(kinds))}", "one divergence")
    return (*kinds, "l1_distance") if objective.uses_reference else tuple(kinds)


def divergence_settings(objective: Objective) -> dict[str, Any]:
    """What ``token_divergence``, or ``Teachers``, is told of how to make them."""
    if "jsd" not in divergence_outputs(objective):
        return {}
    (term, *_) = objective.terms
    (option,) = (option for option in term.spec.options if option.name == "jsd_beta")
    return {"jsd_beta": term.arguments.get("jsd_beta", option.default)}


def needs_token_logps(objective: Objective) -> bool:
    """Whether losses with divergences look at the tokens' own log-probabilities, differentiably."""
    is_teacher = any("teacher_logps" in term.spec.needs for term in objective.terms)
    return is_teacher or objective.inputs is DivergencePairLogps


def teacher_combination(objective: Objective) -> TeacherCombination | None:
    """How two teachers make the one that the losses distil; None for losses of a single one."""
    if not objective.uses_reference:
        return None
    given: dict[str, Any] = {}
    for term in objective.terms:
        given |= {name: term.arguments[name] for name in ("beta", "beta2") if name in term.arguments}
        if "teacher_mode" in term.arguments:
            given["mode"] = term.arguments["teacher_mode"]
    return TeacherCombination(*aligndistil_coefficients(**given))


def loss_names(objective: Objective) -> str:
    """The losses, for messages."""
    return ", ".join(term.spec.name for term in objective.terms)


def rows_output(
    objective: Objective,
    token: LinearLogprobOutput,
    sums: RowSums,
    ref_logps: Tensor | None,
    extras: Mapping[str, Any],
) -> PreferenceLossOutput:
    """Everything a caller gets.

    Args:
        objective: of one kind of ``EXTRAS``.
        token: per-token results in the shape of ``sums.mask``.
        ref_logps: per token or ``(rows,)``, or None.
        extras: under the names of ``EXTRAS``.
    """
    logps = token.logps
    ref_logps = None if ref_logps is None else ref_logps.detach().to(logps.dtype)
    extras = {
        name: value.to(logps.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in extras.items()
    }
    batch = _make_batch(objective, sums, logps, ref_logps, extras)
    objective.check(batch)
    row_logps = sums.logps(logps).detach()
    rewards, metrics = _rewards(objective, batch, row_logps)
    metrics["num_tokens"] = sums.lengths(logps.dtype).sum()
    if token.entropy is not None:
        metrics["entropy"] = masked_mean(token.entropy.detach(), sums.mask)
    return PreferenceLossOutput(
        loss=objective.loss(batch),
        logps=row_logps,
        ref_logps=None if ref_logps is None else sums.logps(ref_logps),
        rewards=rewards,
        metrics=metrics,
    )


def _make_batch(
    objective: Objective, sums: RowSums, token: Tensor, ref_logps: Tensor | None, extras: Mapping[str, Any]
) -> Batch:
    """The batch that the losses take, from log-probabilities per token."""
    kind = objective.inputs
    if kind is TokenLogps:
        weighted = None if ref_logps is None else sums.weighted(ref_logps)
        return TokenLogps(
            sums.weighted(token), sums.mask, sums.cu_seqlens, weighted, win_rates=extras.get("win_rates")
        )
    if kind is TokenDivergences:
        own = {"logps": token, "teacher_logps": ref_logps} if needs_token_logps(objective) else {}
        divergences = extras[divergence_outputs(objective)[0]]
        return TokenDivergences(divergences, sums.mask, sums.cu_seqlens, extras.get("l1_distance"), **own)
    logps, lengths = sums.logps(token), sums.lengths(token.dtype)
    reference = None if ref_logps is None else sums.logps(ref_logps)
    if kind is DivergencePairLogps:
        pair = DivergencePairLogps(*logps.chunk(2), *lengths.chunk(2))
        chosen_kl, rejected_kl = sums.plain(extras["forward_kl"]).chunk(2)
        pair = replace(pair, chosen_kl=chosen_kl, rejected_kl=rejected_kl)
        if reference is None:
            return pair
        ref_chosen, ref_rejected = reference.chunk(2)
        return replace(pair, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    given = {name: value for name, value in extras.items() if name not in ("segment_ids", "num_segments")}
    if kind is UnpairedLogps:
        return UnpairedLogps(logps, tokens=lengths, ref_logps=reference, **given)
    if kind is StepLogps:
        return StepLogps(logps, tokens=lengths, ref_logps=reference, **given)
    return ListLogps(logps, lengths, ref_logps=reference, **given)


def _rewards(objective: Objective, batch: Batch, logps: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Rewards of the rows, where the kind has them, and its metrics."""
    if isinstance(batch, UnpairedLogps):
        rewards = objective.answer_rewards(batch)
        return rewards, unpaired_metrics(batch, rewards)
    if isinstance(batch, ListLogps):
        rewards = objective.answer_rewards(batch)
        return rewards, list_metrics(batch, rewards)
    if isinstance(batch, DivergencePairLogps):
        both = objective.rewards(batch)
        metrics = pair_metrics(batch, both, (batch.chosen, batch.rejected))
        return torch.cat(both), metrics | divergence_metrics(batch)
    of_teacher = distillation_metrics(batch) if isinstance(batch, TokenDivergences) else {}
    return None, {"logps": masked_mean(logps, batch.is_scored), **of_teacher}
