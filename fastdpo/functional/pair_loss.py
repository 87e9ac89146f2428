"""Per token -> per answer -> loss, rewards and metrics; for a whole batch, and for a group of its pairs.

The second half of ``fused_dpo_loss``. Mode ``pairs`` runs it group by group in the middle of the first
half, under the key ``objective`` of the op's table of losses.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional.tokens import AnswerTokens
from fastdpo.losses.build import build_objective
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.metrics import pair_metrics, token_metrics
from fastdpo.losses.objective import Objective
from fastdpo.losses.reference_combination import ReferenceCombination
from fastdpo.ops.paired_chunks import GroupLoss
from fastdpo.ops.paired_loss import GROUP_LOSSES, recording_gradients
from fastdpo.ops.sequence import sequence_sums_op, sigmoid_pairs
from fastdpo.plan.schedule import PairGroup
from fastdpo.types import DPOLossOutput, LinearLogprobOutput

METRIC_STATISTICS = ("entropy", "mean_logit", "is_top1")
LOSS_KEY = "objective"


def answer_sums(values: Tensor, tokens: AnswerTokens, where: Tensor | None) -> Tensor:
    """``(2, P)``, chosen first: per-token values summed over each answer's tokens, all or those ``where``."""
    # The op itself: its offsets were made here and need no check.
    sums = sequence_sums_op(values, None, where, tokens.offsets, tokens.segment_ids, "auto")
    return sums.view(tokens.num_pairs, 2).t()


