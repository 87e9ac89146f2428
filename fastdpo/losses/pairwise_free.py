"""Pairwise losses without a reference: on log-probabilities themselves, often with an NLL term.

An NLL term is the registry's ``sft``, a mean over tokens, or another ``nll_term``, which ``build_objective``
adds with the weight ``nll_weight``; the functions here are the part that compares two answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias

from torch import Tensor

from fastdpo.losses.heads import (
    alpha_reward,
    hinge,
    ipo,
    log_odds_ratio,
    logistic,
    margin_loss,
    preferred_probability,
    rank_hinge,
    scaled_margin,
)
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.ranges import FlipProbability, NonNegative
from fastdpo.losses.registry import Example, preference_loss
from fastdpo.losses.stable import token_mean

# s_w = -12 over 2 tokens, s_l = -15 over 4: D = 3, the means are -6 and -3.75, the NLL is 12 / 2 = 6.
_PAIR = Example(0.0, chosen=-12.0, rejected=-15.0, chosen_tokens=2, rejected_tokens=4)


# What becomes of the gap of two answers: of their sums, for ``ipo`` of their per-token means.
Comparison: TypeAlias = Literal["sigmoid", "hinge", "ipo"]


def _compared(
    pair: PairLogps, beta: PerPair, margin: PerPair | None, preferred: PerPair, comparison: Comparison
) -> Tensor:
    """DPO's, hinge's or IPO's loss of two answers under a uniform reference."""
    gap = pair.mean_delta if comparison == "ipo" else pair.delta
    penalties: dict[Comparison, Callable[[Tensor], Tensor]] = {
        "sigmoid": logistic,
        "hinge": hinge,
        "ipo": partial(ipo, beta=beta),
    }
    return margin_loss(scaled_margin(gap, beta, margin), penalties[comparison], preferred)


def _mean_margin(
    pair: PairLogps, beta: PerPair, margin: PerPair | None, gamma: float, alpha: float = 0.0
) -> Tensor:
    """beta (R(mean_w) - R(mean_l)) - gamma - psi, R being AlphaPO's shape."""
    chosen = alpha_reward(token_mean(pair.chosen, pair.chosen_tokens), alpha, beta)
    rejected = alpha_reward(token_mean(pair.rejected, pair.rejected_tokens), alpha, beta)
    return scaled_margin(chosen - rejected, beta, margin) - gamma


@preference_loss(
    "simpo",
    paper="arXiv:2405.14734 eq. 6; alpha: arXiv:2501.03884",
    uses_reference=False,
    length_normalized=True,
    # beta (-1/2 + 4/4) - gamma = 0.5: log(1 + e^-0.5)
    example=Example(0.4740769842, chosen=-1.0, rejected=-4.0, chosen_tokens=2, rejected_tokens=4),
)
def simpo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 2.0,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    gamma: NonNegative = 0.5,
    alpha: float = 0.0,
) -> Tensor:
    """SimPO: per-token means without a reference, and a target reward gap ``gamma``; ``alpha``: AlphaPO.

    -log sigmoid(beta (mean_w - mean_l) - gamma). ``gamma`` is TRL's ``simpo_gamma``; the authors'
    ``gamma_beta_ratio`` (0.25 by default) times beta. ``margin`` adds to it per pair. With ``alpha`` a
    mean x counts as (1 - e^(-alpha x)) / alpha (AlphaPO; its example: alpha 0.25, beta 2.5, gamma 0.1).
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    return margin_loss(_mean_margin(pair, beta, margin, gamma, alpha), logistic, preferred)


@preference_loss(
    "cpo_simpo",
    paper="arXiv:2405.14734, arXiv:2401.08417 (TRL's CPOTrainer)",
    uses_reference=False,
    length_normalized=True,
    nll_weight=1.0,
    example=replace(_PAIR, loss=7.1199598331),  # log(1 + e^0.725) + 6, as 0.1 (-6 + 3.75) - 0.5 = -0.725
)
def cpo_simpo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    gamma: NonNegative = 0.5,
    alpha: float = 0.0,
) -> Tensor:
    """CPO-SimPO: SimPO and an NLL term on the chosen answer, with the defaults of TRL's CPOTrainer."""
    preferred = preferred_probability(label_smoothing, soft_labels)
    return margin_loss(_mean_margin(pair, beta, margin, gamma, alpha), logistic, preferred)


@preference_loss(
    "cpo",
    paper="arXiv:2401.08417 eq. 3",
    uses_reference=False,
    nll_weight=1.0,
    example=replace(_PAIR, loss=6.5543552445),  # log(1 + e^-0.3) + 6
)
def cpo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    comparison: Comparison = "sigmoid",
) -> Tensor:
    """Contrastive preference optimisation (CPO): DPO under a uniform reference, and an NLL term.

    ``nll_weight`` is TRL's ``cpo_alpha``, ``comparison`` the ``loss_type`` of its CPO trainer: ``hinge`` is
    relu(1 - beta (s_w - s_l)), ``ipo`` (mean_w - mean_l - 1 / (2 beta))^2. Not constrained preference
    optimisation, of the same initials.
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    return _compared(pair, beta, margin, preferred, comparison)


@preference_loss(
    "tpo",
    paper="arXiv:2405.16681",
    uses_reference=False,
    nll_weight=1.0,
    example=replace(_PAIR, loss=6.6782596763),  # log(1 + e^-0.03) + 6
)
def tpo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.01,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    comparison: Comparison = "sigmoid",
) -> Tensor:
    """Triple preference optimisation (TPO): CPO whose NLL term is of a third, gold answer.

    The gold answer's sums go into ``PairLogps.nll_sum`` and ``nll_tokens``; without them it is the chosen.
    ``nll_weight`` is TRL's ``tpo_alpha``, ``comparison`` as of ``cpo``.
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    return _compared(pair, beta, margin, preferred, comparison)


