"""The losses of other data than pairs' sums: single answers, lists of candidates, steps, tokens of answers.

What a row is depends on the losses named, which are of one kind; ``LOSSES[name].kind`` and ``.inputs`` say
which. Losses that look at whole distributions (TDPO, AlignDistil) get divergences and log-probabilities from
one op. ``path.py`` is how all of them get from tokens to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional.checks import check_teachers, check_tensor
from fastdpo.functional.divergences import Teachers
from fastdpo.functional.kinds import DATA, DIVERGENCES, DIVERGENT, check_kind, needs_token_logps
from fastdpo.functional.path import Data, loss_of_logps, loss_of_states
from fastdpo.losses.build import build_objective
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.token_batches import TokenDivergences
from fastdpo.types import (
    Execution,
    LinearLogprobOutput,
    LMHead,
    PackedLayout,
    PreferenceLossOutput,
    TokenLayout,
)


def fused_preference_loss(
    hidden: Tensor,
    lm_head: LMHead | Tensor | torch.nn.Linear,
    labels: Tensor | None,
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
    teacher_hidden: Tensor | None = None,
    teacher_lm_head: LMHead | Tensor | torch.nn.Linear | None = None,
    vocab_size: int | None = None,
    beta: PerPair | None = None,
    row_weights: PerPair | None = None,
    token_weights: Tensor | None = None,
    num_rows: float | Tensor | None = None,
    layout: PackedLayout | TokenLayout | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    sequence_group: Any = None,
    execution: Execution | None = None,
    **loss_options: Any,
) -> PreferenceLossOutput:
    """A loss of B answers that do not come in pairs, or whose tokens count (TDPO), without their logits.

    Args:
        hidden, lm_head, labels, layout, shift, ignore_index, execution: as in ``fused_dpo_loss``, for B
            sequences: ``(B, T, H)`` and ``(B, T)``, packed, or a ``TokenLayout`` with ids 0..B-1. For losses
            with divergences ``execution`` is what ``token_divergence`` takes, which has backends of its own,
            no ``lean`` and no bf16 logits.
        loss_type, loss_weights: names in ``LOSSES`` of one kind other than plain pairs; their weighted sum.
            For pairs with divergences (``tdpo1``, ``tdpo2``) B = 2P, chosen answers first; the forward KL
            from the reference to the policy is made here, of ``ref_hidden``, together with the
            log-probabilities of both: in 4 products forward and backward, the head trained or not. For
            ``aligndistil`` the reverse KL to a teacher made of two is: in 4 products, the head trained in 5
            while ``cache_mib`` holds D. ``gkd`` and ``minillm`` distil one teacher.
        is_desirable: ``(B,)`` bool, for unpaired losses (KTO, BCO).
        kl: ``()``, KTO's reference point, in nats; ``reward_shift``: ``()``, BCO's running mean.
        group_ids: ``(B,)`` int64, which list a candidate belongs to, for listwise losses.
        scores: ``(B,)``, higher is better, for the listwise losses that use them.
        num_groups, max_candidates: the number of lists and of the longest one's candidates, where the caller
            knows them: then nothing but mode ``pairs`` waits for the device to tell of lists.
        segment_ids: the labels' shape, aligned with them: the step that a token belongs to, or the item of
            a list that is ranked in one answer (``group_ids`` and ``scores`` are per item then); -1 for none.
        num_segments: their number; None: the largest id and one, which waits for the device. Tokens of no
            segment are not scored.
        advantages: ``(num_segments,)``, of every step.
        win_rates: ``(B,)`` in [0, 1], for token-level losses that use them.
        ref_hidden, ref_lm_head: as in ``fused_dpo_loss``.
        ref_logps: instead of them, ``(B,)`` sums (of segments where there are ``segment_ids``), or per token
            as ``linear_logprob`` returned them (the only form with ``token_weights`` or a token-level loss).
            TDPO and AlignDistil need ``ref_hidden``.
        teacher_hidden, teacher_lm_head: for losses that distil a teacher (``aligndistil``): what the DPO
            model sees at the same positions, and its head (None: ``lm_head``). The other of AlignDistil's
            two is ``ref_hidden``: the reference's, or those of a model trained on swapped pairs.
        vocab_size: of all models with divergences, where their heads are padded to different sizes; see
            ``token_divergence``.
        beta: positive, a number or one per row. None: each loss's own default.
        row_weights: at least 0, a number or one per row (a list is one row, and so is a pair).
        token_weights: the labels' shape, aligned with them; weigh the log-probabilities of both models.
        num_rows: what to divide by instead of the batch's own number of rows.
        sequence_group: as in ``fused_dpo_loss``; not for losses that look into an answer.
        loss_options: options of the named losses; see ``LOSSES``.

    Returns:
        ``PreferenceLossOutput``; ``metrics`` has ``num_tokens``, ``entropy`` (but with divergences) and TRL's
        names for unpaired answers; for lists ``rewards/best``, ``rewards/others``, ``rewards/margins`` and
        ``rewards/accuracies``; for pairs with divergences TRL's names and ``kl/chosen``, ``kl/rejected``; for
        others ``logps``, the rows' mean, and with a teacher ``kl/teacher`` and ``teachers/l1_distance``
        (``losses.metrics``). Of unpaired answers without a desirable one ``rewards/chosen``, ``logps/chosen``
        and ``rewards/margins`` are NaN, without an undesirable one ``rewards/rejected``, ``logps/rejected``
        and the margins: there is no mean of none. To average such batches, weigh each side by its number of
        answers (the loop does); the loss is of what there is.

    Raises:
        ValueError: a loss of pairs, a wrong shape, dtype, device or value, data that a loss needs and lacks,
            or is given and does not use. Values of tensors are looked at on the CPU only.
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
    loss_arguments = {
        "loss_type": loss_type, "loss_weights": loss_weights, "beta": beta, "pair_weights": row_weights,
        "num_pairs": num_rows, **loss_options,
    }  # fmt: skip
    objective = build_objective(**loss_arguments)
    extras = {
        "is_desirable": is_desirable, "kl": kl, "reward_shift": reward_shift, "group_ids": group_ids,
        "scores": scores, "num_groups": num_groups, "max_candidates": max_candidates,
        "segment_ids": segment_ids, "num_segments": num_segments, "advantages": advantages,
        "win_rates": win_rates,
    }  # fmt: skip
    extras = {name: value for name, value in extras.items() if value is not None}
    check_kind(objective, extras, made_later=DIVERGENCES)
    check_tensor("hidden", hidden)
    check_teachers(objective, hidden, ref_hidden, teacher_hidden, teacher_lm_head, vocab_size, ref_logps)
    data = Data(
        objective,
        loss_arguments,
        ref_logps,
        None,
        token_weights,
        extras=extras,
        layout=layout,
        sequence_group=sequence_group,
    )
    teachers = Teachers(teacher_hidden, teacher_lm_head, vocab_size)
    how = (teachers if objective.inputs in DIVERGENT else None, shift, ignore_index, execution)
    return loss_of_states(hidden, lm_head, labels, data, ref_hidden, ref_lm_head, *how).of_rows()


