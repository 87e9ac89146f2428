"""Losses of tokens and steps: what a sum over the answer cannot say.

Divergences over the whole vocabulary are inputs here, made by the op that sees the logits; losses that
distil a teacher by them are in ``distillation.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.batches import DivergencePairLogps, StepLogps
from fastdpo.losses.heads import logistic, margin_loss, regress, scaled_margin
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.ranges import FlipProbability, NonNegative, Positive
from fastdpo.losses.registry import BatchExample, preference_loss
from fastdpo.losses.token_batches import TokenLogps


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _divergent_pair() -> DivergencePairLogps:
    """u_w = 1, u_l = -1, K_w = 0.5, K_l = 2: D = 2 and K_l - K_w = 1.5."""
    return DivergencePairLogps(
        _tensor(-12.0), _tensor(-15.0), _tensor(2.0), _tensor(4.0), _tensor(-13.0), _tensor(-14.0),
        chosen_kl=_tensor(0.5), rejected_kl=_tensor(2.0),
    )  # fmt: skip


def _divergences(pair: PairLogps) -> tuple[Tensor, Tensor]:
    """K_w and K_l."""
    if not isinstance(pair, DivergencePairLogps) or pair.chosen_kl is None or pair.rejected_kl is None:
        raise ValueError("chosen_kl and rejected_kl: got none, wanted a DivergencePairLogps with both")
    return pair.chosen_kl, pair.rejected_kl


@preference_loss(
    "tdpo1",
    paper="arXiv:2404.11999",
    kind="token",
    inputs=DivergencePairLogps,
    needs=("chosen_kl", "rejected_kl"),
    shift_invariant=True,
    example=BatchExample(0.6684596480, _divergent_pair),  # log(1 + e^-0.05), as 0.1 (2 - 1.5) = 0.05
)
def tdpo1_loss(
    pair: DivergencePairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
) -> Tensor:
    """TDPO1: DPO less the difference of forward KLs, -log sigmoid(beta (D - (K_l - K_w))).

    K is the answer's sum of KL(pi_ref || pi) over its tokens.
    """
    chosen_kl, rejected_kl = _divergences(pair)
    h = scaled_margin(pair.delta - (rejected_kl - chosen_kl), beta, margin)
    return margin_loss(h, logistic, 1.0 - label_smoothing)


@preference_loss(
    "tdpo2",
    paper="arXiv:2404.11999",
    kind="token",
    inputs=DivergencePairLogps,
    needs=("chosen_kl", "rejected_kl"),
    shift_invariant=True,
    example=BatchExample(0.6325990353, _divergent_pair),  # log(1 + e^-0.125), as 0.1 (2 - 0.75) = 0.125
)
def tdpo2_loss(
    pair: DivergencePairLogps,
    *,
    beta: PerPair = 0.1,
    margin: PerPair | None = None,
    label_smoothing: FlipProbability = 0.0,
    kl_weight: NonNegative = 0.5,
) -> Tensor:
    """TDPO2: as TDPO1 with the KLs' difference scaled and no gradient through the chosen answer's.

    -log sigmoid(beta (D - kl_weight (K_l - sg(K_w)))); ``kl_weight`` is the paper's alpha.
    """
    chosen_kl, rejected_kl = _divergences(pair)
    gap = pair.delta - kl_weight * (rejected_kl - chosen_kl.detach())
    return margin_loss(scaled_margin(gap, beta, margin), logistic, 1.0 - label_smoothing)


def _steps() -> StepLogps:
    """u = 2 with the advantage 0.03."""
    return StepLogps(_tensor(-1.0), _tensor(0.03), _tensor(3.0), _tensor(-3.0))


@preference_loss(
    "direct_advantage",
    paper="arXiv:2412.18279 eq. 12, 13",
    kind="token",
    inputs=StepLogps,
    example=BatchExample(0.5, _steps),  # (2 - 0.03 / 0.01)^2 / 2
)
def direct_advantage_loss(steps: StepLogps, *, beta: Positive = 0.01) -> Tensor:
    """Direct advantage policy optimisation (DAPO): a step's log-ratio regressed on its advantage over beta.

    (u - A / beta)^2 / 2; the advantages come from a critic trained apart, and the paper keeps states whose
    advantages spread by at least 0.1. Not the decoupled-clip DAPO, of the same initials.
    """
    return regress(steps.logratios, steps.advantages.detach() / beta, 0.5)


def _sample() -> TokenLogps:
    """l = (-1, -2), r = (-1.5, -1), preferred with probability 0.75."""
    mask = torch.tensor([[True, True]])
    return TokenLogps(
        _tensor(-1.0, -2.0)[None], mask, ref_logps=_tensor(-1.5, -1.0)[None], win_rates=_tensor(0.75)
    )


@preference_loss(
    "nash_md",
    paper="arXiv:2312.00886",
    kind="token",
    inputs=TokenLogps,
    needs=("win_rates",),
    # 0.1 (0.5 * -1 + -1 * -2) - 0.25 * -3
    example=BatchExample(0.9, _sample),
)
def nash_md_loss(tokens: TokenLogps, *, beta: PerPair = 0.1) -> Tensor:
    """Nash-MD: REINFORCE for the win rate against the mixture, with the score-function gradient of the KL.

    beta sum_t sg(l_t - r_t) l_t - (P - 1/2) s; the gradient per token is beta (l_t - r_t) - (P - 1/2).
    """
    if tokens.win_rates is None or tokens.ref_logps is None:
        raise ValueError("win_rates and ref_logps: got None, wanted both for nash_md")
    log_ratio = (tokens.logps - tokens.ref_logps).detach()
    reward = (tokens.win_rates.detach() - 0.5) * tokens.sums(tokens.logps)
    return beta * tokens.sums(log_ratio, tokens.logps) - reward
