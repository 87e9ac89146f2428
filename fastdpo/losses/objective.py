"""Losses by name, with everything a caller says about them: checked once, then a function of a batch.

    L = sum_k weight_k * (1 / n_k) * sum_i w_i L_k(pair i)

with w the ``pair_weights`` and n_k the number of pairs, or of NLL tokens for a loss of scope
``token``: the batch's own, or ``num_pairs`` / ``num_tokens``, with which the losses of micro-batches
add up to the mean over all of them exactly. For losses of another kind, read row for pair: an answer, a
group, a sequence or a step. A loss with an NLL term of its own (``LossSpec.nll_weight``) is two terms
here, itself and its ``nll_term``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.losses.batches import DivergencePairLogps, ListLogps, UnpairedLogps
from fastdpo.losses.heads import alpha_reward
from fastdpo.losses.inputs import Batch, PairLogps, PerPair
from fastdpo.losses.ranges import check_range
from fastdpo.losses.registry import PER_PAIR, RANGES, WIN_RATES, LossSpec
from fastdpo.losses.stable import masked_mean, masked_sum, token_mean

DEFAULT_BETA = 0.1  # scales the reported rewards where no named loss has a beta


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One named loss, its weight, and the arguments it gets."""

    spec: LossSpec
    weight: float
    arguments: dict[str, Any]

    @property
    def is_of_means(self) -> bool:
        """Whether it compares the answers' mean log-probabilities per token, without a reference."""
        is_of_means = self.spec.length_normalized or self.arguments.get("comparison") == "ipo"
        return is_of_means and not self.spec.uses_reference


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
    def is_sum_over_rows(self) -> bool:
        """Whether each row's share of the loss depends on that row alone, given the counts to divide by."""
        return all(term.spec.scope in ("pair", "token") for term in self.terms)

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

    def total(self, pair: Batch, divisors: Sequence[float | Tensor] | None = None) -> Tensor:
        """``loss`` before it is rounded, in fp64: shares of a batch add up to the whole of it.

        ``divisors``: those of the whole batch, where ``pair`` is a share; None: of ``pair``.
        """
        divisors = self.divisors(pair) if divisors is None else divisors
        terms = list(zip(self.terms, divisors, strict=True))
        # One of weight 0 is left out: it need not be finite.
        terms = [(term, divisor) for term, divisor in terms if term.weight != 0] or terms
        first, *others = (term.weight * (self._sum(term, pair) / divisor) for term, divisor in terms)
        return sum(others, first)

    def divisors(self, pair: Batch) -> list[float | Tensor]:
        """What each term's sum over the rows is divided by: a count that was given, or the batch's own."""
        return [self._divisor(term, pair) for term in self.terms]

    def _divisor(self, term: LossTerm, pair: Batch) -> float | Tensor:
        given = self.num_tokens if term.spec.scope == "token" else self.num_pairs
        return _counts(term, pair).sum().clamp(min=1) if given is None else given

    def _sum(self, term: LossTerm, pair: Batch) -> Tensor:
        """One loss summed over the batch, in fp64."""
        # What does not count is taken out before the loss sees it: behind it, 0 times a NaN would be NaN.
        weights = self.per_pair.get("pair_weights", 1.0)
        keep = (_counts(term, pair) > 0) & (weights != 0)
        seen = (pair if term.spec.uses_reference else pair.without_reference()).emptied(keep)
        losses = weights * term.spec.function(seen, **_of_rows(term.arguments, keep))  # (P,)
        return masked_sum(losses, keep)

    def rewards(self, pair: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the chosen and of the rejected answers, detached, ``(P,)`` each.

        beta times the log-ratio of the sums, as TRL's DPO trainer has it whatever the loss; for a first loss
        that is reference-free and of per-token means (SimPO), beta times the mean, in AlphaPO's shape where
        the loss has an ``alpha``; with divergences (TDPO) beta times the log-ratio and the divergence, as
        the authors' code has it. beta is the one given, else the default of the first named loss that has
        one.
        """
        lead, beta = self._lead()
        chosen, rejected = pair.chosen_logratios, pair.rejected_logratios
        if isinstance(pair, DivergencePairLogps):
            assert pair.chosen_kl is not None and pair.rejected_kl is not None  # ``check`` has seen them
            chosen, rejected = chosen + pair.chosen_kl, rejected + pair.rejected_kl
        if lead.is_of_means:
            alpha = lead.arguments.get("alpha", 0.0)
            chosen, rejected = (alpha_reward(means, alpha, beta) for means in self.logged_logps(pair))
        dtype = pair.chosen.dtype
        return (beta * chosen).detach().to(dtype), (beta * rejected).detach().to(dtype)

    def logged_logps(self, pair: PairLogps) -> tuple[Tensor, Tensor]:
        """What stands for the answers in a log, ``(P,)`` each: sums, or means that a first loss compares."""
        lead, _ = self._lead()
        if not lead.is_of_means:
            return pair.chosen, pair.rejected
        return token_mean(pair.chosen, pair.chosen_tokens), token_mean(pair.rejected, pair.rejected_tokens)

    def further_metrics(self, pair: PairLogps) -> dict[str, Tensor]:
        """Means that only some losses have: over the pairs; ``nll_loss`` over the tokens of an NLL term."""
        metrics: dict[str, Tensor] = {}
        for term in self.terms:
            if term.spec.metrics is not None:
                values = term.spec.metrics(pair.without_reference())
                for name, value in values.items():
                    metrics[name] = masked_mean(value.detach(), pair.is_scored)
        if any(term.spec.is_nll or term.spec.nll_weight is not None for term in self.terms):
            count = pair.nll_count
            total = masked_sum(pair.nll.detach(), count > 0)
            metrics["nll_loss"] = (total / count.sum().clamp(min=1)).to(count.dtype)
        return metrics

    def answer_rewards(self, batch: ListLogps | UnpairedLogps) -> Tensor:
        """Implicit rewards of every answer of a list or of unpaired answers, detached, ``(M,)`` or ``(B,)``.

        As ``rewards``: beta times the log-ratio, or the per-token mean for a first loss that is
        reference-free and length-normalised.
        """
        lead, beta = self._lead()
        logratios = batch.logps if batch.ref_logps is None else batch.logps - batch.ref_logps
        if lead.is_of_means:
            logratios = token_mean(logratios, batch.tokens)
        if isinstance(batch, ListLogps) and isinstance(beta, Tensor) and beta.dim() == 1:
            beta = beta[batch.group_ids]
        return (beta * logratios).detach().to(batch.logps.dtype)

    def _lead(self) -> tuple[LossTerm, PerPair]:
        """The loss that the rewards are of, and their beta."""
        lead = next((term for term in self.terms if term.spec.default_beta is not None), self.terms[0])
        default = DEFAULT_BETA if lead.spec.default_beta is None else lead.spec.default_beta
        return lead, self.per_pair.get("beta", default)


def _counts(term: LossTerm, pair: Batch) -> Tensor:
    """``(P,)``, what each row counts: 0 or 1, or its NLL tokens for a loss of scope ``token``."""
    if term.spec.scope == "token":
        assert isinstance(pair, PairLogps)  # build_objective mixes no kinds, and sft is the only one
        return pair.nll_count
    counted = term.spec.counted
    return pair.is_scored if counted is None else pair.is_scored & counted(pair)


def _of_rows(arguments: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """Arguments per row, with a 1 (which all of them may be) for rows that do not count."""
    return {
        name: value.where(keep, 1) if isinstance(value, Tensor) and value.dim() == 1 else value
        for name, value in arguments.items()
    }
