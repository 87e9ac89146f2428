"""The one path from hidden states, or log-probabilities, to a loss: what all public functions are made of.

    labels --tokens--> the tokens to score, row by row, and the rows of hidden that predict them
    hidden, head --chunks of logits--> log-probabilities per token, for the policy and for the reference
    --Rows--> sums per answer or piece --Objective--> loss, rewards and metrics

The gradient comes back the same way. Where the head is trained and the loss is a sum over rows (mode
``pairs``) the last step runs group by group in the middle of the second, so that one pass makes both. The
device is waited for once a call, to learn how many tokens have a label; not with a ``TokenLayout`` that has
its ``lengths``; once more for what nobody said of lists or segments, and for lists in mode ``pairs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional import checks
from fastdpo.functional.checks import FLOAT_DTYPES, INT_DTYPES, check_like
from fastdpo.functional.divergences import Teachers, measure
from fastdpo.functional.groups import LOSS_KEY, pack_objective
from fastdpo.functional.outputs import METRIC_STATISTICS, LossResult
from fastdpo.functional.rows import Rows
from fastdpo.functional.tokens import (
    RowOrder,
    RowTokens,
    all_tokens,
    count_ids,
    find_targets,
    labelled_tokens,
    next_token,
    num_sequences,
)
from fastdpo.losses.batches import ListLogps
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.objective import Objective
from fastdpo.losses.reference_combination import ReferenceCombination, as_combination
from fastdpo.ops import checks as op_checks
from fastdpo.ops.grouped_loss import grouped_loss
from fastdpo.ops.linear_logprob import indexed_logprob, settle_mode
from fastdpo.types import Execution, LinearLogprobOutput, LMHead, PackedLayout, TokenLayout


@dataclass(frozen=True, eq=False)
class Data:
    """What a caller says of a batch beside its tokens, as ``fused_dpo_loss`` and ``fused_preference_loss``
    name it: per token in the shape of the labels, or of the log-probabilities.

    Args:
        objective, loss_arguments: what ``build_objective`` made of which arguments.
        nll: labels, or a mask, of an NLL term.
        extras: what the losses' kind is told beside (``kinds.EXTRAS``), without what is None.
        sequence_group: the ranks that have parts of the sequences.
    """

    objective: Objective
    loss_arguments: dict[str, Any]
    ref_logps: Tensor | None = None
    ref_combination: str | ReferenceCombination | None = None
    token_weights: Tensor | None = None
    nll: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    layout: PackedLayout | TokenLayout | None = None
    sequence_group: Any = None

    @property
    def segment_ids(self) -> Tensor | None:
        segments: Tensor | None = self.extras.get("segment_ids")
        return segments

    @property
    def in_pairs(self) -> bool:
        """Whether sequences are chosen and rejected answers."""
        return issubclass(self.objective.inputs, PairLogps)

    def settle(self, like: Tensor, *, has_reference: bool) -> tuple[Data, RowOrder]:
        """The same, checked, without the segments among the extras; and the order of its rows.

        Args:
            like: the shape and device of what is per token.
        """
        objective, segment_ids = self.objective, self.segment_ids
        checks.check_sequence_group(self.sequence_group, objective, self.layout, self.extras)
        check_like("segment_ids", segment_ids, like, INT_DTYPES)
        extras = {name: v for name, v in self.extras.items() if name not in ("segment_ids", "num_segments")}
        if segment_ids is None:
            num_segments = num_sequences(like, self.layout)
            num_segments += num_segments % 2 if self.in_pairs else 0  # a TokenLayout's last may be empty
        else:
            said = self.extras.get("num_segments")
            num_segments = count_ids(segment_ids) if said is None else int(said)
        combination = as_combination(self.ref_combination)
        checks.check_reference(objective, like, num_segments, self.ref_logps, self.token_weights, combination)
        check_like("token_weights", self.token_weights, like, FLOAT_DTYPES)
        checks.check_segments(num_segments, segment_ids, extras, like.device)
        if objective.inputs is PairLogps:
            objective.check_batch(
                num_segments // 2,
                like.device,
                has_reference=has_reference or self.ref_logps is not None,
                has_token_weights=self.token_weights is not None,
                has_nll_tokens=self.nll is not None,
            )
        if self.in_pairs:
            order = RowOrder.of_pairs(num_segments, like.device)
        elif objective.inputs is ListLogps:
            ids, said = extras["group_ids"], extras.get("num_groups")
            extras["num_groups"] = count_ids(ids) if said is None else int(said)
            order = RowOrder.of_lists(ids, extras["num_groups"])
        else:
            order = RowOrder.of_answers(num_segments)
        return replace(self, ref_combination=combination, extras=extras), order

    def rows(
        self,
        tokens: RowTokens,
        order: RowOrder,
        token_weights: Tensor | None,
        like: Tensor,
        dtype: torch.dtype,
    ) -> Rows:
        """What was given, settled, in the order of the rows; log-probabilities will be of ``dtype``."""
        if token_weights is not None:
            token_weights = tokens.pick(token_weights)
            if tokens.in_answer is not None:  # elsewhere the caller's may be NaN
                token_weights = token_weights.where(tokens.in_answer, 0)
        extras = {
            name: order.arranged(value) if isinstance(value, Tensor) and value.dim() else value
            for name, value in self.extras.items()
        }
        rows, combination = Rows(tokens, token_weights, extras=extras), self.ref_combination
        if self.ref_logps is None:
            return rows
        ref_logps = self.ref_logps.detach()
        assert not isinstance(combination, str)
        shape = ref_logps.shape if combination is None else ref_logps.shape[1:]
        is_sums = token_weights is None and shape == (order.num_segments,)
        is_sums = is_sums and (self.objective.inputs is PairLogps or shape != like.shape)
        if combination is None and is_sums:
            return replace(rows, ref_sums=order.arranged(ref_logps))
        if combination is None:
            return replace(rows, ref_logps=tokens.pick(ref_logps))
        if is_sums:
            sums = torch.stack([order.arranged(one) for one in ref_logps])
        else:
            sums = torch.stack([rows.sums(rows.weighted(tokens.pick(one).to(dtype))) for one in ref_logps])
        both = sums.detach().view(len(sums), -1, 2).transpose(1, 2)  # (K, 2, P), chosen first
        combined = combination.combine(both, rows.lengths(dtype).view(-1, 2).t())
        return replace(rows, ref_sums=combined.to(dtype).t().reshape(-1))


def loss_of_states(
    hidden: Tensor,
    lm_head: LMHead | Tensor | torch.nn.Linear,
    labels: Tensor | None,
    data: Data,
    ref_hidden: Tensor | None,
    ref_lm_head: LMHead | Tensor | torch.nn.Linear | None,
    teachers: Teachers | None,
    shift: bool,
    ignore_index: int,
    execution: Execution | None,
) -> LossResult:
    """Hidden states to the loss; arguments as those of the public functions.

    Args:
        teachers: what else losses with divergences are told; None for all others.
    """
    objective, layout, weights = data.objective, data.layout, data.token_weights
    run, head = op_checks.check_execution(execution), op_checks.as_head(lm_head, takes_all=True)
    checks.check_not_in_layout(layout, labels=labels, nll_labels=data.nll)
    like = checks.check_batch("labels", labels, layout, INT_DTYPES, in_pairs=data.in_pairs)
    if isinstance(layout, TokenLayout):
        op_checks.check_token_layout(layout, hidden)
    else:
        op_checks.check_labels(like, hidden)
    checks.check_states(hidden, ref_hidden, ref_lm_head, data.ref_logps)
    check_like("nll_labels", data.nll, like, INT_DTYPES)
    given, order = data.settle(like, has_reference=ref_hidden is not None)
    ref_head = checks.reference_head(head, ref_hidden, ref_lm_head)

    segment_ids, targets = data.segment_ids, like
    if isinstance(layout, TokenLayout):
        tokens = labelled_tokens(like, None, order, layout, segment_ids)
        scored = (tokens.pick(like), tokens.pick(layout.token_index), "repeated")
    else:
        if shift:
            weights = None if weights is None else next_token(weights, 0, layout)
            segment_ids = None if segment_ids is None else next_token(segment_ids, -1, layout)
        targets, mask, nll_mask = find_targets(like, data.nll, layout, shift, ignore_index)
        wanted = mask if nll_mask is None else mask | nll_mask
        tokens = labelled_tokens(like, wanted, order, layout, segment_ids)
        if nll_mask is not None:
            tokens = replace(tokens, in_answer=tokens.pick(mask), in_nll=tokens.pick(nll_mask))
        scored = (tokens.pick(targets), tokens.positions, "tokens")
    tokens = replace(tokens, group=data.sequence_group)
    rows = given.rows(tokens, order, weights, like, torch.promote_types(hidden.dtype, torch.float32))
    if teachers is not None:
        reference = None if ref_hidden is None else (ref_hidden, ref_head)
        where = layout if isinstance(layout, TokenLayout) else targets
        how = {"ignore_index": ignore_index, "execution": execution}
        token, ref_logps, made = measure(objective, hidden, head, where, tokens, reference, teachers, **how)
        return _result(objective, order, replace(rows, ref_logps=ref_logps, divergences=made), token)
    how_found = _score(hidden, head, (ref_hidden, ref_head), scored, given, order, rows, run)
    return _result(objective, order, *how_found)


def _score(
    hidden: Tensor,
    head: LMHead,
    reference: tuple[Tensor | None, LMHead],
    scored: tuple[Tensor, Tensor, str],
    given: Data,
    order: RowOrder,
    rows: Rows,
    run: Execution,
) -> tuple[Rows, LinearLogprobOutput, Tensor | None]:
    """The rows with their reference, log-probabilities per token, and the loss where mode ``pairs`` makes it.

    Args:
        scored: targets ``(N,)``, rows of hidden ``(N,)`` and the kind of these, as of ``indexed_logprob``.
    """
    # The reference's rows go through the same chunks as the policy's, right behind them where both have the
    # same head, so that policy == reference bit for bit.
    mode, (ref_hidden, ref_head) = _settle_mode(run, hidden, head, given), reference
    is_same_head = op_checks.is_same_head(head, ref_head)
    is_shared = ref_hidden is not None and ref_hidden.dtype == hidden.dtype and is_same_head
    if ref_hidden is not None and not is_shared:
        scoring = replace(run, mode=mode if mode == "lean" else "score")
        with torch.no_grad():
            of_reference, _ = indexed_logprob(ref_hidden, ref_head, *scored, execution=scoring)
        rows = replace(rows, ref_logps=of_reference.logps)
    shared: dict[str, Any] = {
        "ref_hidden": ref_hidden if is_shared else None,
        "outputs": METRIC_STATISTICS if given.objective.inputs is PairLogps else ("entropy",),
        "execution": replace(run, mode=mode),
    }
    loss = None
    if mode == "pairs":
        loss_rows, packed = _for_the_op(given, order, rows, is_shared)
        loss, token, computed = grouped_loss(hidden, head, *scored, loss_rows, packed, **shared)
    else:
        token, computed = indexed_logprob(hidden, head, *scored, **shared)
    return replace(rows, ref_logps=computed) if is_shared else rows, token, loss


def loss_of_logps(
    token: LinearLogprobOutput, mask: Tensor | None, data: Data, divergences: Mapping[str, Tensor]
) -> LossResult:
    """Log-probabilities to the loss; arguments as those of the public functions."""
    logps, layout, segment_ids = token.logps, data.layout, data.segment_ids
    checks.check_not_in_layout(layout, nll_mask=data.nll)
    checks.check_batch("token.logps", logps, layout, FLOAT_DTYPES, in_pairs=data.in_pairs)
    if not isinstance(layout, TokenLayout):
        checks.check_tensor("mask", mask)
    check_like("mask", mask, logps, (torch.bool,))
    check_like("nll_mask", data.nll, logps, (torch.bool,))
    for name, value in divergences.items():
        check_like(name, value, logps, FLOAT_DTYPES)
    given, order = data.settle(logps, has_reference=False)

    tokens = all_tokens(logps, order, layout, segment_ids)
    if segment_ids is not None:
        mask = segment_ids >= 0 if mask is None else mask & (segment_ids >= 0)
    in_answer, in_nll = (None if each is None else tokens.pick(each) for each in (mask, data.nll))
    tokens = replace(tokens, in_answer=in_answer, in_nll=in_nll, group=data.sequence_group)
    dtype = torch.promote_types(logps.dtype, torch.float32)
    rows = given.rows(tokens, order, data.token_weights, logps, dtype)
    rows = replace(rows, divergences={name: tokens.pick(value) for name, value in divergences.items()})
    found = {name: getattr(token, name) for name in METRIC_STATISTICS}
    picked = {name: tokens.pick(value) for name, value in found.items() if value is not None}
    return _result(data.objective, order, rows, LinearLogprobOutput(tokens.pick(logps).to(dtype), **picked))


def _for_the_op(
    given: Data, order: RowOrder, rows: Rows, is_shared: bool
) -> tuple[Tensor, tuple[str, str, list[Tensor]]]:
    """Mode ``pairs``: where each row's tokens begin, and the objective packed with all it needs."""
    objective, tokens = given.objective, rows.tokens
    no_logps = torch.zeros_like(tokens.segment_ids, dtype=torch.float64)
    if objective.inputs is PairLogps:  # which ``settle`` has checked
        batch = replace(rows, ref_logps=None, ref_sums=None).batch(objective, no_logps)
    else:
        batch = (replace(rows, ref_logps=no_logps) if is_shared else rows).batch(objective, no_logps)
        objective.check(batch)
    loss_rows, segments = tokens.loss_rows(order)
    if "group_ids" in rows.extras and "max_candidates" not in rows.extras:
        largest = int(segments.diff().max()) if len(segments) > 1 else 0
        rows = replace(rows, extras={**rows.extras, "max_candidates": largest})
    packed = pack_objective(given.loss_arguments, rows, segments, objective.divisors(batch))
    return loss_rows, (LOSS_KEY, *packed)


