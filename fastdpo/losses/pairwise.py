"""Pairwise losses of the reward gap: a function each, from the log-probabilities of P pairs to P numbers.

u is the log-ratio of an answer to the reference, D = u_w - u_l, h = beta D - psi with psi the
``margin``, and q the probability that the chosen answer is the better one (``soft_labels``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.heads import (
    discopop,
    exo,
    hinge,
    ipo,
    logistic,
    margin_loss,
    preferred_probability,
    scaled_margin,
)
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.links import DEFAULT_ALPHA, FDivergence, linked_gap
from fastdpo.losses.ranges import FlipProbability, Interval, NonNegative, Positive
from fastdpo.losses.registry import Example, preference_loss

# u_w = 1 and u_l = -1, over 2 and 4 tokens: D = 2 and h = 0.2 at beta 0.1; the means differ by 0.75.
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
    "sigmoid",
    paper="arXiv:2305.18290 eq. 7",
    shift_invariant=True,
    aliases=("dpo",),
    example=replace(_PAIR, loss=0.5981388694),  # log(1 + e^-0.2)
)
def sigmoid_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    length_penalty: float = 0.0,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Tensor:
    """DPO; with ``label_smoothing`` conservative DPO (cDPO).

    -(1 - eps) log sigmoid(h) - eps log sigmoid(-h). cDPO: E. Mitchell, "A note on DPO with noisy
    preferences", eq. 3. Its minimum lies at sigmoid(h) = 1 - eps.

    ``f_divergence_type`` (``links.py``) ties the policy to the reference by another divergence.
    ``length_penalty``, alpha, adds alpha (|y_w| - |y_l|) to h (R-DPO, arXiv:2403.19159 eq. 9 as OAT's code
    has it): the labels are taken to reveal a reward of which the policy is to maximise r - alpha |y|.
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    gap = linked_gap(pair, f_divergence_type, f_alpha_divergence_coef, scale=beta)
    h = scaled_margin(gap, beta, margin)
    if length_penalty:
        h = h + length_penalty * (pair.chosen_tokens - pair.rejected_tokens)
    return margin_loss(h, logistic, preferred)


@preference_loss(
    "hinge",
    paper="arXiv:2309.06657",
    shift_invariant=True,
    example=replace(_PAIR, loss=0.8),  # 1 - 0.2
)
def hinge_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Tensor:
    """Hinge on the DPO margin, relu(1 - h) (RSO, normalised SLiC)."""
    gap = linked_gap(pair, f_divergence_type, f_alpha_divergence_coef, scale=beta)
    return margin_loss(scaled_margin(gap, beta, margin), hinge, 1.0 if soft_labels is None else soft_labels)


@preference_loss(
    "ipo",
    paper="arXiv:2310.12036 eq. 17",
    length_normalized=True,
    example=replace(_PAIR, loss=18.0625),  # (0.75 - 1 / 0.2)^2
)
def ipo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    length_normalize: bool = True,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Tensor:
    """IPO, (D - 1 / (2 beta))^2; D of per-token means (sums with ``length_normalize=False``).

    beta is the paper's tau. Per-token means are what TRL computes; the original DPO code has sums.
    ``margin`` moves the target to (1/2 + psi) / beta. With an f-divergence the link has its constant, f'(1)
    = 0, which TRL leaves out: over answers of different length it does not cancel.
    """
    gap = linked_gap(
        pair,
        f_divergence_type,
        f_alpha_divergence_coef,
        scale=1.0,  # divided by beta again
        is_squared=True,
        length_normalize=length_normalize,
    )
    phi = partial(ipo, beta=beta)
    return margin_loss(scaled_margin(gap, beta, margin), phi, 1.0 if soft_labels is None else soft_labels)


