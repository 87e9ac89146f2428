"""Additive terms: numbers per row or token to weight, average and add to a loss.

They are no entries of the registry since their rows are other ones (samples, tokens) than the loss's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.aggregate import sequence_sums
from fastdpo.losses.heads import logistic
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.stable import bounded_expm1


def score_function_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """s * sg(s - s_ref), ``(B,)``: its mean over samples of the policy has the gradient of KL(pi || pi_ref).

    The value is no divergence. HyPO's online term: arXiv:2406.01462 alg. 1.

    Args:
        logps, ref_logps: ``(B,)`` sums over answers sampled from the policy as it is now.
    """
    return logps * (logps - ref_logps).detach()


def exploration_bonus(pair: PairLogps, chosen_is_reference: Tensor) -> Tensor:
    """s(y~), ``(P,)``, y~ being the pair's answer sampled from the reference: its likelihood goes down.

    XPO adds alpha (1e-5) times its mean to DPO's loss: arXiv:2405.21046 alg. 1.

    Args:
        pair: pairs of a sample of the policy and one of the reference, ordered by preference.
        chosen_is_reference: ``(P,)`` bool: the chosen one is the reference's.
    """
    return torch.where(chosen_is_reference, pair.chosen, pair.rejected)


def anchor(logratios: Tensor, *, beta: PerPair = 0.1, delta: PerPair = 0.0) -> Tensor:
    """-log sigmoid(beta u - delta), ``(P,)``: keeps an answer's reward above delta (mDPO, OPA-DPO).

    Args:
        logratios: ``(P,)`` u of the answers to hold up; minus u for those to hold down.
    """
    return logistic(beta * logratios - delta)


def k3(log_ratio: Tensor) -> Tensor:
    """e^d - d - 1, elementwise, at least 0: an estimate of a KL divergence; its slope is e^d - 1."""
    return bounded_expm1(log_ratio) - log_ratio


def trust_region(logps: Tensor, old_logps: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean over all tokens of k3(old - new), ``()``: TRPA's trust region, weighted 0.001 there.

    Args:
        logps, old_logps: per token, ``(B, T)`` or ``(N_all,)``; the second without a gradient.
        mask: bool: the tokens that count.
        cu_seqlens: ``(B + 1,)`` or None.
    """
    # Masked before the difference, whose gradient is a product: a NaN there would come back as one.
    gaps = old_logps.detach().where(mask, 0) - logps.where(mask, 0)
    total = sequence_sums(k3(gaps), mask, cu_seqlens).sum()
    return total / mask.sum().clamp(min=1)


def implicit_rewards(logps: Tensor, ref_logps: Tensor, *, beta: PerPair = 0.1) -> Tensor:
    """beta (log pi - log pi_ref), detached: the reward, or step value, that a policy stands for."""
    return (beta * (logps - ref_logps)).detach()


def reward_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Share of pairs whose chosen answer has the higher reward, ``()``; a tie is no success."""
    if len(chosen_rewards) == 0:
        raise ValueError("chosen_rewards: got no pairs, wanted at least one")
    return (chosen_rewards > rejected_rewards).double().mean()
