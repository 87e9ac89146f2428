"""Losses that distil a teacher: divergences from it over the whole vocabulary, token by token.

The divergences are inputs here, made by the op that sees the logits (``fastdpo.token_divergence``): p is the
policy's distribution at a token, q the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.inputs import PerPair
from fastdpo.losses.ranges import Fraction, Positive
from fastdpo.losses.registry import BatchExample, preference_loss
from fastdpo.losses.stable import token_mean
from fastdpo.losses.token_batches import TokenDivergences


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


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
    total = _of_answers(tokens, total, length_normalize)
    return beta * total if is_adaptive else total


def _of_answers(tokens: TokenDivergences, total: Tensor, length_normalize: bool) -> Tensor:
    """``(B,)`` sums over an answer's tokens, as means over them where asked for."""
    return token_mean(total, tokens.counts) if length_normalize else total


def _gkd_divergence(arguments: Mapping[str, Any]) -> str:
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(arguments.get("jsd_beta", 0.5), "jsd")


def _two_of_one_teacher() -> TokenDivergences:
    """Divergences 0.5 and 0.25; log p = -1, -2 and log q = -1.5, -1, so rewards -0.5 and 1."""
    mask = torch.tensor([[True, True]])
    return TokenDivergences(_tensor(0.5, 0.25)[None], mask)


@preference_loss(
    "gkd",
    paper="arXiv:2306.13649 eq. 1 (TRL's GKDTrainer)",
    kind="token",
    inputs=TokenDivergences,
    uses_reference=False,
    length_normalized=True,
    divergence=_gkd_divergence,
    example=BatchExample(0.375, _two_of_one_teacher),  # (0.5 + 0.25) / 2
)
def gkd_loss(tokens: TokenDivergences, *, jsd_beta: Fraction = 0.5, length_normalize: bool = True) -> Tensor:
    """GKD: a generalised Jensen-Shannon divergence from the teacher, on samples of the policy or on data.

    With b the ``jsd_beta`` and m = b q + (1 - b) p, b KL(q || m) + (1 - b) KL(p || m); 0 is the forward KL(q
    || p) and 1 the reverse KL(p || q), as in TRL, though the divergence itself vanishes towards both. The
    mean is over an answer's tokens, then over answers; TRL's is over the tokens of a batch.
    """
    return _of_answers(tokens, tokens.sums(tokens.divergences), length_normalize)


@preference_loss(
    "minillm",
    paper="arXiv:2306.08543 (the authors' code)",
    kind="token",
    inputs=TokenDivergences,
    uses_reference=False,
    length_normalized=True,
    needs=("logps", "teacher_logps"),
    # returns (-0.5 + 1) / 2 and 1, so (0.5 + 0.25 - (0.25 * -1 + 1 * -2)) / 2
    example=BatchExample(1.5, lambda: _two_samples(), {"discount": 1.0}),
)
def minillm_loss(
    tokens: TokenDivergences, *, discount: Fraction = 0.95, length_normalize: bool = True
) -> Tensor:
    """MiniLLM: the reverse KL from the teacher of whole samples of the policy, by its policy gradient.

    Per token KL(p || q)_t - sg(R_t) log p_t, R_t the discounted rewards log q - log p from t on, over the
    number of tokens that are left; a mean over an answer's tokens, then over answers. The authors' code has
    more around this that is not of the loss: rewards scaled by 0.5 and clipped, advantages whitened over the
    batch, PPO's clipping on rollouts used several times, samples mixed with the teacher's, and an NLL on
    other text.
    """
    if tokens.logps is None or tokens.teacher_logps is None:
        raise ValueError("logps and teacher_logps: got None, wanted both for minillm")
    rewards = (tokens.teacher_logps - tokens.logps).detach().where(tokens.mask, 0)
    left = _suffix_sums(tokens, tokens.mask.to(rewards.dtype), 1.0)
    returns = _suffix_sums(tokens, rewards, discount) / left.clamp(min=1)
    total = tokens.sums(tokens.divergences) - tokens.sums(returns, tokens.logps)
    return _of_answers(tokens, total, length_normalize)


def _two_samples() -> TokenDivergences:
    """The same with log-probabilities of the tokens."""
    one = _two_of_one_teacher()
    return TokenDivergences(
        one.divergences, one.mask, logps=_tensor(-1.0, -2.0)[None], teacher_logps=_tensor(-1.5, -1.0)[None]
    )


def _suffix_sums(tokens: TokenDivergences, values: Tensor, discount: float) -> Tensor:
    """sum_(s >= t) discount^(s - t) values_s within each sequence, in the shape of ``values``.

    In log2(T) steps, each of which doubles how far ahead a token sees.
    """
    length = values.shape[-1]
    sequence = torch.zeros(length, dtype=torch.long, device=values.device)
    if tokens.cu_seqlens is not None:
        bounds = tokens.cu_seqlens.long()
        sequence = torch.searchsorted(bounds, torch.arange(length, device=values.device), right=True)
    sums, step = values.double(), 1
    while step < length:
        later, earlier = (sequence.narrow(0, start, length - step) for start in (step, 0))
        is_same = F.pad(later == earlier, (0, step))
        ahead = F.pad(sums.narrow(-1, step, length - step), (0, step))
        sums = sums + discount**step * ahead.where(is_same, 0)
        step *= 2
    return sums.to(values.dtype)
