"""Pairwise losses that know by how much: the gap of two answers' rewards, from a reward model or from people.

``reward_gap`` is r_w - r_l, a number or ``(P,)``; negative where the labels say otherwise than the rewards.
h = beta D, D = u_w - u_l.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.heads import exo, logistic, margin_loss, regress
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.ranges import Positive
from fastdpo.losses.registry import Example, preference_loss

# D = 2, so h = 0.4 at beta 0.2, and a gap of rewards of 1.
_PAIR = Example(
    0.0,
    chosen=-12.0,
    rejected=-15.0,
    ref_chosen=-13.0,
    ref_rejected=-14.0,
    chosen_tokens=2,
    rejected_tokens=4,
    options={"reward_gap": 1.0},
)


def _scaled(reward_gap: PerPair | None, scale: float, like: Tensor) -> Tensor:
    """``(P,)`` scale * (r_w - r_l)."""
    if reward_gap is None:
        raise ValueError("reward_gap: got None, wanted r_w - r_l of every pair")
    return scale * torch.as_tensor(reward_gap, dtype=like.dtype, device=like.device).expand_as(like)


@preference_loss(
    "rpo_sq",
    paper="arXiv:2502.00203 (NeMo-Aligner)",
    needs=("reward_gap",),
    shift_invariant=True,
    example=replace(_PAIR, loss=0.36),  # (0.4 - 1)^2
)
def rpo_sq_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.2,
    reward_gap: PerPair | None = None,
    reward_scale: Positive = 1.0,
) -> Tensor:
    """Reward-aware preference optimisation, squared: (h - reward_scale * (r_w - r_l))^2.

    beta is NeMo-Aligner's ``ref_policy_kl_penalty``, ``reward_scale`` its ``gt_reward_scale``.
    """
    return regress(beta * pair.delta, _scaled(reward_gap, reward_scale, pair.delta))


@preference_loss(
    "rpo_bwd_kl",
    paper="arXiv:2502.00203 (NeMo-Aligner)",
    needs=("reward_gap",),
    shift_invariant=True,
    # a = sigmoid(1): a (log a - ls(0.4)) + (1 - a) (log(1 - a) - ls(-0.4))
    example=replace(_PAIR, loss=0.0383887121),
)
def rpo_bwd_kl_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.2,
    reward_gap: PerPair | None = None,
    reward_scale: Positive = 1.0,
) -> Tensor:
    """Reward-aware preference optimisation, backward KL: DPO with the rewards' own probability as label.

    KL(Bernoulli(a) || Bernoulli(sigmoid(h))), a = sigmoid(reward_scale * (r_w - r_l)): 0 at h = that.
    """
    gap = _scaled(reward_gap, reward_scale, pair.delta)
    preferred = torch.sigmoid(gap)
    entropy = preferred * F.logsigmoid(gap) + torch.sigmoid(-gap) * F.logsigmoid(-gap)
    return margin_loss(beta * pair.delta, logistic, preferred) + entropy


@preference_loss(
    "rpo_fwd_kl",
    paper="arXiv:2502.00203 (NeMo-Aligner)",
    needs=("reward_gap",),
    shift_invariant=True,
    # Q = sigmoid(0.4): Q (log Q - ls(1)) + (1 - Q) (log(1 - Q) - ls(-1))
    example=replace(_PAIR, loss=0.0410338391),
)
def rpo_fwd_kl_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.2,
    reward_gap: PerPair | None = None,
    reward_scale: Positive = 1.0,
) -> Tensor:
    """Reward-aware preference optimisation, forward KL: EXO with the rewards' own probability as label.

    KL(Bernoulli(sigmoid(h)) || Bernoulli(a)), a = sigmoid(reward_scale * (r_w - r_l)): 0 at h = that.
    """
    gap = _scaled(reward_gap, reward_scale, pair.delta)
    return exo(beta * pair.delta, F.logsigmoid(gap), F.logsigmoid(-gap))


@preference_loss(
    "rebel",
    paper="arXiv:2404.16767 (the authors' code)",
    needs=("reward_gap",),
    shift_invariant=True,
    example=replace(_PAIR, loss=1.0),  # (2 - 1)^2
)
def rebel_loss(pair: PairLogps, *, reward_gap: PerPair | None = None, reward_scale: Positive = 1.0) -> Tensor:
    """REBEL: the gap of log-ratios regressed on that of the rewards, (D - reward_scale * (r_w - r_l))^2.

    The reference is the policy that the answers were sampled from; ``reward_scale`` is the eta of the
    authors' code, 1 in most of their scripts and 1e6 in the one of large batches.
    """
    return regress(pair.delta, _scaled(reward_gap, reward_scale, pair.delta))
