"""``build_objective``: checks everything a caller says about the loss, and binds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastdpo.losses.inputs import PerPair
from fastdpo.losses.objective import LossTerm, Objective
from fastdpo.losses.registry import NLL_WEIGHT, PER_PAIR, RANGES, WIN_RATES, LossSpec, find_loss


def build_objective(
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    *,
    beta: PerPair | None = None,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    reward_gap: PerPair | None = None,
    chosen_win_rate: PerPair | None = None,
    rejected_win_rate: PerPair | None = None,
    chosen_is_reference: PerPair | None = None,
    pair_weights: PerPair | None = None,
    num_pairs: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    **options: Any,
) -> Objective:
    """Check what a caller says about the loss and bind it; needs no batch, so mistakes show at once.

    Args:
        loss_type: a name in ``LOSSES``, or several whose weighted sum is the loss; ``name@preset`` is one
            with the defaults of one of its presets.
        loss_weights: one number per name; 1.0 each by default.
        beta: positive, a number or ``(P,)``; goes to every named loss that has one and scales the
            rewards. None: each loss's own default.
        margin, soft_labels: numbers or ``(P,)``; every named loss that compares two answers must take them.
        reward_gap: likewise, for losses that regress on it: the chosen answer's reward less the rejected
        one's. chosen_win_rate, rejected_win_rate: likewise, both or neither: the probability in [0, 1] that
        the
            answer beats another sample of the policy (``sppo``).
        chosen_is_reference: likewise, 1 where the reference gave the chosen answer, else 0 (``xpo``).
        pair_weights: a number or ``(P,)``, at least 0; multiplies the pair's share of every named loss.
        num_pairs, num_tokens: positive numbers or 0-d tensors to divide by. Where one is given, all that
            the named losses divide by must be.
        options: options of the named losses; one that several of them have goes to all of these.

    Raises:
        ValueError: an unknown loss or option, a value out of range or refused by a named loss.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if not names:
        raise ValueError("loss_type: got an empty list, wanted at least one name")
    specs = [find_loss(name) for name in names]
    weights = _check_weights(loss_weights, len(names))

    given = {
        "beta": beta, "margin": margin, "soft_labels": soft_labels, "reward_gap": reward_gap,
        "chosen_win_rate": chosen_win_rate, "rejected_win_rate": rejected_win_rate,
        "chosen_is_reference": chosen_is_reference, "pair_weights": pair_weights,
    }  # fmt: skip
    per_pair = {name: _check_per_pair(name, value) for name, value in given.items() if value is not None}
    for name in PER_PAIR[1:]:  # a beta is also that of the rewards
        refusing = [spec.name for spec in specs if name not in spec.per_pair and not spec.is_nll]
        if name in per_pair and (refusing or all(spec.is_nll for spec in specs)):
            raise ValueError(f"{name}: got a value, wanted None: {', '.join(refusing or names)} takes none")
        needing = [spec.name for spec in specs if name in spec.needs]
        if needing and name not in per_pair:
            raise ValueError(f"{name}: got None, wanted a number or (P,) for {', '.join(needing)}")

    _check_win_rates(per_pair)
    _check_named(specs, options)

    objective = Objective(
        terms=tuple(
            term
            for spec, weight in zip(specs, weights, strict=True)
            for term in _terms(spec, weight, options, per_pair)
        ),
        per_pair=per_pair,
        num_pairs=_check_count("num_pairs", num_pairs),
        num_tokens=_check_count("num_tokens", num_tokens),
    )
    _check_counts(objective.terms, num_pairs, num_tokens)
    return objective


def _check_win_rates(per_pair: dict[str, PerPair]) -> None:
    """Both or neither, and no other word on which answer is the better one."""
    given = [name for name in WIN_RATES if name in per_pair]
    if len(given) == 1:
        (missing,) = set(WIN_RATES) - set(given)
        raise ValueError(f"{missing}: got None beside {given[0]}, wanted both or neither")
    if given and "soft_labels" in per_pair:
        raise ValueError("soft_labels: got a value together with win rates, wanted one of the two")


def _check_counts(
    terms: tuple[LossTerm, ...], num_pairs: float | Tensor | None, num_tokens: float | Tensor | None
) -> None:
    """Where one count is given, each that a loss divides by must be."""
    if num_pairs is None and num_tokens is None:
        return
    scopes = {term.spec.scope for term in terms}
    for name, value, is_needed in (
        ("num_pairs", num_pairs, bool(scopes - {"token"})),
        ("num_tokens", num_tokens, "token" in scopes),
    ):
        if is_needed and value is None:
            names = ", ".join(dict.fromkeys(term.spec.name for term in terms))
            raise ValueError(f"{name}: got None, wanted a count: {names} divides by it")


def _check_named(specs: list[LossSpec], options: dict[str, Any]) -> None:
    """Raise ValueError unless the losses take the same batch, and some of them each option."""
    names = ", ".join(spec.name for spec in specs)
    classes = {spec.inputs.__name__: spec for spec in specs}
    if len(classes) > 1:
        got = ", ".join(f"{spec.name} of {name}" for name, spec in classes.items())
        raise ValueError(f"loss_type: got {got}, wanted losses of the same batch")

    known = {option.name for spec in specs for option in spec.options}
    for name in options:
        if name not in known:
            wanted = f"one of {', '.join(sorted(known))}" if known else "none"
            raise ValueError(f"{name}: got an option that {names} does not have, wanted {wanted}")


def _terms(
    spec: LossSpec, weight: float, options: dict[str, Any], per_pair: dict[str, PerPair]
) -> list[LossTerm]:
    """A named loss, and its NLL term where it has one whose weight is not 0."""
    arguments = _arguments(spec, options, per_pair)
    nll_weight = arguments.pop(NLL_WEIGHT, spec.nll_weight) if spec.nll_weight is not None else 0.0
    terms = [LossTerm(spec, weight, arguments)]
    return [*terms, LossTerm(find_loss(spec.nll_term), weight * nll_weight, {})] if nll_weight else terms


def _arguments(spec: LossSpec, options: dict[str, Any], per_pair: dict[str, PerPair]) -> dict[str, Any]:
    """The keyword arguments of one loss out of what was given to all."""
    arguments: dict[str, Any] = dict(spec.preset)
    arguments |= {name: per_pair[name] for name in PER_PAIR if name in spec.per_pair & set(per_pair)}
    for option in spec.options:
        if option.name in options:
            arguments[option.name] = option.convert(options[option.name])
    return arguments


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if isinstance(weights, (str, int, float)) or len(weights) != count:
        raise ValueError(f"loss_weights: got {weights!r}, wanted a list of {count}, one per loss_type")
    for weight in weights:
        if not _is_number(weight) or not math.isfinite(weight):
            raise ValueError(f"loss_weights: got {weight!r}, wanted finite numbers")
    return [float(weight) for weight in weights]


def _check_per_pair(name: str, value: Any) -> PerPair:
    """Numbers are checked against their range; tensors, with their batch, where they can be read."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise ValueError(f"{name}: got {value.dtype}, wanted a floating-point tensor")
        return value
    if not _is_number(value):
        raise ValueError(f"{name}: got {value!r}, wanted a number or a (P,) tensor")
    if value not in RANGES[name]:
        raise ValueError(f"{name}: got {value!r}, wanted {RANGES[name]}")
    return float(value)


def _check_count(name: str, value: Any) -> float | Tensor | None:
    if value is None or (isinstance(value, Tensor) and value.dim() == 0):
        return value
    if not _is_number(value) or not 0 < value < math.inf:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name}: got {got}, wanted a positive number or a 0-d tensor")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
