"""The losses of other data than pairs' sums: single answers, lists of candidates, steps, tokens of answers.

The same way as ``functional.py``: log-probabilities per token by the op, sums per row, the objective
(``preference_rows.py``). Losses that look at whole distributions (TDPO, AlignDistil) get both, divergences
and log-probabilities, from one op. What a row is depends on the losses named, which are of one kind;
``LOSSES[name].kind`` and ``.inputs`` say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional.checks import FLOAT_DTYPES, INT_DTYPES, check_like, check_tensor, reference_head
from fastdpo.functional.row_loss import (
    DATA,
    DIVERGENCES,
    DIVERGENT,
    RowSums,
    check_divergent_batch,
    check_kind,
    divergence_outputs,
    divergence_settings,
    loss_names,
    needs_token_logps,
    rows_output,
    teacher_combination,
)
from fastdpo.functional.tokens import next_token, shift_labels
from fastdpo.losses.aggregate import check_cu_seqlens
from fastdpo.losses.build import build_objective
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.objective import Objective
from fastdpo.losses.token_batches import TokenDivergences, TokenLogps
from fastdpo.ops.checks import as_head, fail
from fastdpo.ops.linear_logprob import linear_logprob
from fastdpo.ops.token_divergence import token_divergence
from fastdpo.types import Execution, LinearLogprobOutput, LMHead, PackedLayout, PreferenceLossOutput


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
    teacher_hidden: Tensor | None = None,
    teacher_lm_head: LMHead | Tensor | torch.nn.Linear | None = None,
    vocab_size: int | None = None,
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
            sequences: ``(B, T, H)`` and ``(B, T)``, or packed. For losses with divergences ``execution`` is
            what ``token_divergence`` takes, which has backends of its own, no ``lean`` and no bf16 logits.
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
            knows them: then nothing waits for the device.
        segment_ids: the labels' shape, aligned with them: the step that a token belongs to, or the item of
            a list that is ranked in one answer (``group_ids`` and ``scores`` are per item then); -1 for none.
        num_segments: their number; None: the largest id and one, which waits for the device.
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
        loss_options: options of the named losses; see ``LOSSES``.

    Returns:
        ``PreferenceLossOutput``; ``metrics`` has ``num_tokens`` and TRL's names for unpaired answers; for
        lists ``rewards/best``, ``rewards/others``, ``rewards/margins`` and ``rewards/accuracies``; for pairs
        with divergences TRL's names and ``kl/chosen``, ``kl/rejected``; for others ``logps``, the rows' mean,
        and with a teacher ``kl/teacher`` and ``teachers/l1_distance`` (``losses.metrics``). Of unpaired
        answers without a desirable one ``rewards/chosen``, ``logps/chosen`` and ``rewards/margins`` are NaN,
        without an undesirable one ``rewards/rejected``, ``logps/rejected`` and the margins: there is no mean
        of none. To average such batches, weigh each side by its number of answers (the loop does); the loss
        is of what there is.

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
    check_kind(objective, extras, made_later=DIVERGENCES)
    check_tensor("hidden", hidden)
    cu_seqlens = _check_tokens("labels", labels, layout, INT_DTYPES)
    _check_reference_states(hidden, ref_hidden, ref_lm_head, ref_logps)
    _check_teachers(objective, hidden, ref_hidden, teacher_hidden, teacher_lm_head, vocab_size)
    if objective.inputs is TokenDivergences and ref_logps is not None:
        raise fail("ref_logps", f"a value that {loss_names(objective)} does not use", "None")
    sums = _row_sums(objective, labels, cu_seqlens, token_weights, extras, ref_logps)

    targets = shift_labels(labels, layout=layout, ignore_index=ignore_index) if shift else labels
    if shift and token_weights is not None:
        token_weights = next_token(token_weights, 0, layout)
    if shift and segment_ids is not None:
        extras["segment_ids"] = next_token(segment_ids, -1, layout)
    scored: dict[str, Any] = {"ignore_index": ignore_index, "execution": execution}
    head = as_head(lm_head, takes_adapter=True)
    ref_head = reference_head(head, ref_hidden, ref_lm_head)
    if objective.inputs in DIVERGENT:
        teachers: Any = [(ref_hidden, ref_head)]
        if teacher_hidden is not None:
            teacher = (
                teacher_hidden,
                reference_head(head, teacher_hidden, teacher_lm_head, "teacher_lm_head"),
            )
            teachers = [teacher] if ref_hidden is None else [teacher, *teachers]
        token, ref_logps, made = _divergences(
            objective, hidden, head, targets, *teachers, vocab_size=vocab_size, **scored
        )
        extras |= made
    else:
        token = linear_logprob(hidden, head, targets, **scored)
        if ref_hidden is not None:
            with torch.no_grad():
                ref_logps = linear_logprob(ref_hidden, ref_head, targets, **scored).logps
    segments: Any = extras.get("segment_ids")
    sums = RowSums(targets != ignore_index, cu_seqlens, token_weights, segments, num_segments)
    return rows_output(objective, token, sums, ref_logps, extras)


def _divergences(
    objective: Objective,
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    first: tuple[Tensor, LMHead],
    second: tuple[Tensor, LMHead] | None = None,
    **arguments: Any,
) -> tuple[LinearLogprobOutput, Tensor | None, dict[str, Tensor]]:
    """Log-probabilities of policy and reference (of pairs), and divergences from one teacher or of two."""
    # Under the caller's names: the op has others for the teachers.
    names_of = ("teacher", "ref") if objective.inputs is TokenDivergences else ("ref",)
    given = [first] if second is None else [first, second]
    for name, (states, its_head) in zip(names_of, given, strict=False):
        (rows, width), wanted = its_head.weight.shape, head.weight.shape[0]
        if arguments["vocab_size"] is None and rows != wanted:
            message = f"{wanted}, as lm_head has it, or vocab_size"
            raise fail(f"{name}_lm_head", f"a vocabulary of {rows}", message)
        if states.shape[-1] != width:
            raise fail(f"{name}_hidden", f"shape {tuple(states.shape)}", f"(..., {width}), as its head")
        check_like(f"{name}_hidden", states, hidden, FLOAT_DTYPES, tuple(states.shape))
    if second is not None:
        arguments |= {"second_hidden": second[0], "second_lm_head": second[1]}
        arguments["combination"] = teacher_combination(objective)
    of_tokens = needs_token_logps(objective)
    names = divergence_outputs(objective)
    found = token_divergence(
        hidden,
        head,
        first[0],
        targets,
        ref_lm_head=first[1],
        outputs=(*names, "logps", *(("ref_logps",) if of_tokens else ())),
        logps_requires_grad=of_tokens,  # else they are there to be looked at
        **divergence_settings(objective),
        **arguments,
    )
    assert found.logps is not None
    made = {name: getattr(found, name) for name in names}
    return LinearLogprobOutput(found.logps), found.ref_logps, made


def preference_loss_from_logps(
    token: LinearLogprobOutput,
    mask: Tensor,
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
    layout: PackedLayout | None = None,
    **arguments: Any,
) -> PreferenceLossOutput:
    """The second half of ``fused_preference_loss``, for per-token log-probabilities that are there already.

    Args:
        token: as ``linear_logprob`` returns it, ``(B, T)`` or packed ``(N_all,)``. Where it has ``entropy``,
            there is a metric of that name, the mean over all tokens.
        mask: bool, the shape of ``token.logps``: the answers' tokens. Every argument here is aligned with
            ``token.logps``, nothing is shifted: ``shift_labels(labels, ...) != ignore_index``.
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
    divergences = {
        "forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "l1_distance": l1_distance,
    }  # fmt: skip
    given |= divergences
    extras = {name: value for name, value in given.items() if value is not None}
    objective = build_objective(
        loss_type, loss_weights, beta=beta, pair_weights=row_weights, num_pairs=num_rows, **arguments
    )
    check_kind(objective, extras)
    cu_seqlens = _check_tokens("token.logps", token.logps, layout, FLOAT_DTYPES)
    check_like("mask", check_tensor("mask", mask), token.logps, (torch.bool,))
    for name, value in divergences.items():
        check_like(name, value, token.logps, FLOAT_DTYPES)
    if objective.inputs is TokenDivergences and needs_token_logps(objective):
        check_tensor("ref_logps", ref_logps)  # the teacher's
    sums = _row_sums(objective, mask, cu_seqlens, token_weights, extras, ref_logps)
    return rows_output(objective, token, sums, ref_logps, extras)