def _result(
    objective: Objective, order: RowOrder, rows: Rows, token: LinearLogprobOutput, loss: Tensor | None = None
) -> LossResult:
    """The last step; ``loss`` where mode ``pairs`` has made it, from a batch that was checked."""
    batch = rows.batch(objective, token.logps)
    if loss is None:
        if objective.inputs is not PairLogps:  # which ``settle`` has checked
            objective.check(batch)
        loss = objective.loss(batch)
    return LossResult(objective, order, rows, batch, loss, token)


def _settle_mode(run: Execution, hidden: Tensor, head: LMHead, given: Data) -> str:
    """The mode that runs. ``pairs`` makes gradients of hidden states and head only, once, for this loss."""
    op_checks.check_inputs(hidden, head)
    beside = [given.token_weights, *given.loss_arguments.values(), *given.extras.values()]
    is_differentiated = any(isinstance(value, Tensor) and value.requires_grad for value in beside)
    # fp16 gradients are too small before a loss scaler has had its say, which comes with the backward pass.
    is_fp16 = op_checks.resolve_dtypes(hidden, head.weight, run)[0] == torch.float16
    has_row_loss = given.objective.is_sum_over_rows and not is_fp16 and not is_differentiated
    # Ranks with parts of the sequences, or with rows of their own, would have to meet after every group.
    shard = head.vocab_parallel
    has_row_loss = has_row_loss and given.sequence_group is None and not (shard and shard.has_own_rows)
    return settle_mode(hidden, head, run, has_row_loss=has_row_loss)