@preference_loss(
    "robust",
    paper="arXiv:2403.00409 eq. 12",
    shift_invariant=True,
    # (0.9 log(1 + e^-0.2) - 0.1 log(1 + e^0.2)) / 0.8
    example=replace(_PAIR, loss=0.5731388694, options={"label_smoothing": 0.1}),
)
def robust_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Tensor:
    """Robust DPO (rDPO): unbiased when a share ``label_smoothing`` of the labels is flipped.

    [-(1 - eps) log sigmoid(h) + eps log sigmoid(-h)] / (1 - 2 eps). Unbounded below as h grows.
    """
    eps = label_smoothing
    scale = beta * ((1 - eps) / (1 - 2 * eps))
    gap = linked_gap(pair, f_divergence_type, f_alpha_divergence_coef, scale=scale)
    h = scaled_margin(gap, beta, margin)
    return ((1 - eps) * logistic(h) - eps * logistic(-h)) / (1 - 2 * eps)


@preference_loss(
    "sigmoid_norm",
    paper="arXiv:2411.15124 sec. 4.3",
    length_normalized=True,
    example=replace(_PAIR, loss=0.6563501985),  # log(1 + e^-0.075)
)
def sigmoid_norm_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Tensor:
    """Length-normalised DPO: log-ratios per token. Wants a larger beta, 2 to 10.

    With an f-divergence the link has its constant, f'(1) = 0, which TRL leaves out: over answers of different
    length it does not cancel.
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    gap = linked_gap(pair, f_divergence_type, f_alpha_divergence_coef, scale=beta, length_normalize=True)
    return margin_loss(scaled_margin(gap, beta, margin), logistic, preferred)


@preference_loss(
    "exo_pair",
    paper="arXiv:2402.00856 eq. 16",
    shift_invariant=True,
    presets={"authors": {"beta": 0.5, "label_smoothing": math.exp(-10)}},
    # Q = sigmoid(0.2): Q (log Q - log 0.999) + (1 - Q) (log(1 - Q) - log 0.001)
    example=replace(_PAIR, loss=2.4220146207),
)
def exo_pair_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    label_smoothing: Annotated[float, Interval(0.0, 0.5, includes_low=False)] = 1e-3,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Tensor:
    """EXO with two answers: reverse KL of the policy's choice to the label smoothed by eps.

    KL(Bernoulli(sigmoid(h)) || Bernoulli(1 - eps)); eps must be positive. Its minimum, 0, lies at sigmoid(h)
    = 1 - eps. ``exo_pair@authors`` has eps = e^-10 and beta 0.5, as the authors' code and most of its
    scripts; the default eps is TRL's.
    """
    gap = linked_gap(pair, f_divergence_type, f_alpha_divergence_coef, scale=beta)
    return exo(scaled_margin(gap, beta, margin), math.log1p(-label_smoothing), math.log(label_smoothing))


@preference_loss(
    "discopop",
    paper="arXiv:2406.08414 eq. 5",
    shift_invariant=True,
    # h = 0.05 * 2 = 0.1, w = sigmoid(2): (1 - w) log(1 + e^-0.1) + w e^-0.1
    example=replace(_PAIR, loss=0.8737921187),
)
def discopop_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.05,
    margin: PerPair | None = None,
    discopop_tau: Positive = 0.05,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Tensor:
    """DiscoPOP, log-ratio modulated loss: from logistic to exponential as h grows.

    (1 - w) (-log sigmoid(h)) + w e^-h, w = sigmoid(h / tau). Found by a language model; not convex.
    """
    gap = linked_gap(pair, f_divergence_type, f_alpha_divergence_coef, scale=beta)
    return discopop(scaled_margin(gap, beta, margin), discopop_tau, scale=beta)


@preference_loss(
    "dpop",
    paper="arXiv:2402.13228 eq. 3",
    # u_w = -1 and u_l = -1, so D = 0 and relu(-u_w) = 1: h = 0.1 * (0 - 5) and log(1 + e^0.5)
    example=replace(_PAIR, chosen=-14.0, loss=0.9740769842, options={"penalty": 5.0}),
)
def dpop_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    soft_labels: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    penalty: NonNegative = 50.0,
) -> Tensor:
    """DPO-positive (DPOP): DPO that pays for a chosen answer less likely than under the reference.

    -log sigmoid(beta (D - penalty * relu(-u_w))). The paper tunes the penalty between 5 and 50.
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    gap = pair.delta - penalty * F.relu(-pair.chosen_logratios)
    return margin_loss(scaled_margin(gap, beta, margin), logistic, preferred)
