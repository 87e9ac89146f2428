"""Pairwise losses: a function each, from the log-probabilities of P pairs to P numbers.

u is the log-ratio of an answer to the reference, D = u_w - u_l, h = beta D - psi with psi the
``margin``, and q the probability that the chosen answer is the better one (``soft_labels``).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fastdpo.losses.heads import hinge, logistic, margin_loss, preferred_probability, scaled_margin
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.registry import Example, FlipProbability, NonNegative, preference_loss

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
) -> Tensor:
    """DPO; with ``label_smoothing`` conservative DPO (cDPO).

    -(1 - eps) log sigmoid(h) - eps log sigmoid(-h). cDPO: E. Mitchell, "A note on DPO with noisy
    preferences", eq. 3. Its minimum lies at sigmoid(h) = 1 - eps.
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    return margin_loss(scaled_margin(pair.delta, beta, margin), logistic, preferred)


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
) -> Tensor:
    """Hinge on the DPO margin, relu(1 - h) (RSO, normalised SLiC)."""
    return margin_loss(
        scaled_margin(pair.delta, beta, margin), hinge, 1.0 if soft_labels is None else soft_labels
    )


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
) -> Tensor:
    """IPO, (D - 1 / (2 beta))^2; D of per-token means (sums with ``length_normalize=False``).

    beta is the paper's tau. Per-token means are what TRL computes; the original DPO code has sums.
    ``margin`` moves the target to (1/2 + psi) / beta.
    """
    gap = pair.mean_delta if length_normalize else pair.delta

    def squared_distance(m: Tensor) -> Tensor:
        return ((m - 0.5) / beta) ** 2

    return margin_loss(
        scaled_margin(gap, beta, margin), squared_distance, 1.0 if soft_labels is None else soft_labels
    )


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
) -> Tensor:
    """Robust DPO (rDPO): unbiased when a share ``label_smoothing`` of the labels is flipped.

    [-(1 - eps) log sigmoid(h) + eps log sigmoid(-h)] / (1 - 2 eps). Unbounded below as h grows.
    """
    h = scaled_margin(pair.delta, beta, margin)
    eps = label_smoothing
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
) -> Tensor:
    """Length-normalised DPO: log-ratios per token. Wants a larger beta, 2 to 10."""
    preferred = preferred_probability(label_smoothing, soft_labels)
    return margin_loss(scaled_margin(pair.mean_delta, beta, margin), logistic, preferred)


@preference_loss(
    "simpo",
    paper="arXiv:2405.14734 eq. 6",
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
) -> Tensor:
    """SimPO: per-token means without a reference, and a target reward gap ``gamma``.

    -log sigmoid(beta (mean_w - mean_l) - gamma). ``gamma`` is TRL's ``simpo_gamma``; the authors'
    ``gamma_beta_ratio`` (0.25 by default) times beta. ``margin`` adds to it per pair.
    """
    preferred = preferred_probability(label_smoothing, soft_labels)
    return margin_loss(scaled_margin(pair.mean_delta, beta, margin) - gamma, logistic, preferred)


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
