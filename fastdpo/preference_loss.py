"""The losses of other data than pairs' sums: single answers, lists of candidates, steps, tokens of answers.

The same way as ``functional.py``: log-probabilities per token by the op, sums per row, the objective; for
pairs with divergences (TDPO) those of the whole vocabulary too, by their own op. What
a row is depends on the losses named, which are of one kind; ``LOSSES[name].kind`` and ``.inputs`` say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.batch import next_token, shift_labels
from fastdpo.functional_checks import FLOAT_DTYPES, INT_DTYPES, check_like, check_tensor, reference_head
from fastdpo.losses.aggregate import check_cu_seqlens, segment_sums, sequence_sums
from fastdpo.losses.batches import DivergencePairLogps, ListLogps, StepLogps, UnpairedLogps
from fastdpo.losses.inputs import Batch, PairLogps, PerPair
from fastdpo.losses.metrics import list_metrics, pair_metrics, unpaired_metrics
from fastdpo.losses.objective import Objective, build_objective
from fastdpo.losses.token_batches import TokenLogps
from fastdpo.ops.checks import as_head, check_execution, fail
from fastdpo.ops.linear_logprob import linear_logprob
from fastdpo.ops.token_divergence import token_divergence
from fastdpo.types import Execution, LMHead, PackedLayout, PreferenceLossOutput

# What each kind of batch may be told beside its tokens.
EXTRAS: dict[type, tuple[str, ...]] = {
    UnpairedLogps: ("is_desirable", "kl", "reward_shift"),
    ListLogps: ("group_ids", "scores", "num_groups", "max_candidates", "segment_ids", "num_segments"),
    StepLogps: ("segment_ids", "num_segments", "advantages"),
    TokenLogps: ("win_rates",),
    DivergencePairLogps: (),
}
REQUIRED = {
    UnpairedLogps: ("is_desirable",),
    ListLogps: ("group_ids",),
    StepLogps: ("segment_ids", "advantages"),
}


def fused_preference_loss(
    hidden: Tensor,
    lm_head: LMHead | Tensor | torch.nn.Linear,
    labels: Tensor,
    *,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    is_desirable: Tensor | None = None,
    kl: Tensor | None = None,
    reward_shift: Tensor | None = None,
    group_ids: Tensor | None = None,
    scores: Tensor | None = None,
    num_groups: int | None = None,
    max_candidates: int | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    advantages: Tensor | None = None,
    win_rates: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_lm_head: LMHead | Tensor | torch.nn.Linear | None = None,
    ref_logps: Tensor | None = None,
    beta: PerPair | None = None,
    row_weights: PerPair | None = None,
    token_weights: Tensor | None = None,
    num_rows: float | Tensor | None = None,
    layout: PackedLayout | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    execution: Execution | None = None,
    **loss_options: Any,
) -> PreferenceLossOutput:
    """A loss of B answers that do not come in pairs, or whose tokens count (TDPO), without their logits.

    Args:
        hidden, lm_head, labels, layout, shift, ignore_index, execution: as in ``fused_dpo_loss``, for B
            sequences: ``(B, T, H)`` and ``(B, T)``, or packed. Divergences take of ``execution`` the mode,
            the budgets and ``compute_dtype``; see ``token_divergence``.
        loss_type, loss_weights: names in ``LOSSES`` of one kind other than plain pairs; their weighted sum.
            For pairs with divergences (``tdpo1``, ``tdpo2``) B = 2P, chosen answers first; the forward KL
            from the reference to the policy is made here, of ``ref_hidden``.
        is_desirable: ``(B,)`` bool, for unpaired losses (KTO, BCO).
        kl: ``()``, KTO's reference point, in nats; ``reward_shift``: ``()``, BCO's running mean.
        group_ids: ``(B,)`` int64, which list a candidate belongs to, for listwise losses.
        scores: ``(B,)``, higher is better, for the listwise losses that use them.
        num_groups, max_candidates: the number of lists and of the longest one's candidates, where the caller
            knows them: then nothing waits for the device.
        segment_ids: the labels' shape, aligned with them: the step that a token belongs to, or the item of
            a list that is ranked in one answer (``group_ids`` and ``scores`` are per item then); -1 for none.
        num_segments: their number; None: the largest id and one, which waits for the device.
        advantages: ``(num_segments,)``, of every step.
        win_rates: ``(B,)`` in [0, 1], for token-level losses that use them.
        ref_hidden, ref_lm_head: as in ``fused_dpo_loss``.
        ref_logps: instead of them, ``(B,)`` sums, or per token as ``linear_logprob`` returned them (the only
            form with ``segment_ids``, ``token_weights`` or a token-level loss). TDPO needs ``ref_hidden``.
        beta: positive, a number or one per row. None: each loss's own default.
        row_weights: at least 0, a number or one per row (a list is one row, and so is a pair).
        token_weights: the labels' shape, aligned with them; weigh the log-probabilities of both models.
        num_rows: what to divide by instead of the batch's own number of rows.
        loss_options: options of the named losses; see ``LOSSES``.

    Returns:
        ``PreferenceLossOutput``; ``metrics`` has TRL's names for unpaired answers, and for lists
        ``rewards/best``, ``rewards/others``, ``rewards/margins`` and ``rewards/accuracies``.

    Raises:
        ValueError: a loss of pairs, a wrong shape, dtype, device or value, data that a loss needs and lacks,
            or is given and does not use.
        TypeError: what should be a tensor is none.

    Example:
        >>> hidden, head = torch.randn(4, 6, 8), torch.randn(11, 8)
        >>> labels = torch.randint(0, 11, (4, 6))
        >>> good = torch.tensor([True, False, True, True])
        >>> kto = {"loss_type": "kto", "is_desirable": good, "kl": torch.tensor(0.0)}
        >>> fused_preference_loss(hidden, head, labels, ref_hidden=hidden, **kto).loss
        tensor(0.5000)

    Source: every loss names its own in ``losses_table()``.
    """
    objective = build_objective(
        loss_type, loss_weights, beta=beta, pair_weights=row_weights, num_pairs=num_rows, **loss_options
    )
    extras = {
        "is_desirable": is_desirable, "kl": kl, "reward_shift": reward_shift, "group_ids": group_ids,
        "scores": scores, "num_groups": num_groups, "max_candidates": max_candidates,
        "segment_ids": segment_ids, "num_segments": num_segments, "advantages": advantages,
        "win_rates": win_rates,
    }  # fmt: skip
    extras = {name: value for name, value in extras.items() if value is not None}
    _check_kind(objective, extras)
    cu_seqlens = _check_batch(hidden, labels, layout)
    needs_tokens = token_weights is not None or segment_ids is not None or objective.inputs is TokenLogps
    _check_reference(labels, cu_seqlens, hidden, ref_hidden, ref_lm_head, ref_logps, needs_tokens)
    if objective.inputs is DivergencePairLogps:
        _check_divergence_pairs(objective, labels, cu_seqlens, ref_hidden, token_weights)
    check_like("token_weights", token_weights, labels, FLOAT_DTYPES)
    check_like("segment_ids", segment_ids, labels, INT_DTYPES)

    targets = shift_labels(labels, layout=layout, ignore_index=ignore_index) if shift else labels
    if shift:
        token_weights = None if token_weights is None else next_token(token_weights, 0, layout)
        if segment_ids is not None:
            extras["segment_ids"] = next_token(segment_ids, -1, layout)
    scored: dict[str, Any] = {"ignore_index": ignore_index, "execution": execution}
    token = linear_logprob(hidden, lm_head, targets, **scored).logps
    if ref_hidden is not None:
        with torch.no_grad():
            head = reference_head(as_head(lm_head, takes_adapter=True), ref_hidden, ref_lm_head)
            ref_logps = linear_logprob(ref_hidden, head, targets, **scored).logps
    if objective.inputs is DivergencePairLogps and ref_hidden is not None:
        # It has no kernels to choose from, and logits of fp32 only.
        how = replace(check_execution(execution), backend="auto", logits_dtype=None)
        extras["token_kl"] = token_divergence(
            hidden,
            lm_head,
            ref_hidden,
            targets,
            ref_lm_head=ref_lm_head,
            ignore_index=ignore_index,
            execution=how,
        ).forward_kl
    sums = _Sums(targets != ignore_index, cu_seqlens, token_weights, extras)
    batch = _make_batch(objective.inputs, sums, token, ref_logps, extras)
    objective.check(batch)
    return _output(objective, batch, sums, token, ref_logps)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Per-token numbers to numbers per row: an answer, or a segment where there are any."""

    mask: Tensor
    cu_seqlens: Tensor | None
    token_weights: Tensor | None
    extras: dict[str, Any]

    def logps(self, values: Tensor) -> Tensor:
        """``(rows,)`` weighted sums; sums that are there already stay as they are."""
        if values.shape != self.mask.shape:
            return values
        return self._of(self.weighted(values))

    def weighted(self, values: Tensor) -> Tensor:
        return values if self.token_weights is None else values * self.token_weights.to(values.dtype)

    def plain(self, values: Tensor) -> Tensor:
        """``(rows,)`` sums, whatever the weights of the log-probabilities."""
        return self._of(values)

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """``(rows,)`` numbers of tokens."""
        return self._of(self.mask.to(dtype))

    def _of(self, values: Tensor) -> Tensor:
        if "segment_ids" not in self.extras:
            return sequence_sums(values, self.mask, self.cu_seqlens)
        ids = self.extras["segment_ids"].masked_fill(~self.mask, -1)
        return segment_sums(values, ids, self._num_segments)

    @property
    def _num_segments(self) -> int:
        ids = self.extras["segment_ids"]
        if "num_segments" in self.extras:
            return int(self.extras["num_segments"])
        return int(ids.max()) + 1 if ids.numel() else 0


