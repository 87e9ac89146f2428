"""f-divergence links: slopes, values at 1, and what they become in their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, PairLogps
from fastdpo.losses.links import link
from tests.losses.common import random_pair

BETA = 0.17
sig = torch.sigmoid


def losses(name: str, pair: PairLogps, **arguments: Any) -> Tensor:
    return LOSSES[name].function(pair, **arguments)


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


LINK_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda u: torch.exp(-u),
    "js_divergence": lambda u: sig(-u),
    "alpha_divergence": lambda u: torch.exp(0.7 * u),
}


@pytest.mark.parametrize("divergence", sorted(LINK_SLOPES))
def test_link_slopes_and_zero(divergence: Any) -> None:
    u = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    coefficient = 1.7 if divergence == "alpha_divergence" else 0.5
    value = link(u, divergence, coefficient)
    (slope,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close(slope, LINK_SLOPES[divergence](u.detach()), rtol=1e-12, atol=1e-12)
    assert abs(value[12].item()) < 1e-15  # f'(1) = 0


def test_link_identities() -> None:
    pair = random_pair()
    alpha: dict[str, Any] = {"beta": BETA, "f_divergence_type": "alpha_divergence"}
    assert_same(
        losses("sigmoid", pair, f_alpha_divergence_coef=1.0, **alpha), losses("sigmoid", pair, beta=BETA)
    )
    near_one = losses("sigmoid", pair, f_alpha_divergence_coef=1 + 1e-5, **alpha)
    torch.testing.assert_close(near_one, losses("sigmoid", pair, beta=BETA), rtol=1e-3, atol=1e-6)
    forward = losses("sigmoid", pair, beta=BETA, f_divergence_type="forward_kl")
    assert_same(losses("sigmoid", pair, f_alpha_divergence_coef=0.0, **alpha), forward)
    u = torch.tensor([-60.0], dtype=torch.float64)
    torch.testing.assert_close(link(u, "js_divergence"), u + math.log(2))
    with pytest.raises(
        ValueError, match="f_alpha_divergence_coef: got 0.7 with f_divergence_type 'forward_kl'"
    ):
        link(u, "forward_kl", 0.7)
    with pytest.raises(ValueError, match="f_divergence_type: got 'kl', wanted one of"):
        link(u, "kl")  # type: ignore[arg-type]