def _row_sums(
    objective: Objective,
    like: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    extras: dict[str, Any],
    ref_logps: Tensor | None,
) -> RowSums:
    """How tokens become rows, once per-token arguments have been checked against ``like``."""
    check_like("token_weights", token_weights, like, FLOAT_DTYPES)
    check_like("segment_ids", extras.get("segment_ids"), like, INT_DTYPES)
    sums = RowSums(like, cu_seqlens, token_weights, extras.get("segment_ids"), extras.get("num_segments"))
    num_sequences = len(like) if cu_seqlens is None else len(cu_seqlens) - 1
    if objective.inputs in DIVERGENT:
        # Without pairs nothing is a ratio to the reference.
        unused = {} if needs_token_logps(objective) else {"ref_logps": ref_logps}
        check_divergent_batch(objective, num_sequences, token_weights=token_weights, **unused)
    if ref_logps is not None:
        needs_tokens = token_weights is not None or objective.inputs in (TokenLogps, TokenDivergences)
        is_sums = isinstance(ref_logps, Tensor) and ref_logps.shape != like.shape and not needs_tokens
        check_like("ref_logps", ref_logps, like, FLOAT_DTYPES, (sums.num_rows,) if is_sums else None)
    return sums


def _check_tokens(name: str, value: object, layout: object, dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
    """The tensor that sets the batch's shape; returns the layout's ``cu_seqlens``."""
    tokens = check_tensor(name, value)
    check_like(name, tokens, tokens, dtypes)
    if layout is None:
        if tokens.dim() != 2:
            raise fail(name, f"shape {tuple(tokens.shape)}", "(B, T), or a layout")
        return None
    if not isinstance(layout, PackedLayout):
        raise fail("layout", type(layout).__name__, "None or a PackedLayout")
    if tokens.dim() != 1:
        raise fail(name, f"shape {tuple(tokens.shape)}", "(N_all,) with a PackedLayout")
    check_tensor("layout.cu_seqlens", layout.cu_seqlens)
    check_cu_seqlens(layout.cu_seqlens, layout.lengths, tokens)
    return layout.cu_seqlens


def _check_reference_states(
    hidden: Tensor, ref_hidden: Tensor | None, ref_lm_head: object, ref_logps: Tensor | None
) -> None:
    """At most one source of reference log-probabilities, in a shape that fits."""
    if ref_lm_head is not None and ref_hidden is None:
        raise fail("ref_lm_head", "a head without ref_hidden", "ref_hidden as well")
    if ref_hidden is None:
        return
    if ref_logps is not None:
        raise fail("ref_logps", "a value together with ref_hidden", "one of the two")
    _check_positions("ref_hidden", ref_hidden, hidden)


def _check_positions(name: str, states: object, hidden: Tensor) -> None:
    """Hidden states, of any width, for the positions of ``hidden``."""
    shape = check_tensor(name, states).shape
    if shape[:-1] != hidden.shape[:-1]:
        raise fail(name, f"shape {tuple(shape)}", f"(*{tuple(hidden.shape[:-1])}, H), as hidden")


def _check_teachers(
    objective: Objective,
    hidden: Tensor,
    ref_hidden: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_lm_head: object,
    vocab_size: int | None,
) -> None:
    """The hidden states that divergences need are there, and none that nothing uses."""
    names, distils = loss_names(objective), objective.inputs is TokenDivergences
    if teacher_lm_head is not None and teacher_hidden is None:
        raise fail("teacher_lm_head", "a head without teacher_hidden", "teacher_hidden as well")
    if vocab_size is not None and objective.inputs not in DIVERGENT:
        raise fail("vocab_size", f"a value that {names} does not use", "None")
    if teacher_hidden is None and distils:
        raise fail("teacher_hidden", "None", f"the hidden states of the model that {names} distils")
    if teacher_hidden is not None and not distils:
        raise fail("teacher_hidden", f"a value that {names} does not use", "None")
    if teacher_hidden is not None:
        _check_positions("teacher_hidden", teacher_hidden, hidden)
    if objective.inputs in DIVERGENT and objective.uses_reference and ref_hidden is None:
        wanted = f"the reference's hidden states for {names}: it needs whole distributions"
        raise fail("ref_hidden", "None", wanted)
    if distils and not objective.uses_reference and ref_hidden is not None:
        raise fail("ref_hidden", f"a value that {names} does not use", "None")