def preference_loss_from_logps(
    token: LinearLogprobOutput,
    mask: Tensor | None,
    *,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    ref_logps: Tensor | None = None,
    forward_kl: Tensor | None = None,
    reverse_kl: Tensor | None = None,
    jsd: Tensor | None = None,
    l1_distance: Tensor | None = None,
    beta: PerPair | None = None,
    row_weights: PerPair | None = None,
    token_weights: Tensor | None = None,
    num_rows: float | Tensor | None = None,
    layout: PackedLayout | TokenLayout | None = None,
    **arguments: Any,
) -> PreferenceLossOutput:
    """The second half of ``fused_preference_loss``, for per-token log-probabilities that are there already.

    Args:
        token: as ``linear_logprob`` returns it, ``(B, T)``, packed ``(N_all,)``, or ``(N,)`` with a
            ``TokenLayout``. Where it has ``entropy``, there is a metric of that name, a mean over the tokens.
        mask: bool, the shape of ``token.logps``: the answers' tokens. Every argument here is aligned with
            ``token.logps``, nothing is shifted: ``shift_labels(labels, ...) != ignore_index``. None, for all
            of them, with a ``TokenLayout``.
        loss_type, loss_weights, beta, row_weights, token_weights, num_rows, layout: as there.
        ref_logps: ``(rows,)`` sums (a row is a segment where there are ``segment_ids``), or per token (the
            only form with ``token_weights`` and for token-level losses). What has both shapes is per token.
        forward_kl: per token, KL(reference || policy) over the vocabulary, for pairs with divergences
            (``tdpo1``, ``tdpo2``): ``token_divergence`` gives it, and both models' log-probabilities.
        reverse_kl, l1_distance: per token, KL(policy || teacher) and how far apart the two are that the
            teacher is made of (``aligndistil``): from ``token_divergence`` with the same ``beta``, ``beta2``
            and ``teacher_mode`` (``losses.distillation.aligndistil_coefficients``). For ``minillm``
            ``reverse_kl``, with the teacher's log-probabilities of the tokens as ``ref_logps``; for ``gkd``
            what its ``jsd_beta`` says: ``forward_kl``, ``reverse_kl``, or else ``jsd``, made with that.
        arguments: ``is_desirable``, ``kl``, ``reward_shift``, ``group_ids``, ``scores``, ``num_groups``,
            ``max_candidates``, ``segment_ids``, ``num_segments``, ``advantages``, ``win_rates`` as there, and
            the losses' own options.

    Returns, raises: as ``fused_preference_loss``.

    Example:
        >>> logps, mask = -torch.rand(4, 6), torch.ones(4, 6, dtype=torch.bool)
        >>> lists = {"loss_type": "sdpo", "group_ids": torch.tensor([0, 0, 1, 1])}
        >>> lists["scores"] = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> preference_loss_from_logps(LinearLogprobOutput(logps), mask, ref_logps=logps, **lists).loss
        tensor(0.6931)
    """
    given = {name: arguments.pop(name) for name in DATA if name in arguments}
    extras = {name: value for name, value in given.items() if value is not None}
    all_divergences = {
        "forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "l1_distance": l1_distance,
    }  # fmt: skip
    divergences = {name: value for name, value in all_divergences.items() if value is not None}
    loss_arguments = {
        "loss_type": loss_type, "loss_weights": loss_weights, "beta": beta, "pair_weights": row_weights,
        "num_pairs": num_rows, **arguments,
    }  # fmt: skip
    objective = build_objective(**loss_arguments)
    check_kind(objective, extras | divergences)
    if objective.inputs is TokenDivergences and needs_token_logps(objective):
        check_tensor("ref_logps", ref_logps)  # the teacher's
    data = Data(objective, loss_arguments, ref_logps, None, token_weights, extras=extras, layout=layout)
    return loss_of_logps(token, mask, data, divergences).of_rows()
