"""Losses with divergences: these and the log-probabilities from one op, in the order of the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastdpo.functional.checks import FLOAT_DTYPES, check_like, reference_head
from fastdpo.functional.kinds import (
    divergence_outputs,
    divergence_settings,
    needs_token_logps,
    teacher_combination,
)
from fastdpo.functional.tokens import RowTokens
from fastdpo.losses.objective import Objective
from fastdpo.ops.checks import fail
from fastdpo.ops.token_divergence import token_divergence
from fastdpo.types import LinearLogprobOutput, LMHead, TokenLayout


class Teachers(NamedTuple):
    """What losses with divergences are told beside the reference; as ``fused_preference_loss`` names it."""

    hidden: Tensor | None = None
    lm_head: Any = None
    vocab_size: int | None = None


def measure(
    objective: Objective,
    hidden: Tensor,
    head: LMHead,
    targets: Tensor | TokenLayout,
    tokens: RowTokens,
    reference: tuple[Tensor, LMHead] | None,
    teachers: Teachers,
    **arguments: Any,
) -> tuple[LinearLogprobOutput, Tensor | None, dict[str, Tensor]]:
    """Log-probabilities of policy and reference (of pairs), and divergences from one teacher or of two.

    Args:
        targets: aligned with ``hidden``, or the layout; ``tokens`` are those of them that count.
        arguments: of ``token_divergence``.
    """
    # Under the caller's names: the op has others for the teachers.
    given = [] if reference is None else [("ref", *reference)]
    if teachers.hidden is not None:
        its_head = reference_head(head, teachers.hidden, teachers.lm_head, "teacher_lm_head")
        given.insert(0, ("teacher", teachers.hidden, its_head))
    for name, states, its_head in given:
        (rows, width), wanted = its_head.weight.shape, head.weight.shape[0]
        if teachers.vocab_size is None and rows != wanted:
            message = f"{wanted}, as lm_head has it, or vocab_size"
            raise fail(f"{name}_lm_head", f"a vocabulary of {rows}", message)
        if states.shape[-1] != width:
            raise fail(f"{name}_hidden", f"shape {tuple(states.shape)}", f"(..., {width}), as its head")
        check_like(f"{name}_hidden", states, hidden, FLOAT_DTYPES, tuple(states.shape))
    (_, ref_hidden, ref_lm_head), *others = given
    for _, second_hidden, second_lm_head in others:
        arguments |= {"second_hidden": second_hidden, "second_lm_head": second_lm_head}
        arguments["combination"] = teacher_combination(objective)
    if not isinstance(targets, TokenLayout):
        arguments["token_index"] = tokens.positions
    of_tokens, names = needs_token_logps(objective), divergence_outputs(objective)
    found = token_divergence(
        hidden,
        head,
        ref_hidden,
        targets,
        ref_lm_head=ref_lm_head,
        outputs=(*names, "logps", *(("ref_logps",) if of_tokens else ())),
        logps_requires_grad=of_tokens,  # else they are there to be looked at
        vocab_size=teachers.vocab_size,
        **divergence_settings(objective),
        **arguments,
    )
    picked = {name: tokens.pick(v) for name, v in found._asdict().items() if v is not None}
    own = LinearLogprobOutput(picked["logps"])
    return own, picked.get("ref_logps"), {name: picked[name] for name in names}
