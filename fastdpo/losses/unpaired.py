"""Unpaired losses: a function each, from B answers, desirable or not, to B numbers.

u is an answer's log-ratio to the reference. Batches of one kind of answer only are fine. A weight per
answer (BCO's density ratio of prompts, say) is ``pair_weights``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.batches import UnpairedLogps
from fastdpo.losses.heads import logistic, unlikelihood, value_loss
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.ranges import NonNegative
from fastdpo.losses.registry import BatchExample, preference_loss
from fastdpo.losses.stable import token_mean


def _two(kl: float | None = None, reward_shift: float | None = None) -> UnpairedLogps:
    """u = 1, desirable, and u = 2, undesirable."""

    def number(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, dtype=torch.float64)

    return UnpairedLogps(
        torch.tensor([-12.0, -15.0], dtype=torch.float64),
        torch.tensor([True, False]),
        torch.tensor([2.0, 4.0], dtype=torch.float64),
        torch.tensor([-13.0, -17.0], dtype=torch.float64),
        number(kl),
        number(reward_shift),
    )


def _class_weights(answers: UnpairedLogps, desirable: float, undesirable: float) -> Tensor:
    """``(B,)`` in the dtype of the log-probabilities; of two Python numbers it would be fp32."""
    return torch.full_like(answers.logps, desirable).where(answers.is_desirable, undesirable)


def kto_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's reference point z0 of one batch: max(0, mean log-ratio), ``()``, detached.

    Args:
        logps, ref_logps: ``(B,)`` sums of mismatched completions (each prompt with another row's answer:
            TRL rotates them by one), of all ranks.

    Source: arXiv:2402.01306.
    """
    return (logps - ref_logps).detach().mean().clamp(min=0)


@preference_loss(
    "kto",
    paper="arXiv:2402.01306 eq. 7, 8",
    kind="unpaired",
    inputs=UnpairedLogps,
    needs=("kl",),
    # z0 = 0.5: (sigmoid(-0.05) + sigmoid(0.15)) / 2
    example=BatchExample(0.5124662244, lambda: _two(kl=0.5)),
)
def kto_loss(
    answers: UnpairedLogps,
    *,
    beta: PerPair = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """KTO: each answer's value against the reference point z0, w (1 - sigmoid(+-beta (u - z0))).

    z0 is ``UnpairedLogps.kl``: ``kto_kl`` of the batch, or ``controllers.KLEstimate``.
    """
    if answers.kl is None:
        raise ValueError("kl: got None, wanted a value for kto")
    m = beta * (answers.logratios - answers.kl.detach())
    weights = _class_weights(answers, desirable_weight, undesirable_weight)
    return weights * value_loss(m, answers.is_desirable, unlikelihood)


@preference_loss(
    "apo_zero_unpaired",
    paper="arXiv:2408.06266 eq. 7 (TRL's KTOTrainer)",
    kind="unpaired",
    inputs=UnpairedLogps,
    example=BatchExample(0.5124274049, _two),  # (sigmoid(-0.1) + sigmoid(0.2)) / 2
)
def apo_zero_unpaired_loss(
    answers: UnpairedLogps,
    *,
    beta: PerPair = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """Anchored preference optimisation, zero, on unpaired answers: KTO with z0 = 0."""
    weights = _class_weights(answers, desirable_weight, undesirable_weight)
    return weights * value_loss(beta * answers.logratios, answers.is_desirable, unlikelihood)


@preference_loss(
    "bco",
    paper="arXiv:2404.04656",
    kind="unpaired",
    inputs=UnpairedLogps,
    needs=("reward_shift",),
    # delta = 0.15: (log(1 + e^0.05) + log(1 + e^0.05)) / 2
    example=BatchExample(0.7184596480, lambda: _two(reward_shift=0.15)),
)
def bco_loss(answers: UnpairedLogps, *, beta: PerPair = 0.1) -> Tensor:
    """BCO: each answer classified by its reward less the rewards' running mean delta.

    -ls(beta u - delta) desirable, -ls(-(beta u - delta)) undesirable; delta is
    ``UnpairedLogps.reward_shift`` (``controllers.RunningMean``). The paper uses beta 0.01.
    """
    if answers.reward_shift is None:
        raise ValueError("reward_shift: got None, wanted a value for bco")
    m = beta * answers.logratios - answers.reward_shift.detach()
    return value_loss(m, answers.is_desirable, logistic)


def _forgetting(answers: UnpairedLogps, forget: Tensor, retain_weight: float, forget_weight: float) -> Tensor:
    """Unlearning: ``forget`` of undesirable answers, the mean NLL per token of desirable ones."""
    weights = _class_weights(answers, retain_weight, forget_weight)
    return weights * (-token_mean(answers.logps, answers.tokens)).where(answers.is_desirable, forget)


@preference_loss(
    "npo",
    paper="arXiv:2404.05868",
    kind="unpaired",
    inputs=UnpairedLogps,
    length_normalized=True,
    example=BatchExample(10.9813886938, _two),  # (12 / 2 + (2 / 0.1) log(1 + e^0.2)) / 2
)
def npo_loss(
    answers: UnpairedLogps,
    *,
    beta: PerPair = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """Negative preference optimisation (NPO), for unlearning: undesirable answers are forgotten, others kept.

    (2 / beta) log(1 + (pi / pi_ref)^beta) of an answer to forget; of one to keep its mean NLL per token,
    times ``desirable_weight`` (the authors' retain loss, ``grad_diff``; 0 without one). beta to 0 is
    gradient ascent. Every answer counts alike in the mean: weights say how the two kinds compare.
    """
    forget = 2 / beta * logistic(-beta * answers.logratios)
    return _forgetting(answers, forget, desirable_weight, undesirable_weight)


@preference_loss(
    "simnpo",
    paper="arXiv:2410.07163 (the authors' code)",
    kind="unpaired",
    inputs=UnpairedLogps,
    uses_reference=False,
    length_normalized=True,
    # (12 / 2 + (2 / 2.5) log(1 + e^(-2.5 * 15 / 4))) / 2
    example=BatchExample(3.0000339259, lambda: _two().without_reference()),
)
def simnpo_loss(
    answers: UnpairedLogps,
    *,
    beta: PerPair = 2.5,
    gamma: NonNegative = 0.0,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """SimNPO, for unlearning: NPO on per-token means without a reference.

    -(2 / beta) log sigmoid(beta (-mean - gamma)) of an answer to forget: the authors' code multiplies gamma
    by beta. Answers to keep and weights as of ``npo``.
    """
    forget = 2 / beta * logistic(beta * (-token_mean(answers.logps, answers.tokens) - gamma))
    return _forgetting(answers, forget, desirable_weight, undesirable_weight)
