"""Listwise losses with a target distribution: from the candidates of G prompts to G numbers.

u is a candidate's log-ratio to the reference (``ListLogps.ref_logps``: an old policy, a proposal or an
exponential average does as well). Most are the cross-entropy of a target q made of the scores against
softmax((s - a) / tau), whose gradient is (p_i - q_i) / tau on each s_i: the size of scores counts. A group of
one candidate gives 0 unless its loss says otherwise; a NaN score gives a NaN loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.batches import ListLogps
from fastdpo.losses.heads import listwise_ce, logistic, masked_log_softmax, regress
from fastdpo.losses.inputs import PerPair
from fastdpo.losses.list_scores import (
    column,
    entropy,
    poison,
    softmax_target,
    three,
    three_free,
)
from fastdpo.losses.ranges import NonNegative, Positive
from fastdpo.losses.registry import BatchExample, preference_loss

# The authors' recipe for rewards (yamls/reward_qlora.yaml and README of thu-ml/Noise-Contrastive-Alignment).
AUTHORS_NCA = {"beta": 0.01, "score_temperature": 1e-4}


@preference_loss(
    "infonca",
    paper="arXiv:2402.05369",
    presets={"authors": AUTHORS_NCA},
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    shift_invariant=True,
    # q = softmax(2, 0, 1), p = softmax(1, 0, -1)
    example=BatchExample(0.9870934797, three, {"beta": 1.0}),
)
def infonca_loss(lists: ListLogps, *, beta: PerPair = 0.1, score_temperature: Positive = 1.0) -> Tensor:
    """InfoNCA: cross-entropy of softmax(scores / temperature) against softmax(beta u).

    With beta 1, the proposal's log-probabilities as reference and its posterior's log-weights as scores
    it is the self-normalised KL divergence of posterior and policy (as in BRAIn), up to a constant.
    ``infonca@authors`` has beta 0.01 and a temperature of 1e-4, as the authors' run on UltraFeedback (their
    trainer's own default is 1e-3), which leaves the best answer alone with a share.
    """
    target = softmax_target(lists, score_temperature)
    return listwise_ce(column(beta) * lists.logratios, target, lists.mask)


@preference_loss(
    "nca",
    paper="arXiv:2402.05369",
    presets={"authors": AUTHORS_NCA},
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    # q = softmax(2, 0, 1), softplus(-1) = 0.31326, softplus(0) = 0.69315, softplus(1) = 1.31326
    example=BatchExample(1.3654149858, three, {"beta": 1.0}),
)
def nca_loss(lists: ListLogps, *, beta: PerPair = 0.1, score_temperature: Positive = 1.0) -> Tensor:
    """NCA for lists: raises each candidate's own likelihood ratio by its share of the scores.

    -sum_i [q_i ls(beta u_i) + ls(-beta u_i) / K], q = softmax(scores / temperature). Two candidates with
    the target (1, 0) are ``nca_pair``. ``nca@authors`` as of ``infonca``.
    """
    mask = lists.mask
    rewards = column(beta) * lists.logratios
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    noise = (logistic(-rewards) / count).where(mask, 0)
    return (softmax_target(lists, score_temperature) * logistic(rewards) + noise).sum(-1)


@preference_loss(
    "adpo",
    paper="arXiv:2510.18913",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    shift_invariant=True,
    # q = softmax(2, 0, 1), p = softmax(1, 0, -1): sum q log(q / p)
    example=BatchExample(0.1546978979, three, {"score_temperature": 1.0, "normalize_scores": False}),
)
def adpo_loss(
    lists: ListLogps,
    *,
    tau: Positive = 1.0,
    score_temperature: Positive = 0.5,
    normalize_scores: bool = True,
) -> Tensor:
    """Anchored DPO (ADPO): KL of softmax((s - anchor) / tau) from the softmax of normalised scores.

    The anchor is the reference: a frozen model, the old policy, or an exponential average. Scores are
    normalised per group to mean 0 and a sample standard deviation of 1 (the authors' ``scale_rewards``;
    theirs are only centred without it, which cancels here) unless told not to; soft targets of one's own are
    scores of log q with a temperature of 1. K = 2, a hard target and tau = 1 / beta is DPO.
    """
    target = softmax_target(lists, score_temperature, normalize=normalize_scores)
    return listwise_ce(lists.logratios / tau, target, lists.mask) + entropy(target)


@preference_loss(
    "ddo_rm",
    paper="arXiv:2604.11119",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    uses_reference=False,
    length_normalized=True,
    # s = (-3, -2.5, -2), q = softmax(s + r) = softmax(-1, -2.5, -1), p = softmax(s)
    example=BatchExample(1.1802696706, three_free),
)
def ddo_rm_loss(lists: ListLogps, *, tau: Positive = 1.0, eta: NonNegative = 1.0) -> Tensor:
    """DDO-RM: the policy's own choice among the candidates, moved towards their rewards and distilled.

    p = softmax(s / tau) of per-token means s; q = softmax((s + eta r) / tau), detached (centring the
    rewards, as the paper does, cancels); L = -sum q log p. Equal scores give gradient 0.
    """
    means = lists.per_token(lists.logratios)
    improved = (means.detach() + eta * lists.dense_scores) / tau
    target = masked_log_softmax(improved, lists.mask).exp().where(lists.mask, 0)
    return listwise_ce(means / tau, target, lists.mask)


@preference_loss(
    "bolt",
    paper="arXiv:2605.02469 eq. 10",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    uses_reference=False,
    # softmax(2, 0, 1) against 3, 5, 6
    example=BatchExample(3.9142465595, three_free),
)
def bolt_loss(lists: ListLogps, *, score_temperature: Positive = 1.0) -> Tensor:
    """BOLT: likelihood of the reference's samples, weighted by e^(score / temperature), mean 1 per group.

    -(1/K) sum_n w_n s_n. A large temperature is SFT on all, a small one SFT on the best.
    """
    return -(softmax_target(lists, score_temperature) * lists.logratios).sum(-1)


@preference_loss(
    "a_star_po",
    paper="arXiv:2505.20686 (the authors' code)",
    kind="listwise",
    inputs=ListLogps,
    needs=("scores",),
    # V = log((e^2 + 1 + e) / 3) = 1.30899368, so advantages 0.69, -1.31, -0.31 of u = 1, 0, -1
    example=BatchExample(0.7621437583, three, {"beta": 1.0, "value_temperature": 1.0}),
)
def a_star_po_loss(lists: ListLogps, *, beta: PerPair = 1e-3, value_temperature: Positive = 0.5) -> Tensor:
    """A*-PO: each candidate's reward regressed on its advantage over the optimal value of the prompt.

    Mean of (beta u_i - (score_i - V))^2, V = T log mean_j e^(score_j / T) with T the ``value_temperature``:
    the candidates are samples of the reference, which the authors draw beforehand to estimate V. On samples
    of the policy, with V from elsewhere, it is ``direct_advantage`` of score - V, times 2 beta^2.
    """
    scores, mask = lists.dense_scores, lists.mask
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    lowest = torch.finfo(scores.dtype).min
    total = torch.logsumexp((scores / value_temperature).where(mask, lowest), -1, keepdim=True)
    value = value_temperature * (total - count.to(scores.dtype).log())
    squares = regress(column(beta) * lists.logratios, scores - value).where(mask, 0)
    return squares.sum(-1) / count.squeeze(-1) + poison(scores).squeeze(-1)
