"""Where the reference log-probabilities of a loss come from, when it is not one model alone.

One model, or a column of precomputed numbers, is ``ref_logps`` as it is; no reference is None, and zeros
are a uniform one. The functions here make one reference out of K. They carry no gradient.

Legend: K references, P answers (or pairs); ``logps`` ``(K, P)``, in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastdpo.losses.ranges import can_be_read

Fusion = Literal["max_margin", "mean"]


@torch.no_grad()
def harmonic(logps: Tensor, weights: Tensor | None = None) -> Tensor:
    """The virtual reference of MRPO, 1 / p~ = sum_k a_k / p_k: -logsumexp_k(log a_k - logps_k), ``(P,)``.

    It lies between the least and the most likely reference, nearer the least. The authors' code for two
    references pairs each weight with the other's probability; this is the paper's formula.

    Args:
        logps: ``(K, P)`` sums.
        weights: ``(K,)`` or ``(K, P)``, at least 0, adding up to 1 over K; None: 1 / K.

    Raises:
        ValueError: a wrong shape, or (on the CPU) weights that are negative or do not add up to 1.

    Source: arXiv:2405.16388.
    """
    return -torch.logsumexp(_weights(logps, weights).log() - logps, 0)


@torch.no_grad()
def geometric(logps: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weighted mean of log-probabilities, prod_k p_k^a_k, ``(P,)``. Arguments as for ``harmonic``."""
    return (_weights(logps, weights) * logps).sum(0)


@torch.no_grad()
def discriminative_weights(chosen: Tensor, rejected: Tensor) -> Tensor:
    """MRPO's adaptive weights, ``(K, P)``: a_k = |D_k| / sum_j |D_j|, D_k = chosen_k - rejected_k.

    1 / K where no reference tells the answers apart.

    Args:
        chosen, rejected: ``(K, P)`` sums of both answers.
    """
    gaps = (chosen - rejected).abs()
    total = gaps.sum(0, keepdim=True)
    return torch.where(total > 0, gaps / total.where(total > 0, 1), 1 / len(gaps))


@torch.no_grad()
def clip_to_first(logps: Tensor, eta: float | Tensor) -> Tensor:
    """Each reference clipped into [(1 + eta) logps_0, (1 - eta) logps_0], ``(K, P)``.

    Args:
        logps: ``(K, P)``, at most 0; the first is the policy's own initial model, and stays.
        eta: in [0, 1], a number or ``(P,)``.

    Source: arXiv:2405.16388 (clipped trust region optimisation, CTRO).
    """
    first = logps.narrow(0, 0, 1)
    return torch.maximum(torch.minimum(logps, (1 - eta) * first), (1 + eta) * first)


