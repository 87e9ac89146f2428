"""f-divergence links: what stands in for the log-ratio when another D_f ties the policy to the reference.

DPO is the reverse KL, where the link f'(e^u) is u itself. The links carry their constants, f'(1) = 0,
since these do not cancel once each side is divided by its own length.

Source: arXiv:2309.16240; conventions of TRL (alpha: f'(t) = (t^(a - 1) - 1) / (a - 1), so that the
paper's own alpha is 1 - a).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.stable import bounded_expm1, exponent_bound, token_mean

FDivergence: TypeAlias = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
DEFAULT_ALPHA = 0.5


def link(
    logratio: Tensor,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
    *,
    scale: PerPair = 1.0,
    is_squared: bool = False,
) -> Tensor:
    """f'(e^u), elementwise: u, 1 - e^-u, log 2 + log sigmoid(u), or (e^((a-1)u) - 1) / (a - 1).

    Its slope is 1, e^-u, sigmoid(-u) or e^((a-1)u). a = 1 is the reverse KL, a = 0 the forward KL, a = 2
    Pearson's chi-squared.

    Args:
        scale: what it will be multiplied by: exponents are cut off, with gradient 0 beyond, so that the
            product is finite in fp32 (at 80 up to a scale of 1, as in TRL).
        is_squared: whether it will be squared.

    Raises:
        ValueError: an unknown divergence, or a coefficient beside a divergence that has none.
    """
    if f_divergence_type != "alpha_divergence" and f_alpha_divergence_coef != DEFAULT_ALPHA:
        raise ValueError(
            f"f_alpha_divergence_coef: got {f_alpha_divergence_coef} with f_divergence_type "
            f"{f_divergence_type!r}, wanted 'alpha_divergence'"
        )
    if f_divergence_type == "reverse_kl":
        return logratio
    if f_divergence_type == "forward_kl":
        return -bounded_expm1(-logratio, _most(scale, is_squared))
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratio)
    if f_divergence_type == "alpha_divergence":
        power = f_alpha_divergence_coef - 1
        if abs(power) < 1e-6:
            return logratio
        most = _most(scale * max(1.0, 1 / abs(power)), is_squared)
        return bounded_expm1(power * logratio, most) / power
    raise ValueError(f"f_divergence_type: got {f_divergence_type!r}, wanted one of {get_args(FDivergence)}")


def _most(scale: PerPair, is_squared: bool) -> PerPair:
    return exponent_bound(scale) / (2 if is_squared else 1)


def linked_gap(
    pair: PairLogps,
    f_divergence_type: FDivergence,
    f_alpha_divergence_coef: float,
    *,
    scale: PerPair,
    is_squared: bool = False,
    length_normalize: bool = False,
) -> Tensor:
    """link(u_w) - link(u_l), ``(P,)``, each over its number of tokens with ``length_normalize``."""
    chosen, rejected = (
        link(u, f_divergence_type, f_alpha_divergence_coef, scale=scale, is_squared=is_squared)
        for u in (pair.chosen_logratios, pair.rejected_logratios)
    )
    if not length_normalize:
        return chosen - rejected
    return token_mean(chosen, pair.chosen_tokens) - token_mean(rejected, pair.rejected_tokens)
