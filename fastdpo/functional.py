"""From hidden states to the preference loss: the only place where the op and the losses meet.

    labels --shift_labels--> the token each hidden state predicts
    hidden, head --linear_logprob--> log-probabilities per token, for the reference and for the policy
    --sequence_sums--> per answer --Objective--> loss and rewards

Sequences 0..P-1 are the chosen answers and P..2P-1 the rejected ones, padded ``(2P, T)`` or packed
``(N_all,)`` with a ``PackedLayout``. Log-probabilities are fp32 (fp64 for fp64 inputs), in nats.
Nothing here waits for the device; ``linear_logprob`` does once a call, to find the labelled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.aggregate import check_cu_seqlens, sequence_sums
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.metrics import pair_metrics, token_metrics
from fastdpo.losses.objective import Objective, build_objective
from fastdpo.ops.checks import fail
from fastdpo.ops.linear_logprob import linear_logprob
from fastdpo.types import DPOLossOutput, Execution, LinearLogprobOutput, LMHead, PackedLayout

METRIC_STATISTICS = ("entropy", "mean_logit", "is_top1")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int64, torch.int32)


def fused_dpo_loss(
    hidden: Tensor,
    lm_head: LMHead | Tensor | torch.nn.Linear,
    labels: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_lm_head: LMHead | Tensor | torch.nn.Linear | None = None,
    ref_logps: Tensor | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: PerPair | None = None,
    margin: PerPair | None = None,
    pair_weights: PerPair | None = None,
    soft_labels: PerPair | None = None,
    token_weights: Tensor | None = None,
    nll_labels: Tensor | None = None,
    num_pairs: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    layout: PackedLayout | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    execution: Execution | None = None,
    **loss_options: Any,
) -> DPOLossOutput:
    """A preference loss of hidden states, without the logits of the batch.

    Args:
        hidden: ``(2P, T, H)``, chosen answers first, or ``(N_all, H)`` with a ``layout``: the states that
            the head is applied to.
        lm_head: the policy's head: an ``LMHead``, a ``(V, H)`` tensor or an ``nn.Linear``.
        labels: ``(2P, T)`` or ``(N_all,)`` int64 or int32, aligned with the input ids; ``ignore_index``
            marks prompt and padding.
        ref_hidden: the reference's hidden states, same tokens; its log-probabilities are computed here
            with ``ref_lm_head`` (default: ``lm_head``) and carry no gradient.
        ref_logps: instead of it, ``(2P,)`` sums, or (the only form with ``token_weights``) per token in the
            labels' shape as ``linear_logprob`` returned them: aligned with ``hidden``, whatever ``shift``.
        loss_type, loss_weights: names in ``LOSSES``; the loss is their weighted sum.
        beta: positive, a number or ``(P,)``. None: each loss's own default, 0.1 for all but simpo (2.0).
        margin: psi, subtracted from the margin beta * (u_w - u_l); a number or ``(P,)``.
        pair_weights: at least 0, a number or ``(P,)``; multiplies the pair's share of every loss.
        soft_labels: probability in [0, 1] that chosen is the better answer, a number or ``(P,)``.
        token_weights: the labels' shape, aligned with them; an answer's log-probability becomes the
            weighted sum, for policy and reference. Lengths and the NLL of sft stay unweighted.
        nll_labels: the labels' shape; its tokens of the chosen sequences, and no others, are what sft trains
            on (prompt and answer, say). None: the chosen answers. Where both are set, ``labels`` holds.
        num_pairs, num_tokens: what to divide by instead of this batch's own counts of pairs and of NLL
            tokens (losses of scope ``token``), so that micro-batches add up to the mean over all of them. A
            number or a 0-d tensor; with one given, every count that the named losses divide by must be.
        layout: None for padded input.
        shift: whether ``labels``, ``nll_labels`` and ``token_weights`` are aligned with the input ids, so
            that a state predicts the next one; False where they are aligned with ``hidden`` already.
        execution: how to run the head; see ``Execution``.
        loss_options: options of the named losses, as ``label_smoothing``; see ``LOSSES``.

    Returns:
        ``DPOLossOutput``. ``metrics`` has TRL's names, as ``()`` tensors on the device: ``rewards/chosen``,
        ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``,
        ``logps/rejected``, ``logits/chosen``, ``logits/rejected``, ``entropy``, ``mean_token_accuracy`` and
        ``num_tokens`` (completion tokens of this call; TRL's running count of input tokens is the loop's).

    An empty answer counts as log-probability 0. A pair without any token counts nowhere: not in the loss,
    not in ``P``, not in the metrics; with no token at all the loss is 0 and so is every gradient.

    Raises:
        ValueError: a wrong shape, dtype, device, value or combination; an unknown loss or option; a
            reference that is needed and missing, given twice, or given to losses none of which uses one.
        TypeError: what should be a tensor is none.

    Example:
        >>> hidden, head = torch.randn(4, 6, 8), torch.randn(11, 8)
        >>> labels = torch.randint(0, 11, (4, 6))
        >>> fused_dpo_loss(hidden, head, labels, ref_hidden=hidden).loss
        tensor(0.6931)

    Source: Rafailov et al., arXiv:2305.18290 eq. 7; every other loss names its own in ``losses_table()``.
    """
    objective = build_objective(
        loss_type, loss_weights, beta=beta, margin=margin, soft_labels=soft_labels, pair_weights=pair_weights,
        num_pairs=num_pairs, num_tokens=num_tokens, **loss_options,
    )  # fmt: skip
    _check_batch("labels", labels, layout)
    _check_like("labels", labels, labels, INT_DTYPES)
    _check_reference(labels, layout, ref_hidden, ref_lm_head, ref_logps, token_weights)
    _check_like("token_weights", token_weights, labels, FLOAT_DTYPES)
    _check_like("nll_labels", nll_labels, labels, INT_DTYPES)
    objective.check_batch(
        _num_pairs(labels, layout),
        labels.device,
        has_reference=ref_hidden is not None or ref_logps is not None,
        has_token_weights=token_weights is not None,
        has_nll_tokens=nll_labels is not None,
    )

    targets, mask, nll_mask = _targets(labels, nll_labels, layout, shift, ignore_index)
    if token_weights is not None and shift:
        token_weights = _next_token(token_weights, 0, layout)
    token = linear_logprob(
        hidden, lm_head, targets, ignore_index=ignore_index, outputs=METRIC_STATISTICS, execution=execution
    )
    if ref_hidden is not None:
        # The same targets as the policy, so that the same chunks give policy == reference bit for bit.
        head = lm_head if ref_lm_head is None else ref_lm_head
        with torch.no_grad():
            ref_logps = linear_logprob(
                ref_hidden, head, targets, ignore_index=ignore_index, execution=execution
            ).logps
    return _loss_of_tokens(objective, token, mask, ref_logps, nll_mask, token_weights, layout)


def dpo_loss_from_logps(
    token: LinearLogprobOutput,
    mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    nll_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    layout: PackedLayout | None = None,
    **loss_arguments: Any,
) -> DPOLossOutput:
    """The second half of ``fused_dpo_loss``, for per-token log-probabilities that are there already.

    Args:
        token: as ``linear_logprob`` returns it, ``(2P, T)`` or packed ``(N_all,)``. Of ``entropy``,
            ``mean_logit`` and ``is_top1``, one that is None gives no metric.
        mask: bool, the shape of ``token.logps``: the completion tokens. Every argument here is aligned
            with ``token.logps``, nothing is shifted: ``shift_labels(labels, ...) != ignore_index``.
        ref_logps: ``(2P,)`` sums or per token; None for losses without a reference.
        nll_mask: bool; its tokens of the chosen sequences are those of an NLL term. None: ``mask``.
        token_weights, layout: as in ``fused_dpo_loss``.
        loss_arguments: ``loss_type``, ``loss_weights``, ``beta``, ``margin``, ``soft_labels``,
            ``pair_weights``, ``num_pairs``, ``num_tokens`` and the losses' own options, as there.

    Returns, raises: as ``fused_dpo_loss``.
    """
    objective = build_objective(**loss_arguments)
    logps = token.logps
    _check_batch("token.logps", logps, layout)
    _check_tensor("mask", mask)
    _check_like("mask", mask, logps, (torch.bool,))
    _check_like("nll_mask", nll_mask, logps, (torch.bool,))
    _check_like("token_weights", token_weights, logps, FLOAT_DTYPES)
    _check_reference(logps, layout, None, None, ref_logps, token_weights)
    objective.check_batch(
        _num_pairs(logps, layout),
        logps.device,
        has_reference=ref_logps is not None,
        has_token_weights=token_weights is not None,
        has_nll_tokens=nll_mask is not None,
    )
    return _loss_of_tokens(objective, token, mask, ref_logps, nll_mask, token_weights, layout)


def shift_labels(labels: Tensor, *, layout: PackedLayout | None = None, ignore_index: int = -100) -> Tensor:
    """The token that each position predicts: ``labels`` moved left by one within each sequence.

    Args:
        labels: ``(B, T)``, or ``(N_all,)`` with a ``layout``; aligned with the input ids.

    Returns:
        The same shape; ``ignore_index`` at every sequence's last position.
    """
    return _next_token(labels, ignore_index, layout)


def _next_token(values: Tensor, fill: int, layout: PackedLayout | None) -> Tensor:
    """``values[t + 1]`` at t, and ``fill`` at every sequence's last position."""
    num_positions = values.shape[-1]
    following = F.pad(values, (0, 1), value=fill).narrow(-1, 1, num_positions)
    if layout is None:
        return following
    # An empty sequence starts where the next one does, so starts may repeat and may equal N_all.
    is_start = values.new_zeros(num_positions + 1, dtype=torch.bool)
    is_start.index_fill_(0, layout.cu_seqlens.long(), True)
    return following.masked_fill(is_start.narrow(0, 1, num_positions), fill)