@torch.no_grad()
def mrpo_reference(
    chosen: Tensor, rejected: Tensor, *, weights: Tensor | None = None, eta: float | None = 0.1
) -> tuple[Tensor, Tensor]:
    """MRPO's reference for both answers, ``(P,)`` each: clip, weight, mix.

    Args:
        chosen, rejected: ``(K, P)`` sums; the first reference is the policy's own initial model.
        weights: ``(K,)`` or ``(K, P)``; None: ``discriminative_weights`` of the unclipped sums.
        eta: width of the clipping, shared out between the answers by the size of the references' mean
            log-probabilities, eta_w = eta |b_w| / (|b_w| + |b_l|); None: no clipping.

    Source: arXiv:2405.16388. Plain multi-reference DPO is a weighted sum of DPO losses instead.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected: got shape {tuple(rejected.shape)}, wanted {tuple(chosen.shape)}")
    if weights is None:
        weights = discriminative_weights(chosen, rejected)
    if eta is not None:
        if not 0 <= eta <= 1:  # beyond 1 a reference might have log-probabilities above 0
            raise ValueError(f"eta: got {eta!r}, wanted a number in [0, 1] or None")
        size, other = chosen.mean(0).abs(), rejected.mean(0).abs()
        total = size + other
        eta_chosen = torch.where(total > 0, eta * size / total.where(total > 0, 1), eta / 2)
        chosen, rejected = clip_to_first(chosen, eta_chosen), clip_to_first(rejected, eta - eta_chosen)
    return harmonic(chosen, weights), harmonic(rejected, weights)


@torch.no_grad()
def max_margin(means: Tensor, pivot: Tensor) -> Tensor:
    """Of K source models, the one whose probability of the answer is farthest from the pivot's, ``(P,)``.

    argmax_k |exp(means_k) - exp(pivot)|, the first of equals. All per-token means, so that models with
    different tokenizers compare.

    Args:
        means: ``(K, P)`` mean log-probabilities under the sources.
        pivot: ``(P,)`` the same under the pivot's initial model.

    Source: arXiv:2505.13878 eq. 9-11.
    """
    distance = (means.exp() - pivot.exp()).abs()
    # Not argmax: which of two equals it returns is not defined.
    first = (distance == distance.amax(0)).long().cumsum(0).eq(0).sum(0).clamp(max=len(means) - 1)
    chosen = means.gather(0, first.unsqueeze(0)).squeeze(0)
    return chosen.masked_fill(distance.isnan().any(0), torch.nan)


@torch.no_grad()
def fused_reference(
    chosen: Tensor,
    rejected: Tensor,
    pivot_chosen: Tensor,
    pivot_rejected: Tensor,
    *,
    fusion: Fusion = "max_margin",
    weights: Tensor | None = None,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    """A reference fused of source models (as in InfiFPO), per-token means ``(P,)`` for both answers.

    Sources are first clipped to be no less sure of the preference than the pivot: chosen answers from
    below, rejected ones from above. For ``sigmoid_norm``, multiply by the number of tokens.

    Args:
        chosen, rejected: ``(K, P)`` mean log-probabilities under the sources.
        pivot_chosen, pivot_rejected: ``(P,)`` the same under the pivot's initial model.
        fusion: ``max_margin`` or ``mean``.
        weights: ``(K,)`` for a weighted ``mean``.
        clip: whether to clip.

    Raises:
        ValueError: an unknown fusion, weights beside ``max_margin``, or a wrong shape.

    Source: arXiv:2505.13878 eq. 9-13. The authors' ``ref_offset`` is not offered: what it does is not
    published.
    """
    if fusion not in ("max_margin", "mean"):
        raise ValueError(f"fusion: got {fusion!r}, wanted 'max_margin' or 'mean'")
    if fusion == "max_margin" and weights is not None:
        raise ValueError("weights: got a value with fusion 'max_margin', wanted fusion 'mean'")
    for name, value, like in (
        ("rejected", rejected, chosen.shape),
        ("pivot_chosen", pivot_chosen, chosen.shape[1:]),
        ("pivot_rejected", pivot_rejected, chosen.shape[1:]),
    ):
        if value.shape != like:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {tuple(like)}")
    if clip:
        chosen, rejected = torch.maximum(chosen, pivot_chosen), torch.minimum(rejected, pivot_rejected)
    if fusion == "mean":
        return geometric(chosen, weights), geometric(rejected, weights)
    return max_margin(chosen, pivot_chosen), max_margin(rejected, pivot_rejected)


def _weights(logps: Tensor, weights: Tensor | None) -> Tensor:
    """``(K, P)`` weights in the dtype of ``logps``."""
    if logps.dim() != 2 or len(logps) == 0:
        raise ValueError(f"logps: got shape {tuple(logps.shape)}, wanted (K, P) with K at least 1")
    if weights is None:
        return torch.full_like(logps, 1 / len(logps))
    if weights.shape not in (logps.shape, logps.shape[:1]):
        wanted = f"{tuple(logps.shape[:1])} or {tuple(logps.shape)}"
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, wanted {wanted}")
    if weights.dim() == 1:
        weights = weights.unsqueeze(1)
    if can_be_read(weights):
        total = weights.double().sum(0)
        if not ((weights >= 0).all() and torch.allclose(total, torch.ones_like(total), atol=1e-5)):
            raise ValueError(
                "weights: got negative ones, or ones that do not add up to 1 over the references"
            )
    return weights.to(logps.dtype).expand_as(logps)