def answer_lengths(tokens: AnswerTokens, where: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(2, P)``, chosen first: the number of tokens of each answer, all or those ``where``."""
    if where is None:
        num_answers = 2 * tokens.num_pairs
        lengths = tokens.offsets.narrow(0, 1, num_answers) - tokens.offsets.narrow(0, 0, num_answers)
        return lengths.to(dtype).view(tokens.num_pairs, 2).t()
    return answer_sums(where.to(dtype), tokens, None)


def answer_weights(token_weights: Tensor | None, tokens: AnswerTokens) -> Tensor | None:
    """``(N,)`` in pair order; 0 for tokens of no answer, where the caller's may be NaN."""
    if token_weights is None:
        return None
    weights = tokens.pick(token_weights)
    return weights if tokens.in_answer is None else weights.where(tokens.in_answer, 0)


@torch.no_grad()
def given_reference(
    ref_logps: Tensor | None,
    tokens: AnswerTokens,
    token_weights: Tensor | None,
    combination: ReferenceCombination | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """A reference that the caller has, checked: sums as ``(2, P)``, log-probabilities per token as ``(N,)``.

    Args:
        ref_logps: as the caller gave it; of K references, each a row, where there is a ``combination``, which
            makes sums of them.
        token_weights: ``(N,)`` in pair order, or None; with them nothing is a sum yet.
        dtype: of the log-probabilities that it goes with, at least fp32.
    """
    if ref_logps is None:
        return None
    num_pairs = tokens.num_pairs
    if combination is None:
        is_sums = token_weights is None and ref_logps.shape == (2 * num_pairs,)
        return ref_logps.view(2, num_pairs) if is_sums else tokens.pick(ref_logps)
    if token_weights is None and ref_logps.shape[1:] == (2 * num_pairs,):
        sums = ref_logps.reshape(-1, 2, num_pairs)
    else:
        weight = 1 if token_weights is None else token_weights
        per_token = [tokens.pick(one).to(dtype) * weight for one in ref_logps.detach()]
        sums = torch.stack([answer_sums(one, tokens, tokens.in_answer) for one in per_token])
    lengths = answer_lengths(tokens, tokens.in_answer, dtype)
    return combination.combine(sums.detach(), lengths).to(dtype)


def pair_logps(
    tokens: AnswerTokens,
    logps: Tensor,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    *,
    uses_nll: bool,
) -> PairLogps:
    """What the losses see of a batch.

    Args:
        logps: ``(N,)`` in pair order.
        ref_logps: ``(N,)`` likewise, or sums ``(2, P)``, or None.
        token_weights: ``(N,)`` likewise, or None; weigh the log-probabilities of both models.
        uses_nll: whether a loss looks at the tokens of an NLL term.
    """

    def weighted(values: Tensor) -> Tensor:
        return answer_sums(
            values if token_weights is None else values * token_weights, tokens, tokens.in_answer
        )

    chosen, rejected = weighted(logps)
    pair = PairLogps(chosen, rejected, *answer_lengths(tokens, tokens.in_answer, logps.dtype))
    if ref_logps is not None:
        ref_logps = ref_logps.detach().to(logps.dtype)
        ref_chosen, ref_rejected = ref_logps if ref_logps.dim() == 2 else weighted(ref_logps)
        pair = replace(pair, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if uses_nll and not (tokens.in_nll is None and token_weights is None):
        where = tokens.in_answer if tokens.in_nll is None else tokens.in_nll
        log_likelihood, _ = answer_sums(logps, tokens, where)
        nll_tokens, _ = answer_lengths(tokens, where, logps.dtype)
        pair = replace(pair, nll_sum=-log_likelihood, nll_tokens=nll_tokens)
    return pair


def loss_output(
    objective: Objective,
    pair: PairLogps,
    token: LinearLogprobOutput,
    tokens: AnswerTokens,
    loss: Tensor | None = None,
) -> DPOLossOutput:
    """Everything a caller gets, from a batch in pair order; ``loss`` where it is there already."""
    rewards = objective.rewards(pair)
    statistics = {name: getattr(token, name) for name in METRIC_STATISTICS}

    def answers(values: Tensor) -> Tensor:
        return answer_sums(values, tokens, tokens.in_answer)

    return DPOLossOutput(
        loss=objective.loss(pair) if loss is None else loss,
        chosen_logps=pair.chosen.detach(),
        rejected_logps=pair.rejected.detach(),
        ref_chosen_logps=pair.ref_chosen,
        ref_rejected_logps=pair.ref_rejected,
        chosen_rewards=rewards[0],
        rejected_rewards=rewards[1],
        metrics=pair_metrics(pair, rewards, objective.logged_logps(pair))
        | objective.further_metrics(pair)
        | token_metrics(pair, answers, **statistics),
    )


def pack_objective(
    loss_arguments: dict[str, Any],
    tokens: AnswerTokens,
    *,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    uses_nll: bool,
) -> tuple[str, list[Tensor]]:
    """An objective and all it needs of a batch as an op can carry it: text and tensors.

    The counts to divide by are the whole batch's where ``loss_arguments`` has none: every group uses them.
    """
    no_logps = torch.zeros_like(tokens.segment_ids, dtype=torch.float64)
    pair = pair_logps(tokens, no_logps, None, token_weights, uses_nll=uses_nll)
    given = {name: value for name, value in loss_arguments.items() if value is not None}
    if not given.keys() & {"num_pairs", "num_tokens"}:
        given["num_pairs"] = pair.is_scored.sum().clamp(min=1)
        given["num_tokens"] = pair.nll_count.sum().clamp(min=1)
    # A number that is on the host already travels as one: kernels want tensors where their tokens are.
    device = tokens.segment_ids.device
    given = {
        name: value.item()
        if isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu" != device.type
        else value
        for name, value in given.items()
    }
    arguments = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    tensors = {f"loss.{name}": value for name, value in given.items() if isinstance(value, Tensor)}
    tensors |= {"segment_ids": tokens.segment_ids, "offsets": tokens.offsets}
    optional = {
        "in_answer": tokens.in_answer,
        "in_nll": tokens.in_nll,
        "ref_logps": ref_logps,
        "token_weights": token_weights,
    }
    tensors |= {name: value for name, value in optional.items() if value is not None}
    return repr((_plain(arguments), list(tensors))), list(tensors.values())


def _plain(value: Any) -> Any:
    """What ``repr`` writes as Python's own: of NumPy's floats and texts it would write the class."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def _unpack_objective(parameters: str, tensors: Sequence[Tensor]) -> GroupLoss:
    """What ``pack_objective`` made, as a function of a group."""
    constants, names = literal_eval(parameters)
    named = dict(zip(names, tensors, strict=True))
    segment_ids, offsets = named["segment_ids"], named["offsets"]
    batch = AnswerTokens(
        len(offsets) // 2, segment_ids, segment_ids, offsets, named.get("in_answer"), named.get("in_nll")
    )
    per_loss = {name[5:]: value for name, value in named.items() if name.startswith("loss.")}
    all_ref_logps, all_weights = named.get("ref_logps"), named.get("token_weights")

    def group_loss(logps: Tensor, ref_logps: Tensor | None, group: PairGroup) -> tuple[Tensor, Tensor]:
        pairs, rows = slice(group.first_pair, group.last_pair), slice(group.start, group.stop)
        arguments = {name: value[pairs] if value.dim() else value for name, value in per_loss.items()}
        objective = build_objective(**constants, **arguments)
        if all_ref_logps is not None:
            ref_logps = all_ref_logps[:, pairs] if all_ref_logps.dim() == 2 else all_ref_logps[rows]
        if not objective.uses_reference:
            ref_logps = None
        tokens = batch.of_group(group)
        weights = None if all_weights is None else all_weights[rows]
        if objective.is_plain_sigmoid:
            return _sigmoid_of_group(objective, tokens, logps, ref_logps, weights)
        with recording_gradients():
            leaf = logps.detach().requires_grad_()
            pair = pair_logps(tokens, leaf, ref_logps, weights, uses_nll=objective.uses_nll)
            share = objective.total(pair)
            (token_grads,) = torch.autograd.grad(share, leaf)
        return share.detach(), token_grads

    return group_loss


def _sigmoid_of_group(
    objective: Objective,
    tokens: AnswerTokens,
    logps: Tensor,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The DPO loss, the one that has a kernel: one launch where autograd takes some thirty."""
    if ref_logps is not None and ref_logps.dim() == 1:
        ref_logps = answer_sums(
            ref_logps if token_weights is None else ref_logps * token_weights, tokens, tokens.in_answer
        )
    arguments: dict[str, Any] = dict(objective.terms[0].arguments)
    if "pair_weights" in objective.per_pair:
        weights = objective.per_pair["pair_weights"]
        if isinstance(weights, Tensor) and ref_logps is not None:
            # A pair that counts nowhere may have a reference that is NaN.
            ref_logps = ref_logps.where(weights != 0, 0)
        arguments["pair_weights"] = weights
    result = sigmoid_pairs(
        logps,
        tokens.offsets,
        divisor=1.0 if objective.num_pairs is None else objective.num_pairs,
        ref_sums=None if ref_logps is None else ref_logps.t().reshape(-1),
        weights=token_weights,
        mask=tokens.in_answer,
        **arguments,
    )
    return result.loss, result.g


GROUP_LOSSES[LOSS_KEY] = _unpack_objective
