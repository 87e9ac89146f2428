"""Losses of tokens and steps: what a sum over the answer cannot say.

Divergences over the whole vocabulary are inputs here, made by the op that sees the logits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastdpo.losses.batches import DivergencePairLogps, StepLogps
from fastdpo.losses.heads import logistic, margin_loss, regress, scaled_margin
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.ranges import FlipProbability, NonNegative, Positive
from fastdpo.losses.registry import BatchExample, preference_loss
from fastdpo.losses.stable import token_mean
from fastdpo.losses.token_batches import TokenDivergences, TokenLogps


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


class Teacher(NamedTuple):
    """AlignDistil's teacher: softmax(first * z_dpo + second * z_other), and the scale of its divergence."""

    first: Tensor
    second: Tensor
    scale: Tensor


TeacherMode = Literal["aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive"]
# Their w varies from token to token and does not depend on beta.
ADAPTIVE_MODES = ("aligndistil", "theorem1_adaptive")


@torch.no_grad()
def aligndistil_teacher(
    l1_distance: Tensor, *, mode: TeacherMode = "aligndistil", beta: PerPair = 0.1, beta2: float = 10.0
) -> Teacher:
    """Per token: the combination of two teachers' logits, and what the divergence from it is scaled by.

    With w_t = beta2 * d_t + 1e-3 (``aligndistil``, ``theorem1_adaptive``) or w = beta / beta2:
    ``aligndistil`` and ``theorem1_contrast`` have the teacher z_dpo + w (z_dpo - z_other), the others
    w z_dpo + (1 - w) z_other. The scale is beta / w_t where w varies, else beta2.

    Args:
        l1_distance: d_t per token, sum_v |p_dpo(v) - p_other(v)|, without the half of a total variation.
        mode: ``aligndistil``: z_other is a reverse DPO model or the reference; ``theorem1`` and
            ``theorem1_adaptive``: the reference; ``theorem1_contrast``: a reverse DPO model.
        beta, beta2: positive numbers; beta2 is 10 off-policy and 15 on-policy.

    Raises:
        ValueError: another mode, or a beta that is no positive number.

    Source: arXiv:2503.02832, the authors' code.
    """
    offset, slope = _teacher_weight(mode, beta, beta2)
    weight = offset + slope * l1_distance
    scale = beta / weight if slope else torch.full_like(l1_distance, beta2)
    if mode in ("aligndistil", "theorem1_contrast"):
        return Teacher(1 + weight, -weight, scale)
    return Teacher(weight, 1 - weight, scale)


def aligndistil_coefficients(
    *, mode: TeacherMode = "aligndistil", beta: PerPair = 0.1, beta2: float = 10.0
) -> tuple[float, float, float, float]:
    """``aligndistil_teacher``'s ``first`` and ``second`` as functions of d_t, for an op that makes d_t.

    Returns:
        What each is at d_t = 0, then the slope of each: ``fastdpo.TeacherCombination(*these)``. The scale
        is ``aligndistil_teacher``'s, from the distance that the op returns.
    """
    offset, slope = _teacher_weight(mode, beta, beta2)
    if mode in ("aligndistil", "theorem1_contrast"):
        return 1 + offset, -offset, slope, -slope
    return offset, 1 - offset, slope, -slope


def _teacher_weight(mode: str, beta: PerPair, beta2: float) -> tuple[float, float]:
    """w_t at d_t = 0, and its slope."""
    if mode not in get_args(TeacherMode):
        raise ValueError(f"mode: got {mode!r}, wanted one of {', '.join(get_args(TeacherMode))}")
    if not beta2 > 0:
        raise ValueError(f"beta2: got {beta2!r}, wanted a number in (0, inf)")
    if mode in ADAPTIVE_MODES:
        return 1e-3, beta2
    if isinstance(beta, Tensor):
        wanted = f"a number with teacher_mode={mode!r}, whose teacher it is part of"
        raise ValueError(f"beta: got a tensor of shape {tuple(beta.shape)}, wanted {wanted}")
    if not beta > 0:
        raise ValueError(f"beta: got {beta!r}, wanted a number in (0, inf)")
    return beta / beta2, 0.0


def _two_tokens() -> TokenDivergences:
    """Divergences 0.5 and 0.25, and w = 0.05 and 0.025 where beta2 is 0.25."""
    mask = torch.tensor([[True, True]])
    return TokenDivergences(_tensor(0.5, 0.25)[None], mask, l1_distance=_tensor(0.196, 0.096)[None])


@preference_loss(
    "aligndistil",
    paper="arXiv:2503.02832",
    kind="token",
    inputs=TokenDivergences,
    length_normalized=True,
    # (0.5 * 0.1 / 0.05 + 0.25 * 0.1 / 0.025) / 2
    example=BatchExample(1.0, _two_tokens, {"beta2": 0.25}),
)
def aligndistil_loss(
    tokens: TokenDivergences,
    *,
    beta: PerPair = 0.1,
    beta2: Positive = 10.0,
    teacher_mode: TeacherMode = "aligndistil",
    length_normalize: bool = True,
) -> Tensor:
    """AlignDistil: the KL divergence from a teacher made of two, each token with its own scale.

    The mean over an answer's tokens of scale_t KL(pi || teacher_t), as both launch scripts of the authors
    have it; their sum, the paper's, with ``length_normalize=False``. Teacher and scale are
    ``aligndistil_teacher``'s: the divergences must be from the teacher of the same ``teacher_mode`` and
    betas (``aligndistil_coefficients``). Off-policy on chosen answers only, or on samples.
    """
    if tokens.l1_distance is None:
        raise ValueError("l1_distance: got None, wanted a value for aligndistil")
    # A weight that varies takes beta out of the sum, so that an answer may have its own.
    is_adaptive = teacher_mode in ADAPTIVE_MODES
    teacher = aligndistil_teacher(
        tokens.l1_distance, mode=teacher_mode, beta=1.0 if is_adaptive else beta, beta2=beta2
    )
    total = tokens.sums(tokens.divergences, teacher.scale)
    total = token_mean(total, tokens.counts) if length_normalize else total
    return beta * total if is_adaptive else total


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
