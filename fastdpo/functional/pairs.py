"""``fused_dpo_loss`` and ``dpo_loss_from_logps``: the losses of chosen and rejected answers.

Sequences 0..P-1 are the chosen answers and P..2P-1 the rejected ones, padded ``(2P, T)``, packed ``(N_all,)``
with a ``PackedLayout``, or token by token with a ``TokenLayout``. Log-probabilities are fp32 (fp64 for fp64
inputs), in nats. ``path.py`` is how they get there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional.kinds import check_pairs
from fastdpo.functional.outputs import METRIC_STATISTICS
from fastdpo.functional.path import Data, loss_of_logps, loss_of_states
from fastdpo.functional.tokens import shift_labels
from fastdpo.losses.build import build_objective
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.reference_combination import ReferenceCombination
from fastdpo.types import DPOLossOutput, Execution, LinearLogprobOutput, LMHead, PackedLayout, TokenLayout

__all__ = ["METRIC_STATISTICS", "dpo_loss_from_logps", "fused_dpo_loss", "shift_labels"]


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
    chosen_is_reference: PerPair | None = None,
    token_weights: Tensor | None = None,
    nll_labels: Tensor | None = None,
    num_pairs: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    layout: PackedLayout | TokenLayout | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    sequence_group: Any = None,
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
        chosen_is_reference: 1 where the reference gave the chosen answer, 0 where the rejected one (``xpo``).
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
        sequence_group: a process group over which the sequences are split (sequence or context parallelism):
            each rank has all of them, and its own positions of each. Labels are shifted over the whole
            sequence before it is split (``shift=False``). Sums and lengths are added up over the ranks before
            the loss, which is the same on all; gradients are this rank's share, whose sum over the ranks is
            that of the whole. Mode ``pairs`` runs as ``cache``.
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
        "chosen_is_reference": chosen_is_reference,
        "num_pairs": num_pairs, "num_tokens": num_tokens,
        **loss_options,
    }  # fmt: skip
    objective = build_objective(**loss_arguments)
    check_pairs(objective)
    beside = (ref_logps, ref_combination, token_weights, nll_labels)
    data = Data(objective, loss_arguments, *beside, layout=layout, sequence_group=sequence_group)
    how = (shift, ignore_index, execution)
    return loss_of_states(hidden, lm_head, labels, data, ref_hidden, ref_lm_head, None, *how).of_pairs()


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
            ``chosen_win_rate``, ``rejected_win_rate``, ``chosen_is_reference``, ``pair_weights``,
            ``num_pairs``, ``num_tokens`` and the losses' own options, as there.

    Returns, raises: as ``fused_dpo_loss``.
    """
    objective = build_objective(**loss_arguments)
    check_pairs(objective)
    beside = (ref_logps, ref_combination, token_weights, nll_mask)
    data = Data(objective, loss_arguments, *beside, layout=layout)
    return loss_of_logps(token, mask, data, {}).of_pairs()