def _make_batch(
    kind: type, sums: _Sums, token: Tensor, ref_logps: Tensor | None, extras: dict[str, Any]
) -> Batch:
    """The batch that the losses take, from log-probabilities per token."""
    if ref_logps is not None:
        ref_logps = ref_logps.detach().to(token.dtype)
    extras = {
        name: value.to(token.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in extras.items()
    }
    if kind is TokenLogps:
        weighted = None if ref_logps is None else sums.weighted(ref_logps)
        return TokenLogps(
            sums.weighted(token), sums.mask, sums.cu_seqlens, weighted, win_rates=extras.get("win_rates")
        )
    logps, lengths = sums.logps(token), sums.lengths(token.dtype)
    reference = None if ref_logps is None else sums.logps(ref_logps)
    if kind is DivergencePairLogps:
        assert reference is not None
        (chosen, rejected), (chosen_tokens, rejected_tokens), (ref_chosen, ref_rejected), kls = (
            values.chunk(2) for values in (logps, lengths, reference, sums.plain(extras["token_kl"]))
        )
        return DivergencePairLogps(
            chosen,
            rejected,
            chosen_tokens,
            rejected_tokens,
            ref_chosen,
            ref_rejected,
            chosen_kl=kls[0],
            rejected_kl=kls[1],
        )
    given = {name: value for name, value in extras.items() if name not in ("segment_ids", "num_segments")}
    if kind is UnpairedLogps:
        return UnpairedLogps(logps, tokens=lengths, ref_logps=reference, **given)
    if kind is StepLogps:
        return StepLogps(logps, tokens=lengths, ref_logps=reference, **given)
    return ListLogps(logps, lengths, ref_logps=reference, **given)


def _output(
    objective: Objective, batch: Batch, sums: _Sums, token: Tensor, ref_logps: Tensor | None
) -> PreferenceLossOutput:
    rewards, metrics = None, {}
    if isinstance(batch, UnpairedLogps):
        rewards = objective.answer_rewards(batch)
        metrics = unpaired_metrics(batch, rewards)
    elif isinstance(batch, ListLogps):
        rewards = objective.answer_rewards(batch)
        metrics = list_metrics(batch, rewards)
    elif isinstance(batch, DivergencePairLogps):
        both = objective.rewards(batch)
        rewards = torch.cat(both)
        metrics = pair_metrics(batch, *both)
    lengths = sums.lengths(token.dtype)
    return PreferenceLossOutput(
        loss=objective.loss(batch),
        logps=sums.logps(token).detach(),
        ref_logps=None if ref_logps is None else sums.logps(ref_logps.detach()),
        rewards=rewards,
        metrics=metrics | {"num_tokens": lengths.sum()},
    )


def _check_kind(objective: Objective, extras: dict[str, Any]) -> None:
    """A kind that is handled here, with all it needs and nothing it does not use."""
    kind, names = objective.inputs, ", ".join(term.spec.name for term in objective.terms)
    if kind is PairLogps:
        raise fail("loss_type", names, "losses of another kind than pairs; for these use fused_dpo_loss")
    if kind not in EXTRAS:
        raise fail("loss_type", names, f"losses of {', '.join(known.__name__ for known in EXTRAS)}")
    for name in extras:
        if name not in EXTRAS[kind]:
            raise ValueError(f"{name}: got a value that {names} does not use, wanted None")
    for name in REQUIRED.get(kind, ()):
        if name not in extras:
            raise ValueError(f"{name}: got None, wanted a value for {names}")
    if "num_segments" in extras and "segment_ids" not in extras:
        raise fail("num_segments", "a value without segment_ids", "segment_ids as well")


def _check_divergence_pairs(
    objective: Objective,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_hidden: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    names = ", ".join(term.spec.name for term in objective.terms)
    if ref_hidden is None:
        raise fail(
            "ref_hidden", "None", f"the reference's hidden states for {names}: it needs whole distributions"
        )
    if token_weights is not None:
        raise fail("token_weights", f"a value that {names} does not use", "None")
    sequences = len(labels) if cu_seqlens is None else len(cu_seqlens) - 1
    if sequences % 2:
        raise fail("labels", f"{sequences} sequences", "chosen and rejected ones, an even number")


def _check_batch(hidden: object, labels: object, layout: object) -> Tensor | None:
    """Returns the layout's ``cu_seqlens``."""
    tokens = check_tensor("labels", labels)
    check_tensor("hidden", hidden)
    check_like("labels", tokens, tokens, INT_DTYPES)
    if layout is None:
        if tokens.dim() != 2:
            raise fail("labels", f"shape {tuple(tokens.shape)}", "(B, T), or a layout")
        return None
    if not isinstance(layout, PackedLayout):
        raise fail("layout", type(layout).__name__, "None or a PackedLayout")
    if tokens.dim() != 1:
        raise fail("labels", f"shape {tuple(tokens.shape)}", "(N_all,) with a PackedLayout")
    check_tensor("layout.cu_seqlens", layout.cu_seqlens)
    check_cu_seqlens(layout.cu_seqlens, layout.lengths, tokens)
    return layout.cu_seqlens


def _check_reference(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    hidden: Tensor,
    ref_hidden: Tensor | None,
    ref_lm_head: object,
    ref_logps: Tensor | None,
    needs_tokens: bool,
) -> None:
    """At most one source of reference log-probabilities, in a shape that fits."""
    if ref_lm_head is not None and ref_hidden is None:
        raise fail("ref_lm_head", "a head without ref_hidden", "ref_hidden as well")
    if ref_hidden is not None:
        if ref_logps is not None:
            raise fail("ref_logps", "a value together with ref_hidden", "one of the two")
        check_tensor("ref_hidden", ref_hidden)
        if ref_hidden.shape[:-1] != hidden.shape[:-1]:
            wanted = f"(*{tuple(hidden.shape[:-1])}, H), as hidden"
            raise fail("ref_hidden", f"shape {tuple(ref_hidden.shape)}", wanted)
    sequences = len(labels) if cu_seqlens is None else len(cu_seqlens) - 1
    shape = None if needs_tokens else (sequences,)
    check_like("ref_logps", ref_logps, labels, FLOAT_DTYPES, shape)