@preference_loss(
    "tpo_l",
    paper="arXiv:2405.16681",
    uses_reference=False,
    length_normalized=True,
    nll_weight=1.0,
    aliases=("tpo-l",),
    example=replace(_PAIR, loss=6.9881416942),  # log(1 + e^0.5225) + 6, as 0.01 (-2.25) - 0.5 = -0.5225
)
def tpo_l_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.01,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    gamma: NonNegative = 0.5,
) -> Tensor:
    """TPO-L: TPO on per-token means with a target reward gap ``gamma`` (TRL's ``tpo_l_gamma``)."""
    preferred = preferred_probability(label_smoothing, soft_labels)
    return margin_loss(_mean_margin(pair, beta, margin, gamma), logistic, preferred)


def _log_odds(pair: PairLogps) -> Tensor:
    """The log odds ratio of both answers' per-token means."""
    return log_odds_ratio(
        token_mean(pair.chosen, pair.chosen_tokens), token_mean(pair.rejected, pair.rejected_tokens)
    )


def _orpo_metrics(pair: PairLogps) -> dict[str, Tensor]:
    """TRL's: ``log_odds_chosen`` is the log odds ratio, ``log_odds_ratio`` the log sigmoid of it."""
    odds = _log_odds(pair)
    return {"log_odds_ratio": -logistic(odds), "log_odds_chosen": odds}


@preference_loss(
    "orpo",
    paper="arXiv:2403.07691 eq. 4, 6, 7",
    uses_reference=False,
    length_normalized=True,
    nll_weight=1.0,
    metrics=_orpo_metrics,
    # log odds: -2.25 - (log(1 - e^-6) - log(1 - e^-3.75)) = -2.27131, 0.1 log(1 + e^2.27131) + 6
    example=replace(_PAIR, loss=6.2369510364),
)
def orpo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
) -> Tensor:
    """ORPO: NLL, and beta times the logistic loss of the log odds ratio of per-token means.

    beta is the paper's lambda, so it scales the term, not the margin. The paper's code and TRL train the
    NLL on prompt and answer: pass ``nll_labels`` for that, as the loop does unless told otherwise
    (``nll_on_prompt``); of a function the default is the answer alone.
    """
    odds = _log_odds(pair)
    return beta * logistic(odds if margin is None else odds - margin)


@preference_loss(
    "slic",
    paper="arXiv:2305.10425",
    uses_reference=False,
    nll_weight=0.1,
    nll_term="sft_sum",
    # relu(1 - 0.5) + 0.1 * 3
    example=Example(0.8, chosen=-3.0, rejected=-3.5, chosen_tokens=3),
)
def slic_loss(pair: PairLogps, *, margin: PerPair | None = None, delta: NonNegative = 1.0) -> Tensor:
    """SLiC-HF: hinge on the gap of log-probabilities, relu(delta - (s_w - s_l)), and an NLL term.

    The NLL stands for the regulariser towards the SFT target: of the chosen answer as a whole, as the gap is
    of whole answers (``sft_sum``; in HALOs ``lambda_coef``). ``margin`` adds to ``delta`` per pair.
    """
    return rank_hinge(pair.chosen, pair.rejected, delta if margin is None else delta + margin)


@preference_loss(
    "sft",
    paper="arXiv:2405.16436 (the term of RPO)",
    scope="token",
    uses_reference=False,
    example=Example(4.0, chosen=-12.0, rejected=-15.0, chosen_tokens=3),  # 12 / 3
)
def sft_loss(pair: PairLogps) -> Tensor:
    """Mean negative log-likelihood of the chosen answers' tokens; a term beside others, or alone.

    Returns the sums per pair: the mean is over all tokens of the batch, not over pairs.
    """
    return pair.nll


@preference_loss(
    "sft_mean",
    paper="arXiv:2404.19733 (the term of iterative RPO)",
    uses_reference=False,
    length_normalized=True,
    reads_nll=True,
    example=Example(4.0, chosen=-12.0, rejected=-15.0, chosen_tokens=3),  # 12 / 3
)
def sft_mean_loss(pair: PairLogps) -> Tensor:
    """Mean over pairs of the chosen answer's mean negative log-likelihood per token.

    Every answer counts alike, where ``sft`` counts every token alike (as TRL does).
    """
    return token_mean(pair.nll, pair.nll_count)


@preference_loss(
    "sft_sum",
    paper="arXiv:2305.10425 (the term of SLiC)",
    uses_reference=False,
    reads_nll=True,
    example=Example(12.0, chosen=-12.0, rejected=-15.0, chosen_tokens=3),
)
def sft_sum_loss(pair: PairLogps) -> Tensor:
    """Mean over pairs of the chosen answer's negative log-likelihood, summed over its tokens.

    A longer answer weighs more, by its length: beside losses of whole answers.
    """
    return pair.nll
