"""References made of several: the papers' identities and bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, PairLogps
from fastdpo.losses.reference_logps import (
    clip_to_first,
    discriminative_weights,
    fused_reference,
    geometric,
    harmonic,
    max_margin,
    mrpo_reference,
)


def logps(k: int = 3, answers: int = 6, seed: int = 0, scale: float = 20.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(k, answers, generator=generator, dtype=torch.float64)


def test_harmonic_is_the_weighted_mean_of_inverse_probabilities() -> None:
    sums = logps()
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    want = -(weights[:, None] / sums.exp()).sum(0).log()
    torch.testing.assert_close(harmonic(sums, weights), want)
    torch.testing.assert_close(harmonic(sums, weights[:, None].expand(3, 6)), want)
    assert (harmonic(sums) <= sums.max(0).values).all() and (harmonic(sums) >= sums.min(0).values).all()


def test_identical_and_single_references_are_themselves() -> None:
    one = logps(1)
    torch.testing.assert_close(harmonic(one.expand(4, 6)), one[0], rtol=1e-14, atol=0)
    assert torch.equal(harmonic(one), one[0])
    three = logps()
    for k in range(3):
        alone = torch.eye(3, dtype=torch.float64)[k]
        torch.testing.assert_close(harmonic(three, alone), three[k], rtol=1e-14, atol=0)
        torch.testing.assert_close(geometric(three, alone), three[k], rtol=1e-14, atol=0)
    far = torch.tensor([[-1e4, 0.0], [0.0, 1e4]])
    assert harmonic(far).isfinite().all()


def test_two_references_as_the_authors_formula_with_the_weights_the_right_way_round() -> None:
    sums = logps(2, scale=5.0)
    a = 0.3
    mixed = (1 - a) * sums[0].exp() + a * sums[1].exp()
    want = sums[0] + sums[1] - mixed.log()  # a / p_0 + (1 - a) / p_1 over a common denominator
    torch.testing.assert_close(harmonic(sums, torch.tensor([a, 1 - a], dtype=torch.float64)), want)


def test_discriminative_weights() -> None:
    chosen = torch.tensor([[3.0, 1.0], [0.0, 1.0]])
    rejected = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    got = discriminative_weights(chosen, rejected)
    torch.testing.assert_close(got, torch.tensor([[0.75, 0.5], [0.25, 0.5]]))  # no gap anywhere: 1 / K


def test_clip_to_first() -> None:
    sums = torch.tensor([[-10.0, -10.0, -10.0], [-10.5, -30.0, -2.0]])
    torch.testing.assert_close(clip_to_first(sums, 0.1), torch.tensor([[-10.0] * 3, [-10.5, -11.0, -9.0]]))
    assert torch.equal(clip_to_first(sums, 0.0)[1], sums[0])


def test_mrpo_reference_shares_the_clipping_out() -> None:
    chosen = torch.tensor([[-10.0], [-40.0]])
    rejected = torch.tensor([[-30.0], [-20.0]])
    weights = torch.tensor([0.5, 0.5])
    ref_chosen, ref_rejected = mrpo_reference(chosen, rejected, weights=weights, eta=0.1)
    # |b| is 25 for both: eta 0.05 each, so -40 is cut to -10.5 and -20 to -28.5
    want = harmonic(torch.tensor([[-10.0, -30.0], [-10.5, -28.5]]), weights)
    torch.testing.assert_close(torch.cat([ref_chosen, ref_rejected]), want)
    # |b| is 10 and 30: eta 0.025 and 0.075, so -12 is cut to -8.2 and -20 to -37
    uneven = mrpo_reference(
        torch.tensor([[-8.0], [-12.0]]), torch.tensor([[-40.0], [-20.0]]), weights=weights, eta=0.1
    )
    want = harmonic(torch.tensor([[-8.0, -40.0], [-8.2, -37.0]]), weights)
    torch.testing.assert_close(torch.cat(uneven), want)
    free = mrpo_reference(chosen, rejected, eta=None)
    adaptive = discriminative_weights(chosen, rejected)
    torch.testing.assert_close(free, (harmonic(chosen, adaptive), harmonic(rejected, adaptive)))
    same = mrpo_reference(chosen[:1].expand(3, 1), rejected[:1].expand(3, 1))
    torch.testing.assert_close(same, (chosen[0], rejected[0]))
    empty = mrpo_reference(torch.zeros(2, 1), torch.zeros(2, 1))
    assert empty[0].item() == 0 and empty[1].item() == 0


def test_max_margin_and_ties() -> None:
    means = torch.tensor([[-1.0, -3.0, -1.0], [-0.1, -0.5, -1.0], [-4.0, -0.4, -1.0]])
    pivot = torch.tensor([-0.2, -3.0, -1.0])
    assert max_margin(means, pivot).tolist() == pytest.approx([-4.0, -0.4, -1.0])
    assert max_margin(torch.tensor([[-1.0], [torch.nan]]), torch.tensor([-1.0])).isnan()


def test_one_source_that_is_the_pivot_is_sigmoid_norm() -> None:
    generator = torch.Generator().manual_seed(1)
    sums = [-30 * torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(4)]
    tokens = torch.tensor([3.0, 5.0, 2.0, 9.0]).double(), torch.tensor([4.0, 1.0, 7.0, 2.0]).double()
    pivot = sums[2] / tokens[0], sums[3] / tokens[1]
    plain = LOSSES["sigmoid_norm"].function(PairLogps(sums[0], sums[1], *tokens, sums[2], sums[3]))
    for fusion in ("max_margin", "mean"):
        fused = fused_reference(pivot[0][None], pivot[1][None], *pivot, fusion=fusion)  # type: ignore[arg-type]
        pair = PairLogps(sums[0], sums[1], *tokens, fused[0] * tokens[0], fused[1] * tokens[1])
        torch.testing.assert_close(LOSSES["sigmoid_norm"].function(pair), plain)


def test_clipping_makes_the_fused_reference_surer_than_the_pivot() -> None:
    chosen, rejected, pivot = logps(seed=1, scale=3.0), logps(seed=2, scale=3.0), logps(2, seed=3, scale=3.0)
    for fusion in ("max_margin", "mean"):
        fused = fused_reference(chosen, rejected, pivot[0], pivot[1], fusion=fusion)  # type: ignore[arg-type]
        assert (fused[0] - fused[1] >= pivot[0] - pivot[1]).all()
    free = fused_reference(chosen, rejected, pivot[0], pivot[1], fusion="mean", clip=False)
    torch.testing.assert_close(free, (chosen.mean(0), rejected.mean(0)))
    heavy = torch.tensor([0.5, 0.25, 0.25])
    weighted = fused_reference(chosen, rejected, pivot[0], pivot[1], fusion="mean", weights=heavy, clip=False)
    torch.testing.assert_close(weighted[0], (heavy[:, None].double() * chosen).sum(0))


BAD: list[tuple[Any, str]] = [
    (lambda x: harmonic(x[0]), r"logps: got shape \(6,\), wanted \(K, P\)"),
    (lambda x: harmonic(x[:0]), "with K at least 1"),
    (lambda x: harmonic(x, torch.ones(2) / 2), r"weights: got shape \(2,\), wanted \(3,\) or \(3, 6\)"),
    (lambda x: harmonic(x, torch.ones(3)), "do not add up to 1"),
    (lambda x: harmonic(x, torch.tensor([1.5, -0.5, 0.0])), "got negative ones"),
    (lambda x: harmonic(x, torch.full((3,), torch.nan)), "do not add up to 1"),
    (lambda x: mrpo_reference(x, x[:, :2]), r"rejected: got shape \(3, 2\)"),
    (lambda x: mrpo_reference(x, x, eta=-0.1), "eta: got -0.1"),
    (lambda x: fused_reference(x, x, x[0], x[0], fusion="vote"), "fusion: got 'vote'"),
    (lambda x: fused_reference(x, x, x[0], x[0], weights=torch.ones(3) / 3), "wanted fusion 'mean'"),
    (lambda x: fused_reference(x, x, x[0], x), r"pivot_rejected: got shape \(3, 6\), wanted \(6,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(logps())
