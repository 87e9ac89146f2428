"""What each kind of loss wants to be told of a batch, and of which divergences it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.losses.batches import DivergencePairLogps, ListLogps, StepLogps, UnpairedLogps
from fastdpo.losses.distillation import aligndistil_coefficients
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.objective import Objective
from fastdpo.losses.registry import find_loss
from fastdpo.losses.token_batches import TokenDivergences, TokenLogps
from fastdpo.ops.checks import fail
from fastdpo.types import TeacherCombination

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


def takes_pairs(loss_type: str | Sequence[str]) -> bool:
    """Whether losses are of chosen and rejected answers alone, as ``fused_dpo_loss`` takes them.

    Raises:
        ValueError: an unknown loss.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    return all(find_loss(name).inputs is PairLogps for name in names)


def check_pairs(objective: Objective) -> None:
    """Raise ValueError unless losses are of chosen and rejected answers alone."""
    if objective.inputs is not PairLogps:
        names = loss_names(objective)
        wanted = f"losses of chosen and rejected answers: {names} takes {objective.inputs.__name__}"
        raise fail("loss_type", names, wanted)


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
