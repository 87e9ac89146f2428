"""Pairwise losses whose margin is made of the reference: how far it ranks the pair right itself.

D is the gap of two answers, of the policy D_pi and of the reference D_ref; psi is taken from the margin,
without a gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.heads import logistic, margin_loss, preferred_probability, scaled_margin
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.ranges import FlipProbability, NonNegative, Positive
from fastdpo.losses.registry import Example, preference_loss
from fastdpo.losses.stable import token_mean

# Means of -6 and -3.75, and -6.5 and -3.5 of the reference: D_pi = -2.25, D_ref = -3; sums differ by 3 and 1.
_PAIR = Example(
    0.0,
    chosen=-12.0,
    rejected=-15.0,
    ref_chosen=-13.0,
    ref_rejected=-14.0,
    chosen_tokens=2,
    rejected_tokens=4,
)


@preference_loss(
    "hypo",
    paper="arXiv:2602.11902",
    shift_invariant=True,
    # sums, and a reference the wrong way round (D_ref = -1), which is left out: 0.1 * 3, log(1 + e^-0.3)
    example=replace(_PAIR, ref_rejected=-12.0, loss=0.5543552445),
)
def hypo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
) -> Tensor:
    """Hybrid preference optimisation (HyPO): DPO that leaves a reference out which ranks the pair wrongly.

    -log sigmoid(beta (D_pi - max(0, D_ref))), of sums. Not the HyPO with an online divergence, of the same
    name.
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    gap = pair.chosen - pair.rejected - F.relu(pair.reference_gap)
    return margin_loss(scaled_margin(gap, beta, margin), logistic, preferred)


def _mean_gaps(pair: PairLogps) -> tuple[Tensor, Tensor]:
    """D_pi and D_ref of per-token means."""
    (chosen, rejected), (ref_chosen, ref_rejected) = _means(pair.without_reference()), _reference_means(pair)
    return chosen - rejected, ref_chosen - ref_rejected


def _means(pair: PairLogps) -> tuple[Tensor, Tensor]:
    return token_mean(pair.chosen, pair.chosen_tokens), token_mean(pair.rejected, pair.rejected_tokens)


def _reference_means(pair: PairLogps) -> tuple[Tensor, Tensor]:
    if pair.ref_chosen is None or pair.ref_rejected is None:
        raise ValueError("ref_logps: got no reference, wanted one")
    return token_mean(pair.ref_chosen, pair.chosen_tokens), token_mean(
        pair.ref_rejected, pair.rejected_tokens
    )


@preference_loss(
    "ccpo",
    paper="arXiv:2605.20834 (the authors' code)",
    length_normalized=True,
    # psi = 0.1 log(1 + e^7) / 2 = 0.35004557: log(1 + e^-m), m = 0.1 (-2.25 + 3) - psi = -0.27504557
    example=replace(_PAIR, loss=0.8400965682),
)
def ccpo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    gamma: NonNegative = 0.5,
    tau: Positive = 2.0,
    alpha: Positive = 1.0,
) -> Tensor:
    """Constrained preference optimisation: DPO of per-token means with a margin where the reference has none.

    -log sigmoid(beta (D_pi - D_ref) - psi), psi = (beta / alpha) (1 / tau) log(1 + e^(tau (gamma - D_ref))):
    nearly 0 where the reference prefers the chosen answer by more than ``gamma``. Not contrastive preference
    optimisation (``cpo``), of the same initials.
    """
    policy, reference = _mean_gaps(pair)
    psi = beta / alpha * logistic(-tau * (gamma - reference)) / tau
    return logistic(beta * (policy - reference) - psi)


@preference_loss(
    "ccpo_easy",
    paper="arXiv:2605.20834 eq. 17 (the authors' code)",
    length_normalized=True,
    presets={"authors": {"beta": 2.5, "gamma": 0.05}},
    # psi = 0.5 (1 / -6.5 + 1 / -3.5) = -0.21978022: m = 0.1 (-2.25 + 3) - psi = 0.29478022
    example=replace(_PAIR, loss=0.5565798921),
)
def ccpo_easy_loss(pair: PairLogps, *, beta: PerPair = 0.1, gamma: NonNegative = 0.5) -> Tensor:
    """Constrained preference optimisation, easy form: a margin of the inverse log-probabilities.

    -log sigmoid(beta (D_pi - D_ref) - psi), psi = gamma (1 / l_w + 1 / l_l) of the reference's mean
    log-probabilities, as in the authors' code, where it is negative; the paper has the inverse probabilities.
    A mean above -1e-4 counts as -1e-4.
    """
    policy, reference = _mean_gaps(pair)
    psi = gamma * sum(1 / means.clamp(max=-1e-4) for means in _reference_means(pair))
    return logistic(beta * (policy - reference) - psi)


@preference_loss(
    "ccpo_clip",
    paper="arXiv:2605.20834 (the authors' code, and its default)",
    length_normalized=True,
    example=replace(_PAIR, loss=0.8119620020),  # D_ref = -3 counts as 0: log(1 + e^0.225)
)
def ccpo_clip_loss(pair: PairLogps, *, beta: PerPair = 0.1) -> Tensor:
    """Constrained preference optimisation, clipped form: ``hypo`` of per-token means.

    -log sigmoid(beta (D_pi - max(0, D_ref))).
    """
    policy, reference = _mean_gaps(pair)
    return logistic(beta * (policy - F.relu(reference)))
