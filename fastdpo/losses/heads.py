"""The generic heads: a handful of functions that most preference losses are choices of.

They take plain tensors of scores, so they serve whatever has scores: log-probabilities, reward heads
(``bradley_terry``, ``direct_preference_head``), or the negative errors of a diffusion model.

* ``margin_loss``: with m = beta * (u_w - u_l) - psi and q the probability that the chosen answer is the
  better one, L = q phi(m) + (1 - q) phi(-m); dL/dm = sigmoid(m) - q for the logistic phi
* ``regress``: squared distance of a score to its target
* ``value_loss``: one answer alone, desirable or not
* ``listwise_ce``: cross-entropy of a target distribution against the softmax of the scores of a list
* ``rank_hinge``: relu(margin - (better - worse))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.inputs import PerPair
from fastdpo.losses.stable import bounded_expm1, exponent_bound, log1mexp, sigmoid_times_exp


def logistic(m: Tensor) -> Tensor:
    """-log sigmoid(m); linear for very negative m, never infinite. ln 2 at 0."""
    return -F.logsigmoid(m)


def hinge(m: Tensor) -> Tensor:
    """relu(1 - m)."""
    return F.relu(1 - m)


def ipo(m: Tensor, beta: PerPair) -> Tensor:
    """((m - 1/2) / beta)^2: the squared distance of m / beta from IPO's target, 1 / (2 beta)."""
    return ((m - 0.5) / beta) ** 2


def discopop(m: Tensor, tau: float, scale: PerPair = 1.0) -> Tensor:
    """(1 - w) (-log sigmoid(m)) + w e^-m with w = sigmoid(m / tau). Not convex. (ln 2 + 1) / 2 at 0.

    With tau below 1 the second term vanishes on both sides; above, it grows as e^(-m (1 - 1/tau)) and is cut
    off at e^80 / ``scale``, which is what m was multiplied by, and its gradient will be.
    """
    return logistic(m) * torch.sigmoid(-m / tau) + sigmoid_times_exp(m / tau, -m, exponent_bound(scale))


def exo(m: Tensor, chosen: PerPair, rejected: PerPair) -> Tensor:
    """KL(Bernoulli(sigmoid(m)) || Bernoulli(q)), of log q = ``chosen`` and log(1 - q) = ``rejected``."""
    return torch.sigmoid(m) * (F.logsigmoid(m) - chosen) + torch.sigmoid(-m) * (F.logsigmoid(-m) - rejected)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log odds(w) - log odds(l) of two log-probabilities, odds = p / (1 - p); p at most 1 - eps."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def alpha_reward(logp: Tensor, alpha: float, scale: PerPair = 1.0) -> Tensor:
    """AlphaPO's shape of a mean log-probability, (1 - e^(-alpha x)) / alpha; x itself at alpha = 0.

    ``scale`` is what it will be multiplied by: exponents are cut off so that the product is finite in fp32.
    """
    if alpha == 0:
        return logp
    return -bounded_expm1(-alpha * logp, exponent_bound(scale * max(1.0, 1 / abs(alpha)))) / alpha


def scaled_margin(gap: Tensor, beta: PerPair, margin: PerPair | None) -> Tensor:
    """m = beta * gap - psi, ``(P,)``."""
    return beta * gap if margin is None else beta * gap - margin


def preferred_probability(label_smoothing: float, soft_labels: PerPair | None) -> PerPair:
    """q: ``soft_labels`` where given, else 1 - ``label_smoothing``.

    Raises:
        ValueError: both are given; they say the same thing in two ways.
    """
    if soft_labels is None:
        return 1.0 - label_smoothing
    if label_smoothing != 0:
        raise ValueError(
            f"label_smoothing: got {label_smoothing} together with soft_labels, wanted one of the two"
        )
    return soft_labels


def margin_loss(m: Tensor, phi: Callable[[Tensor], Tensor], preferred: PerPair = 1.0) -> Tensor:
    """q phi(m) + (1 - q) phi(-m), ``(P,)``.

    Args:
        m: ``(P,)`` margins.
        phi: the penalty of a margin, elementwise.
        preferred: q, a number or ``(P,)`` in [0, 1]; 1.0 for hard labels.
    """
    if isinstance(preferred, float) and preferred == 1.0:
        return phi(m)
    return preferred * phi(m) + (1 - preferred) * phi(-m)


