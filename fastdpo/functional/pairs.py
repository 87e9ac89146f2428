"""From hidden states to the preference loss: the only place where the op and the losses meet.

    labels --labelled_tokens--> the tokens to score, pair by pair, and the rows of hidden that predict them
    hidden, head --chunks of logits--> log-probabilities per token, for the policy and for the reference
    --answer_sums--> per answer --Objective--> loss and rewards

The gradient comes back the same way. Where the head is trained and the loss is a sum over pairs (mode
``pairs``) the last step runs group by group in the middle of the second, so that one pass makes both.

Sequences 0..P-1 are the chosen answers and P..2P-1 the rejected ones, padded ``(2P, T)``, packed ``(N_all,)``
with a ``PackedLayout``, or token by token with a ``TokenLayout``. Log-probabilities are fp32 (fp64 for fp64
inputs), in nats. The device is waited for once a call, to learn how many tokens have a label; not at all with
a ``TokenLayout`` that has its ``lengths``, twice with one that has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional.checks import (
    FLOAT_DTYPES,
    INT_DTYPES,
    check_batch,
    check_layout_call,
    check_layout_logps,
    check_like,
    check_reference,
    check_tensor,
    reference_head,
)
from fastdpo.functional.pair_loss import (
    LOSS_KEY,
    METRIC_STATISTICS,
    answer_weights,
    given_reference,
    loss_output,
    pack_objective,
    pair_logps,
)
from fastdpo.functional.tokens import (
    AnswerTokens,
    all_tokens,
    batch_pairs,
    labelled_tokens,
    layout_pairs,
    layout_tokens,
    next_token,
    shift_labels,
)
from fastdpo.losses.build import build_objective
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.objective import Objective
from fastdpo.losses.reference_combination import ReferenceCombination, as_combination
from fastdpo.ops.checks import (
    as_head,
    check_execution,
    check_inputs,
    check_labels,
    is_same_head,
    resolve_dtypes,
)
from fastdpo.ops.linear_logprob import indexed_logprob, settle_mode
from fastdpo.ops.paired_loss import paired_loss
from fastdpo.types import DPOLossOutput, Execution, LinearLogprobOutput, LMHead, PackedLayout, TokenLayout

__all__ = ["dpo_loss_from_logps", "fused_dpo_loss", "shift_labels"]


def fused_dpo_loss(
    hidden: Tensor,
    lm_head: LMHead | Tensor | torch.nn.Linear,
    labels: Tensor | None,
    *,
    ref_hidden: Tensor | None = None,
    ref_lm_head: LMHead | Tensor | torch.nn.Linear | None = None,
    ref_logps: Tensor | None = None,
    ref_combination: str | ReferenceCombination | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: PerPair | None = None,
    margin: PerPair | None = None,
    pair_weights: PerPair | None = None,
    soft_labels: PerPair | None = None,
    reward_gap: PerPair | None = None,
    chosen_win_rate: PerPair | None = None,
    rejected_win_rate: PerPair | None = None,
    token_weights: Tensor | None = None,
    nll_labels: Tensor | None = None,
    num_pairs: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    layout: PackedLayout | TokenLayout | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    execution: Execution | None = None,
    **loss_options: Any,
) -> DPOLossOutput:
    """A preference loss of hidden states, without the logits of the batch.

    Args:
        hidden: ``(2P, T, H)``, chosen answers first, ``(N_all, H)`` with a ``PackedLayout``, or ``(..., H)``
            with a ``TokenLayout``: the states that the head is applied to.
        lm_head: the policy's head: an ``LMHead``, a ``(V, H)`` tensor or an ``nn.Linear``.
        labels: ``(2P, T)`` or ``(N_all,)`` int64 or int32, aligned with the input ids; ``ignore_index``
            marks prompt and padding. None with a ``TokenLayout``, which has the tokens.
        ref_hidden: the reference's hidden states, same tokens; its log-probabilities are computed here
            with ``ref_lm_head`` (default: ``lm_head``) and carry no gradient.
        ref_logps: instead of it, ``(2P,)`` sums, or (the only form with ``token_weights``) per token in the
            labels' shape as ``linear_logprob`` returned them: aligned with ``hidden``, whatever ``shift``.
            With ``ref_combination`` K of either, in a further first dimension: ``(K, 2P)`` or ``(K, 2P, T)``.
        ref_combination: how K references become the one that the losses see: ``harmonic``, ``geometric``,
            ``mrpo`` (MRPO), ``max_margin`` or ``mean`` (InfiFPO), or a ``ReferenceCombination`` with options.
            They become one once a batch, without a gradient, and what is returned is that one. None: one
            reference; K without a word on how are refused.
        loss_type, loss_weights: names in ``LOSSES``; the loss is their weighted sum.
        beta: positive, a number or ``(P,)``. None: each loss's own default, as ``losses_table()`` has it.
        margin: psi, subtracted from the margin beta * (u_w - u_l); a number or ``(P,)``.
        pair_weights: at least 0, a number or ``(P,)``; multiplies the pair's share of every loss.
        soft_labels: probability in [0, 1] that chosen is the better answer, a number or ``(P,)``.
        reward_gap: the chosen answer's reward less the rejected one's, for losses that go by it (``rebel``,
            ``rpo_sq``, ``rpo_bwd_kl``, ``rpo_fwd_kl``); a number or ``(P,)``.
        chosen_win_rate, rejected_win_rate: probability in [0, 1] that the answer beats another sample of the
            policy, for losses that regress on it (``sppo``): both or neither, numbers or ``(P,)``.
        token_weights: the labels' shape, aligned with them; an answer's log-probability becomes the
            weighted sum, for policy and reference. Lengths and the NLL of sft stay unweighted.
        nll_labels: the labels' shape; its tokens of the chosen sequences, and no others, are what sft trains
            on (prompt and answer, say). None: the chosen answers. Where both are set, ``labels`` holds.
        num_pairs, num_tokens: what to divide by instead of this batch's own counts of pairs and of NLL
            tokens (losses of scope ``token``), so that micro-batches add up to the mean over all of them. A
            number or a 0-d tensor; with one given, every count that the named losses divide by must be.
        layout: None for padded input. With a ``TokenLayout`` per-token tensors are ``(N,)`` in its order,
            nothing is shifted, and ``nll_labels`` is refused.
        shift: whether ``labels``, ``nll_labels`` and ``token_weights`` are aligned with the input ids, so
            that a state predicts the next one; False where they are aligned with ``hidden`` already.
        execution: how to run the head; see ``Execution``.
        loss_options: options of the named losses, as ``label_smoothing``; see ``LOSSES``.

    Returns:
        ``DPOLossOutput``. ``metrics`` has TRL's names, as ``()`` tensors on the device: ``rewards/chosen``,
        ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``,
        ``logps/rejected``, ``logits/chosen``, ``logits/rejected``, ``entropy``, ``mean_token_accuracy`` and
        ``num_tokens`` (completion tokens of this call; TRL's running count of input tokens is the loop's).
        With an NLL term ``nll_loss``, with ``orpo`` ``log_odds_ratio`` and ``log_odds_chosen``. ``logps/*``
        are sums per answer, of losses that compare per-token means without a reference (SimPO, ORPO, TPO-L)
        these.

    An empty answer counts as log-probability 0. A pair without any token counts nowhere: not in the loss,
    not in ``P``, not in the metrics; with no token at all the loss is 0 and so is every gradient.

    Raises:
        ValueError: a wrong shape, dtype, device, value or combination; an unknown loss or option; a
            reference that is needed and missing, given twice, or given to losses none of which uses one; K
            references without ``ref_combination``, or weights that are not theirs. The values of a tensor
            (beta, margin, soft_labels ...) are checked on the CPU, out of ``torch.compile``; on a device,
            which would have to be waited for, they are taken on trust.
        TypeError: what should be a tensor is none.

    Example:
        >>> hidden, head = torch.randn(4, 6, 8), torch.randn(11, 8)
        >>> labels = torch.randint(0, 11, (4, 6))
        >>> fused_dpo_loss(hidden, head, labels, ref_hidden=hidden).loss
        tensor(0.6931)

    Source: Rafailov et al., arXiv:2305.18290 eq. 7; every other loss names its own in ``losses_table()``.
    """
    loss_arguments = {
        "loss_type": loss_type, "loss_weights": loss_weights, "beta": beta, "margin": margin,
        "pair_weights": pair_weights, "soft_labels": soft_labels, "reward_gap": reward_gap,
        "chosen_win_rate": chosen_win_rate, "rejected_win_rate": rejected_win_rate,
        "num_pairs": num_pairs, "num_tokens": num_tokens,
        **loss_options,
    }  # fmt: skip
    objective = build_objective(**loss_arguments)
    combination = as_combination(ref_combination)
    run, head = check_execution(execution), as_head(lm_head, takes_adapter=True)
    if isinstance(layout, TokenLayout):
        check_layout_call(layout, hidden, labels, nll_labels)
        per_token, num_pairs_here = layout.target_ids, layout_pairs(layout)
    else:
        labels = check_batch("labels", labels, layout, INT_DTYPES)
        check_labels(labels, hidden)
        per_token, num_pairs_here = labels, batch_pairs(labels, layout)
    check_reference(
        per_token,
        num_pairs_here,
        hidden.shape[:-1],
        ref_hidden,
        ref_lm_head,
        ref_logps,
        token_weights,
        combination,
    )
    check_like("token_weights", token_weights, per_token, FLOAT_DTYPES)
    check_like("nll_labels", nll_labels, per_token, INT_DTYPES)
    objective.check_batch(
        num_pairs_here,
        hidden.device,
        has_reference=ref_hidden is not None or ref_logps is not None,
        has_token_weights=token_weights is not None,
        has_nll_tokens=nll_labels is not None,
    )

    if isinstance(layout, TokenLayout):
        tokens = layout_tokens(layout, num_pairs_here)
    else:
        tokens = labelled_tokens(per_token, nll_labels, layout, shift=shift, ignore_index=ignore_index)
        if token_weights is not None and shift:
            token_weights = next_token(token_weights, 0, layout)
    weights = answer_weights(token_weights, tokens)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    reference = given_reference(ref_logps, tokens, weights, combination, dtype)
    ref_head = reference_head(head, ref_hidden, ref_lm_head)
    is_shared = ref_hidden is not None and ref_hidden.dtype == hidden.dtype and is_same_head(head, ref_head)

    # The reference's rows go through the same chunks as the policy's, right behind them where both have the
    # same head, so that policy == reference bit for bit.
    mode = _settle_mode(run, hidden, head, objective, [token_weights, *loss_arguments.values()])
    rows = (tokens.target_ids, tokens.token_index, tokens.index_kind)
    if ref_hidden is not None and not is_shared:
        how = replace(run, mode=mode if mode == "lean" else "score")
        with torch.no_grad():
            reference = indexed_logprob(ref_hidden, ref_head, *rows, execution=how)[0].logps
    shared: dict[str, Any] = {
        "ref_hidden": ref_hidden if is_shared else None,
        "outputs": METRIC_STATISTICS,
        "execution": replace(run, mode=mode),
    }
    loss = None
    if mode == "pairs":
        packed = pack_objective(
            loss_arguments, tokens, ref_logps=reference, token_weights=weights, uses_nll=objective.uses_nll
        )
        pair_rows = tokens.host_offsets[::2].contiguous()
        loss, token, computed = paired_loss(hidden, head, *rows, pair_rows, (LOSS_KEY, *packed), **shared)
    else:
        token, computed = indexed_logprob(hidden, head, *rows, **shared)
    reference = computed if is_shared else reference
    pair = pair_logps(tokens, token.logps, reference, weights, uses_nll=objective.uses_nll)
    return loss_output(objective, pair, token, tokens, loss)


def dpo_loss_from_logps(
    token: LinearLogprobOutput,
    mask: Tensor | None,
    *,
    ref_logps: Tensor | None = None,
    ref_combination: str | ReferenceCombination | None = None,
    nll_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    layout: PackedLayout | TokenLayout | None = None,
    **loss_arguments: Any,
) -> DPOLossOutput:
    """The second half of ``fused_dpo_loss``, for per-token log-probabilities that are there already.

    Args:
        token: as ``linear_logprob`` returns it, ``(2P, T)``, packed ``(N_all,)``, or ``(N,)`` with a
            ``TokenLayout``. Of ``entropy``, ``mean_logit`` and ``is_top1``, one that is None gives no metric.
        mask: bool, the shape of ``token.logps``: the completion tokens. Every argument here is aligned
            with ``token.logps``, nothing is shifted: ``shift_labels(labels, ...) != ignore_index``. None,
            for all of them, with a ``TokenLayout``.
        ref_logps: ``(2P,)`` sums or per token; None for losses without a reference. With ``ref_combination``
            K of them, as there.
        nll_mask: bool; its tokens of the chosen sequences are those of an NLL term. None: ``mask``.
        token_weights, layout: as in ``fused_dpo_loss``. loss_arguments: ``loss_type``, ``loss_weights``,
        ``beta``, ``margin``, ``soft_labels``, ``reward_gap``,
            ``chosen_win_rate``, ``rejected_win_rate``, ``pair_weights``, ``num_pairs``, ``num_tokens`` and
            the losses' own options, as there.

    Returns, raises: as ``fused_dpo_loss``.
    """
    objective = build_objective(**loss_arguments)
    logps = token.logps
    if isinstance(layout, TokenLayout):
        check_layout_logps(layout, logps, nll_mask)
        num_pairs = layout_pairs(layout)
    else:
        check_batch("token.logps", logps, layout, FLOAT_DTYPES)
        mask = check_tensor("mask", mask)
        num_pairs = batch_pairs(logps, layout)
    check_like("mask", mask, logps, (torch.bool,))
    check_like("nll_mask", nll_mask, logps, (torch.bool,))
    check_like("token_weights", token_weights, logps, FLOAT_DTYPES)
    combination = as_combination(ref_combination)
    check_reference(logps, num_pairs, logps.shape, None, None, ref_logps, token_weights, combination)
    objective.check_batch(
        num_pairs,
        logps.device,
        has_reference=ref_logps is not None,
        has_token_weights=token_weights is not None,
        has_nll_tokens=nll_mask is not None,
    )

    tokens: AnswerTokens
    if isinstance(layout, TokenLayout):
        tokens = layout_tokens(layout, num_pairs)
        tokens = tokens if mask is None else replace(tokens, in_answer=tokens.pick(mask))
    else:
        assert mask is not None
        tokens = all_tokens(mask, nll_mask, layout)
    weights = answer_weights(token_weights, tokens)
    token = LinearLogprobOutput(
        tokens.pick(logps),
        **{
            name: tokens.pick(value)
            for name in METRIC_STATISTICS
            if (value := getattr(token, name)) is not None
        },
    )
    dtype = torch.promote_types(logps.dtype, torch.float32)
    reference = given_reference(ref_logps, tokens, weights, combination, dtype)
    pair = pair_logps(tokens, token.logps, reference, weights, uses_nll=objective.uses_nll)
    return loss_output(objective, pair, token, tokens)


def _settle_mode(
    run: Execution, hidden: Tensor, head: LMHead, objective: Objective, arguments: Sequence[Any]
) -> str:
    """The mode that runs. ``pairs`` makes gradients of hidden states and head only, once, for this loss."""
    check_inputs(hidden, head)
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    # fp16 gradients are too small before a loss scaler has had its say, which comes with the backward pass.
    is_fp16 = resolve_dtypes(hidden, head.weight, run)[0] == torch.float16
    has_pair_loss = (
        objective.is_sum_over_pairs and not is_fp16 and not any(tensor.requires_grad for tensor in tensors)
    )
    return settle_mode(hidden, head, run, has_pair_loss=has_pair_loss)