def _targets(
    labels: Tensor, nll_labels: Tensor | None, layout: PackedLayout | None, shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(targets, mask, nll_mask)``: what each state predicts, and which of it the losses look at."""
    if shift:
        labels = shift_labels(labels, layout=layout, ignore_index=ignore_index)
    mask = labels != ignore_index
    if nll_labels is None:
        return labels, mask, None
    if shift:
        nll_labels = shift_labels(nll_labels, layout=layout, ignore_index=ignore_index)
    position = torch.arange(len(labels), device=labels.device)
    num_pairs = _num_pairs(labels, layout)
    if layout is None:
        is_chosen = (position < num_pairs).unsqueeze(1)
    else:
        is_chosen = position < layout.cu_seqlens.narrow(0, num_pairs, 1)
    nll_mask = (nll_labels != ignore_index) & is_chosen
    return labels.where(mask, nll_labels.where(nll_mask, ignore_index)), mask, nll_mask


def _loss_of_tokens(
    objective: Objective,
    token: LinearLogprobOutput,
    mask: Tensor,
    ref_logps: Tensor | None,
    nll_mask: Tensor | None,
    token_weights: Tensor | None,
    layout: PackedLayout | None,
) -> DPOLossOutput:
    """Per token -> per answer -> loss, rewards and metrics."""
    cu_seqlens = None if layout is None else layout.cu_seqlens
    num_pairs = _num_pairs(mask, layout)

    def answers(values: Tensor, where: Tensor = mask) -> Tensor:  # (2, P): chosen, rejected
        return sequence_sums(values, where, cu_seqlens).view(2, num_pairs)

    def weighted(values: Tensor) -> Tensor:
        return values if token_weights is None else values * token_weights

    def lengths(where: Tensor) -> Tensor:
        return answers(where.to(token.logps.dtype), where)

    chosen, rejected = answers(weighted(token.logps))
    chosen_tokens, rejected_tokens = lengths(mask)
    pair = PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)
    if ref_logps is not None:
        ref_logps = ref_logps.detach().to(chosen.dtype)
        is_sums = token_weights is None and ref_logps.shape == (2 * num_pairs,)
        ref_chosen, ref_rejected = ref_logps.view(2, num_pairs) if is_sums else answers(weighted(ref_logps))
        pair = replace(pair, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if objective.uses_nll and not (nll_mask is None and token_weights is None):
        where = mask if nll_mask is None else nll_mask
        (log_likelihood, _), (nll_tokens, _) = answers(token.logps, where), lengths(where)
        pair = replace(pair, nll_sum=-log_likelihood, nll_tokens=nll_tokens)

    rewards = objective.rewards(pair)
    statistics = {name: getattr(token, name) for name in METRIC_STATISTICS}
    return DPOLossOutput(
        loss=objective.loss(pair),
        chosen_logps=chosen.detach(),
        rejected_logps=rejected.detach(),
        ref_chosen_logps=pair.ref_chosen,
        ref_rejected_logps=pair.ref_rejected,
        chosen_rewards=rewards[0],
        rejected_rewards=rewards[1],
        metrics=pair_metrics(pair, *rewards) | token_metrics(pair, answers, **statistics),
    )


def _num_pairs(tokens: Tensor, layout: PackedLayout | None) -> int:
    return (len(tokens) if layout is None else len(layout.cu_seqlens) - 1) // 2


def _check_batch(name: str, tokens: Tensor, layout: object) -> None:
    """The rank of the tensor that sets the batch's shape, its layout, and an even number of sequences."""
    _check_tensor(name, tokens)
    if layout is None:
        if tokens.dim() != 2 or len(tokens) % 2:
            raise fail(name, f"shape {tuple(tokens.shape)}", "(2P, T), chosen rows first, or a layout")
        return
    if not isinstance(layout, PackedLayout):
        wanted = "None or a PackedLayout; others are not supported by this version"
        raise fail("layout", type(layout).__name__, wanted)
    if tokens.dim() != 1:
        raise fail(name, f"shape {tuple(tokens.shape)}", "(N_all,) with a PackedLayout")
    _check_tensor("layout.cu_seqlens", layout.cu_seqlens)
    check_cu_seqlens(layout.cu_seqlens, layout.lengths, tokens)
    if len(layout.cu_seqlens) % 2 == 0:
        raise fail("layout.cu_seqlens", f"{len(layout.cu_seqlens)} bounds", "2P + 1 of them")


def _check_reference(
    tokens: Tensor,
    layout: PackedLayout | None,
    ref_hidden: Tensor | None,
    ref_lm_head: object,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    """At most one source of reference log-probabilities, in a shape that fits."""
    shape = tuple(tokens.shape)
    if ref_lm_head is not None and ref_hidden is None:
        raise fail("ref_lm_head", "a head without ref_hidden", "ref_hidden as well")
    if ref_hidden is not None:
        _check_tensor("ref_hidden", ref_hidden)
        if ref_logps is not None:
            raise fail("ref_logps", "a value together with ref_hidden", "one of the two")
        if tuple(ref_hidden.shape[:-1]) != shape:
            raise fail("ref_hidden", f"shape {tuple(ref_hidden.shape)}", f"(*{shape}, H), as hidden")
    if token_weights is not None:
        _check_like("ref_logps (with token_weights)", ref_logps, tokens, FLOAT_DTYPES)
    else:
        _check_like("ref_logps", ref_logps, tokens, FLOAT_DTYPES, (2 * _num_pairs(tokens, layout),))


def _check_like(
    name: str,
    value: Tensor | None,
    tokens: Tensor,
    dtypes: tuple[torch.dtype, ...],
    other_shape: tuple[int, ...] | None = None,
) -> None:
    """Unless None, ``value`` has the shape of ``tokens`` (or the other), its device, and a listed dtype."""
    if value is None:
        return
    _check_tensor(name, value)
    shapes = [tuple(tokens.shape)] if other_shape is None else [other_shape, tuple(tokens.shape)]
    if tuple(value.shape) not in shapes:
        raise fail(name, f"shape {tuple(value.shape)}", " or ".join(map(str, shapes)))
    if value.dtype not in dtypes:
        raise fail(name, value.dtype, " or ".join(map(str, dtypes)))
    if value.device != tokens.device:
        raise fail(name, value.device, f"{tokens.device}, the device of the batch")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor")