def regress(score: Tensor, target: PerPair, scale: float = 1.0) -> Tensor:
    """scale * (score - target)^2, elementwise; the gradient is 2 scale (score - target)."""
    return scale * (score - target) ** 2


def value_loss(m: Tensor, is_desirable: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """phi(m) for a desirable answer, phi(-m) for an undesirable one, ``(B,)``.

    Args:
        m: ``(B,)`` scores less their reference point.
        is_desirable: ``(B,)`` bool.
        phi: ``logistic`` (BCO) or ``unlikelihood`` (KTO).
    """
    return phi(m.where(is_desirable, -m))


def unlikelihood(m: Tensor) -> Tensor:
    """1 - sigmoid(m), without cancellation."""
    return torch.sigmoid(-m)


def listwise_ce(scores: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """-sum_i q_i log softmax_i(scores), ``(G,)``: cross-entropy against a target over each list.

    The gradient is sum(q) softmax(scores) - q; DPO is a list of two with the target (1, 0).

    Args:
        scores: ``(G, K)``, a row per list.
        target: ``(G, K)``, at least 0, 0 where masked away; carries no gradient.
        mask: ``(G, K)`` bool, the candidates there are; None: all. A list of one gives 0.
    """
    return -(target.detach() * masked_log_softmax(scores, mask)).sum(-1)


def masked_log_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """log softmax over the last dimension among the masked; 0, with gradient 0, at all others."""
    if mask is None:
        return scores.log_softmax(-1)
    # The lowest finite number: -inf would make a list without candidates NaN, in the gradient too.
    lowest = torch.finfo(scores.dtype).min
    return scores.where(mask, lowest).log_softmax(-1).where(mask, 0)


def rank_hinge(better: Tensor, worse: Tensor, margin: PerPair = 0.0) -> Tensor:
    """relu(margin - (better - worse)), elementwise."""
    return F.relu(margin - (better - worse))


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: PerPair | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """Reward model: -log sigmoid(r_w - r_l - margin), and ``centering`` * (r_w + r_l)^2, ``(P,)``.

    With ``label_smoothing`` the contrastive form of direct preference heads. Gradient without centring:
    sigmoid(d) - (1 - eps) on the chosen reward, minus that on the rejected.

    Args:
        chosen, rejected: ``(P,)`` rewards, of any unit.
        margin: a number or ``(P,)``; arXiv:2307.09288 eq. 2.
        label_smoothing: probability that the label is flipped.
        centering: weight that pulls the rewards' sum to 0; arXiv:2312.09244.

    Source: arXiv:1909.08593; arXiv:2405.20053 (ConDPH).
    """
    gap = chosen - rejected
    loss = margin_loss(gap if margin is None else gap - margin, logistic, 1.0 - label_smoothing)
    return loss + centering * (chosen + rejected) ** 2 if centering else loss


def direct_preference_head(chosen: Tensor, rejected: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    """Direct preference heads, separable form (SepDPH): each reward classified on its own, ``(P,)``.

    -(1 - eps) ls(r_w) - eps ls(-r_w) - eps ls(r_l) - (1 - eps) ls(-r_l). Gradient: sigmoid(r_w) - (1 - eps)
    and sigmoid(r_l) - eps. The contrastive form is ``bradley_terry`` with ``label_smoothing``.

    Source: arXiv:2405.20053.
    """
    return margin_loss(chosen, logistic, 1.0 - label_smoothing) + margin_loss(
        rejected, logistic, label_smoothing
    )


def last_token_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of each sequence's last token, for a reward head: ``(B, T, H)`` -> ``(B, H)``.

    Args:
        hidden: ``(B, T, H)``.
        mask: ``(B, T)`` bool, the tokens there are, padding on either side. A sequence without a token
            gives zeros.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, -1).amax(-1)
    states = hidden.gather(1, last.clamp(min=0).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)
    return states.where((last >= 0).unsqueeze(-1), 0)
