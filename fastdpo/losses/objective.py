"""Losses by name, with everything a caller says about them: checked once, then a function of a batch.

    L = sum_k weight_k * (1 / n_k) * sum_i w_i L_k(pair i)

with w the ``pair_weights`` and n_k the number of pairs, or of NLL tokens for a loss of scope
``token``: the batch's own, or ``num_pairs`` / ``num_tokens``, with which the losses of micro-batches
add up to the mean over all of them exactly. For losses of another kind, read row for pair: an answer, a
group, a sequence or a step. A loss with an NLL term of its own (``LossSpec.nll_weight``) is two terms
here, itself and its ``nll_term``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.losses.batches import DivergencePairLogps, ListLogps, UnpairedLogps
from fastdpo.losses.inputs import Batch, PairLogps, PerPair
from fastdpo.losses.ranges import check_range
from fastdpo.losses.registry import NLL_WEIGHT, PER_PAIR, RANGES, WIN_RATES, LossSpec, find_loss
from fastdpo.losses.stable import masked_sum, token_mean

DEFAULT_BETA = 0.1  # scales the reported rewards where no named loss has a beta


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One named loss, its weight, and the arguments it gets."""

    spec: LossSpec
    weight: float
    arguments: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Objective:
    """What ``build_objective`` makes; call ``loss`` and ``rewards`` with the batch's ``PairLogps``."""

    terms: tuple[LossTerm, ...]
    per_pair: dict[str, PerPair]  # those of PER_PAIR and pair_weights that are given
    num_pairs: float | Tensor | None
    num_tokens: float | Tensor | None

    @property
    def inputs(self) -> type:
        """The class of batch that the losses take: ``PairLogps``, or that of their kind."""
        return self.terms[0].spec.inputs

    @property
    def uses_reference(self) -> bool:
        """Whether any named loss needs reference log-probabilities."""
        return any(term.spec.uses_reference for term in self.terms)

    @property
    def compares_answers(self) -> bool:
        """Whether any named loss looks at both answers of a pair."""
        return any(not term.spec.is_nll for term in self.terms)

    @property
    def is_sum_over_pairs(self) -> bool:
        """Whether each pair's share of the loss depends on that pair alone, given the counts to divide by."""
        return self.inputs is PairLogps and all(term.spec.scope in ("pair", "token") for term in self.terms)

    @property
    def is_plain_sigmoid(self) -> bool:
        """Whether it is the DPO loss alone, with no option but label smoothing."""
        (first, *others) = self.terms
        is_sigmoid = first.spec.name == "sigmoid" and first.weight == 1 and not others
        return is_sigmoid and first.arguments.keys() <= {*PER_PAIR, "label_smoothing"}

    @property
    def uses_nll(self) -> bool:
        """Whether any named loss looks at NLL tokens."""
        return any(term.spec.is_nll for term in self.terms)

    def check_batch(
        self,
        num_pairs: int,
        device: torch.device,
        *,
        has_reference: bool,
        has_token_weights: bool = False,
        has_nll_tokens: bool = False,
    ) -> None:
        """Raise ValueError unless what comes with a batch is what the losses use, no less and no more.

        The values of tensors are looked at on the CPU only: elsewhere that would synchronise.
        """
        names = self._names()
        if self.inputs is not PairLogps:
            wanted = f"losses of chosen and rejected answers: {names} takes {self.inputs.__name__}"
            raise ValueError(f"loss_type: got {names}, wanted {wanted}")
        self._check_reference(has_reference)
        for given, used, name, wanted in (
            (has_token_weights, self.compares_answers, "token_weights", "none"),
            (has_nll_tokens, self.uses_nll, "nll_labels or nll_mask", "none (no NLL term)"),
        ):
            if given and not used:
                raise ValueError(f"{name}: got a value that {names} does not use, wanted {wanted}")
        self._check_per_pair(num_pairs, device)

    def check(self, batch: Batch) -> None:
        """Raise ValueError unless a batch of any kind is what the losses use, and is sound in itself.

        What has to be read to be checked, as a score that is NaN, is checked on the CPU only: elsewhere it
        would synchronise.
        """
        if not isinstance(batch, self.inputs):
            wanted = f"{self.inputs.__name__} for {self._names()}"
            raise ValueError(f"batch: got {type(batch).__name__}, wanted {wanted}")
        self._check_reference(batch.has_reference)
        needed = {name for term in self.terms for name in term.spec.needs}
        for name in batch.extras:
            is_given = getattr(batch, name) is not None
            if is_given != (name in needed):
                got, wanted = ("a value", "None") if is_given else ("None", "a value")
                raise ValueError(f"{name}: got {got}, wanted {wanted} for {self._names()}")
        for name in WIN_RATES:
            if getattr(batch, name, None) is not None and not self._takes(name):
                raise ValueError(f"{name}: got a value, wanted None for {self._names()}")
        batch.check()
        for term in self.terms:
            for name, legal in term.spec.ranges.items():
                check_range(f"{name} of {term.spec.name}", getattr(batch, name), legal)
        self._check_per_pair(batch.num_rows, batch.logps_like.device)

    def _takes(self, name: str) -> bool:
        return any(name in term.spec.per_pair for term in self.terms)

    def _names(self) -> str:
        return ", ".join(dict.fromkeys(term.spec.name for term in self.terms))

    def _check_reference(self, has_reference: bool) -> None:
        names = self._names()
        if self.uses_reference and not has_reference:
            wanted = f"ref_hidden or ref_logps for {names} (zeros for a uniform reference)"
            raise ValueError(f"ref_logps: got no reference, wanted {wanted}")
        if has_reference and not self.uses_reference:
            raise ValueError(f"ref_logps: got a value that {names} does not use, wanted no reference")

    def _check_per_pair(self, num_pairs: int, device: torch.device) -> None:
        for name, value in self.per_pair.items():
            if not isinstance(value, Tensor):
                continue
            if value.dim() > 0 and tuple(value.shape) != (num_pairs,):
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted a number or ({num_pairs},)")
            if value.device != device:
                raise ValueError(f"{name}: got {value.device}, wanted {device}, the device of the batch")
            check_range(name, value, RANGES[name])

    def loss(self, pair: Batch) -> Tensor:
        """The weighted sum of the named losses' means, ``()`` in the dtype of the log-probabilities.

        ``pair`` is a ``PairLogps``, or the ``inputs`` of the losses' kind.
        """
        return self.total(pair).to(pair.logps_like.dtype)

    def total(self, pair: Batch) -> Tensor:
        """``loss`` before it is rounded, in fp64: shares of a batch add up to the whole of it."""
        # One of weight 0 is left out: it need not be finite.
        terms = [term for term in self.terms if term.weight != 0] or self.terms
        first, *others = (term.weight * self._mean(term, pair) for term in terms)
        return sum(others, first)

    def _mean(self, term: LossTerm, pair: Batch) -> Tensor:
        """One loss summed over the batch in fp64 and divided by what its scope asks for."""
        if term.spec.scope == "token":
            assert isinstance(pair, PairLogps)  # build_objective mixes no kinds, and sft is the only one
            counts, divisor = pair.nll_count, self.num_tokens
        else:
            counted = term.spec.counted
            counts = pair.is_scored if counted is None else pair.is_scored & counted(pair)
            divisor = self.num_pairs
        # What does not count is taken out before the loss sees it: behind it, 0 times a NaN would be NaN.
        weights = self.per_pair.get("pair_weights", 1.0)
        keep = (counts > 0) & (weights != 0)
        seen = (pair if term.spec.uses_reference else pair.without_reference()).emptied(keep)
        losses = weights * term.spec.function(seen, **_of_rows(term.arguments, keep))  # (P,)
        return masked_sum(losses, keep) / (counts.sum().clamp(min=1) if divisor is None else divisor)

    def rewards(self, pair: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the chosen and of the rejected answers, detached, ``(P,)`` each.

        beta times the log-ratio of the sums, as TRL's DPO trainer has it whatever the loss; for a first
        loss that is reference-free and length-normalised (SimPO), beta times the per-token mean; with
        divergences (TDPO) beta times the log-ratio and the divergence, as the authors' code has it. beta is
        the one given, else the default of the first named loss that has one.
        """
        lead, beta = self._lead()
        chosen, rejected = pair.chosen_logratios, pair.rejected_logratios
        if isinstance(pair, DivergencePairLogps):
            assert pair.chosen_kl is not None and pair.rejected_kl is not None  # ``check`` has seen them
            chosen, rejected = chosen + pair.chosen_kl, rejected + pair.rejected_kl
        if lead.length_normalized and not lead.uses_reference:
            chosen = token_mean(pair.chosen, pair.chosen_tokens)
            rejected = token_mean(pair.rejected, pair.rejected_tokens)
        dtype = pair.chosen.dtype
        return (beta * chosen).detach().to(dtype), (beta * rejected).detach().to(dtype)

    def answer_rewards(self, batch: ListLogps | UnpairedLogps) -> Tensor:
        """Implicit rewards of every answer of a list or of unpaired answers, detached, ``(M,)`` or ``(B,)``.

        As ``rewards``: beta times the log-ratio, or the per-token mean for a first loss that is
        reference-free and length-normalised.
        """
        lead, beta = self._lead()
        logratios = batch.logps if batch.ref_logps is None else batch.logps - batch.ref_logps
        if lead.length_normalized and not lead.uses_reference:
            logratios = token_mean(logratios, batch.tokens)
        if isinstance(batch, ListLogps) and isinstance(beta, Tensor) and beta.dim() == 1:
            beta = beta[batch.group_ids]
        return (beta * logratios).detach().to(batch.logps.dtype)

    def _lead(self) -> tuple[LossSpec, PerPair]:
        """The loss that the rewards are of, and their beta."""
        lead = next((term.spec for term in self.terms if term.spec.default_beta is not None), None)
        default = DEFAULT_BETA if lead is None or lead.default_beta is None else lead.default_beta
        return lead or self.terms[0].spec, self.per_pair.get("beta", default)


def build_objective(
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    *,
    beta: PerPair | None = None,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    chosen_win_rate: PerPair | None = None,
    rejected_win_rate: PerPair | None = None,
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
        chosen_win_rate, rejected_win_rate: likewise, both or neither: the probability in [0, 1] that the
            answer beats another sample of the policy (``sppo``).
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
        "beta": beta, "margin": margin, "soft_labels": soft_labels, "chosen_win_rate": chosen_win_rate,
        "rejected_win_rate": rejected_win_rate, "pair_weights": pair_weights,
    }  # fmt: skip
    per_pair = {name: _check_per_pair(name, value) for name, value in given.items() if value is not None}
    for name in PER_PAIR[1:]:  # a beta is also that of the rewards
        refusing = [spec.name for spec in specs if name not in spec.per_pair and not spec.is_nll]
        if name in per_pair and (refusing or all(spec.is_nll for spec in specs)):
            raise ValueError(f"{name}: got a value, wanted None: {', '.join(refusing or names)} takes none")

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


def _of_rows(arguments: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """Arguments per row, with a 1 (which all of them may be) for rows that do not count."""
    return {
        name: value.where(keep, 1) if isinstance(value, Tensor) and value.dim() == 1 else value
        for name, value in arguments.items()
    }


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
