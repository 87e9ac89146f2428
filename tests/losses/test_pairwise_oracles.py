"""Gradients and identities that the papers of the pairwise losses state, beyond those of test_formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, PairLogps, build_objective
from tests.losses.common import mean_loss, random_pair

BETA, EPS, GAMMA, TAU, LAMBDA = 0.17, 0.2, 0.7, 0.4, 3.0
sig = torch.sigmoid


def losses(name: str, pair: PairLogps, **arguments: Any) -> Tensor:
    return LOSSES[name].function(pair, **arguments)


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def swapped(pair: PairLogps) -> PairLogps:
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_tokens=pair.rejected_tokens,
        rejected_tokens=pair.chosen_tokens,
        ref_chosen=pair.ref_rejected,
        ref_rejected=pair.ref_chosen,
    )


def parts(p: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
    """beta u_w, beta u_l and h."""
    a, b = BETA * p.chosen_logratios.detach(), BETA * p.rejected_logratios.detach()
    return a, b, a - b


def means(p: PairLogps) -> tuple[Tensor, Tensor]:
    return p.chosen.detach() / p.chosen_tokens, p.rejected.detach() / p.rejected_tokens


def exo_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    _, _, h = parts(p)
    slope = BETA * sig(h) * sig(-h) * (h - math.log((1 - EPS) / EPS))
    return slope, -slope


def discopop_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    _, _, m = parts(p)
    w = sig(m / TAU)
    slope = -(1 - w) * sig(-m) - w * torch.exp(-m) + (w * (1 - w) / TAU) * (torch.exp(-m) + torch.log(sig(m)))
    return BETA * slope, -BETA * slope


def dpop_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    u = p.chosen_logratios.detach()
    m = BETA * (p.delta.detach() - LAMBDA * (-u).clamp(min=0))
    slope = -BETA * sig(-m)
    return slope * (1 + LAMBDA * (u < 0)), -slope


def apo_down_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    a, _, h = parts(p)
    return BETA * (sig(a) * sig(-a) - sig(h) * sig(-h)), BETA * sig(h) * sig(-h)


def alphapo_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    chosen, rejected = means(p)
    alpha = 0.25
    m = BETA * ((1 - torch.exp(-alpha * chosen)) - (1 - torch.exp(-alpha * rejected))) / alpha - GAMMA
    slope = (sig(m) - 1) * BETA
    return (
        slope * torch.exp(-alpha * chosen) / p.chosen_tokens,
        -slope * torch.exp(-alpha * rejected) / p.rejected_tokens,
    )


def orpo_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    x, y = means(p)
    odds = (x - y) - (torch.log(1 - torch.exp(x)) - torch.log(1 - torch.exp(y)))
    slope = -BETA * sig(-odds)
    return (
        slope / (1 - torch.exp(x)) / p.chosen_tokens,
        -slope / (1 - torch.exp(y)) / p.rejected_tokens,
    )


def contrastive_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    slope = BETA * (sig(BETA * (p.chosen - p.rejected).detach()) - (1 - EPS))
    return slope, -slope


def clipped_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    m = BETA * ((p.chosen - p.rejected).detach() - p.reference_gap.clamp(min=0))
    return -BETA * sig(-m), BETA * sig(-m)


def length_slope(p: PairLogps) -> tuple[Tensor, Tensor]:
    m = BETA * p.delta.detach() + 0.03 * (p.chosen_tokens - p.rejected_tokens)
    return -BETA * sig(-m), BETA * sig(-m)


# Options and (dL/ds_w, dL/ds_l) of a pair, as the spec of each loss states them.
GRADIENTS: dict[str, tuple[str, dict[str, Any], Callable[[PairLogps], tuple[Tensor, Tensor]]]] = {
    "exo_pair": ("exo_pair", {"label_smoothing": EPS}, exo_slope),
    "discopop": ("discopop", {"discopop_tau": TAU}, discopop_slope),
    "dpop": ("dpop", {"penalty": LAMBDA}, dpop_slope),
    "nca_pair": (
        "nca_pair",
        {},
        lambda p: (BETA * (1.5 * sig(parts(p)[0]) - 1), 0.5 * BETA * sig(parts(p)[1])),
    ),
    "bco_pair": ("bco_pair", {}, lambda p: (-BETA * sig(-parts(p)[0]), BETA * sig(parts(p)[1]))),
    "sppo_hard": (
        "sppo_hard",
        {},
        lambda p: (
            2 * (p.chosen_logratios.detach() - 0.5 / BETA),
            2 * (p.rejected_logratios.detach() + 0.5 / BETA),
        ),
    ),
    "sppo": (
        "sppo",
        {"soft_labels": 0.7},
        lambda p: (
            p.chosen_logratios.detach() - 0.2 / BETA,
            p.rejected_logratios.detach() + 0.2 / BETA,
        ),
    ),
    "apo_zero": (
        "apo_zero",
        {},
        lambda p: (
            -BETA * sig(parts(p)[0]) * sig(-parts(p)[0]),
            BETA * sig(parts(p)[1]) * sig(-parts(p)[1]),
        ),
    ),
    "apo_down": ("apo_down", {}, apo_down_slope),
    "alphapo": ("simpo", {"alpha": 0.25, "gamma": GAMMA}, alphapo_slope),
    "orpo": ("orpo", {}, orpo_slope),
    "cpo": ("cpo", {"label_smoothing": EPS}, contrastive_slope),
    "tpo": ("tpo", {"label_smoothing": EPS}, contrastive_slope),
    "hypo": ("hypo", {}, clipped_slope),
    "length_penalty": ("sigmoid", {"length_penalty": 0.03}, length_slope),
}


@pytest.mark.parametrize("case", sorted(GRADIENTS))
def test_stated_gradient_coefficients(case: str) -> None:
    name, options, slope = GRADIENTS[case]
    pair = random_pair(LOSSES[name], pairs=20)
    value = LOSSES[name].function(pair, beta=BETA, **options).sum()
    got = torch.autograd.grad(value, (pair.chosen, pair.rejected))
    torch.testing.assert_close(got, slope(pair), rtol=1e-10, atol=1e-13)


def test_exo_is_a_divergence_from_the_smoothed_label() -> None:
    pair = random_pair(pairs=50)
    value = losses("exo_pair", pair, beta=BETA, label_smoothing=EPS)
    q = sig(BETA * pair.delta.detach())
    want = q * torch.log(q / (1 - EPS)) + (1 - q) * torch.log((1 - q) / EPS)
    torch.testing.assert_close(value.detach(), want, rtol=1e-9, atol=1e-12)
    assert (value >= 0).all()
    h = math.log((1 - EPS) / EPS)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    best = PairLogps(torch.tensor([h], dtype=torch.float64), zero, one, one, zero, zero)
    assert abs(losses("exo_pair", best, beta=1.0, label_smoothing=EPS).item()) < 1e-15


def test_nca_pair_has_its_minimum_at_two_thirds() -> None:
    pair = random_pair()
    at = replace(pair, chosen=(pair.ref_chosen + math.log(2) / BETA).requires_grad_())  # type: ignore[operator]
    (grad,) = torch.autograd.grad(losses("nca_pair", at, beta=BETA).sum(), at.chosen)
    assert grad.abs().max() < 1e-14


def test_bco_pair_bounds_dpo() -> None:
    pair = random_pair(pairs=100)
    assert (losses("bco_pair", pair, beta=BETA) >= losses("sigmoid", pair, beta=BETA)).all()


def test_sppo_targets() -> None:
    pair = random_pair()
    assert_same(losses("sppo", pair, beta=BETA), losses("sppo_hard", pair, beta=BETA) / 2)
    win, lose = (torch.linspace(a, b, 5, dtype=torch.float64) for a, b in ((0.6, 1.0), (0.4, 0.1)))
    rated = replace(
        pair,
        chosen=(pair.ref_chosen + (win - 0.5) / BETA).requires_grad_(),  # type: ignore[operator]
        rejected=(pair.ref_rejected + (lose - 0.5) / BETA).requires_grad_(),  # type: ignore[operator]
        chosen_win_rate=win,
        rejected_win_rate=lose,
    )
    value = losses("sppo", rated, beta=BETA)
    unrated = replace(rated, chosen_win_rate=None, rejected_win_rate=None)
    assert_same(losses("sppo", unrated, beta=BETA, chosen_win_rate=win, rejected_win_rate=lose), value)
    with pytest.raises(ValueError, match="chosen_win_rate: got a value beside the PairLogps' own"):
        losses("sppo", rated, chosen_win_rate=win, rejected_win_rate=lose)
    grads = torch.autograd.grad(value.sum(), (rated.chosen, rated.rejected))
    assert value.abs().max() < 1e-20 and max(g.abs().max() for g in grads) < 1e-13
    single = losses("sppo", replace(pair, chosen_win_rate=win, rejected_win_rate=1 - win), beta=BETA)
    assert_same(single, losses("sppo", pair, beta=BETA, soft_labels=win))
    with pytest.raises(ValueError, match="got one of the two"):
        losses("sppo", replace(pair, chosen_win_rate=win))
    with pytest.raises(ValueError, match="soft_labels: got a value together with win rates"):
        losses("sppo", rated, soft_labels=0.3)


def test_aot_alone_and_in_rank_order_is_cdpo() -> None:
    pair = random_pair(pairs=1)
    options = {"beta": BETA, "label_smoothing": EPS}
    cdpo = losses("sigmoid", pair, **options)
    assert_same(losses("aot", pair, **options), cdpo)
    assert_same(losses("aot_unpaired", pair, **options), cdpo)
    pair = random_pair(pairs=30)
    order = (pair.chosen - pair.rejected).argsort()
    ranked = pair.reference_gap.sort().values
    agreeing = replace(
        pair,
        ref_rejected=torch.zeros_like(ranked),
        ref_chosen=torch.empty_like(ranked).scatter(0, order, ranked),
    )
    assert_same(losses("aot", agreeing, **options), losses("sigmoid", agreeing, **options))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_by_definition_and_under_permutation(name: str) -> None:
    pair = random_pair(pairs=30)
    value = mean_loss(name, pair, beta=BETA, label_smoothing=EPS)
    if name == "aot":
        first, second = pair.chosen - pair.rejected, pair.reference_gap
    else:
        first, second = pair.chosen_logratios, pair.rejected_logratios
    m = BETA * (first.sort().values - second.sort().values)
    want = (torch.log1p(torch.exp(-m)) * (1 - EPS) + torch.log1p(torch.exp(m)) * EPS).mean()
    torch.testing.assert_close(value, want)
    grads = [torch.autograd.grad(x, (pair.chosen, pair.rejected), retain_graph=True) for x in (value, want)]
    torch.testing.assert_close(*grads)
    index = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    moved = PairLogps(**{k: None if v is None else v[index] for k, v in vars(pair).items()})
    assert_same(mean_loss(name, moved, beta=BETA, label_smoothing=EPS), value)


def test_aot_with_padding_and_ties() -> None:
    pair = random_pair(pairs=6)
    empty = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.float64)
    padded = PairLogps(**{k: None if v is None else v * empty for k, v in vars(pair).items()})
    kept = PairLogps(**{k: None if v is None else v[empty > 0] for k, v in vars(pair).items()})
    for name in ("aot", "aot_unpaired"):
        assert_same(mean_loss(name, padded), mean_loss(name, kept))
        same = PairLogps(*(torch.full((4,), 2.0) for _ in range(6)))
        assert mean_loss(name, same).item() == pytest.approx(math.log(2))


def test_apo_at_the_reference_is_one() -> None:
    pair = random_pair()
    same = replace(pair, chosen=pair.ref_chosen, rejected=pair.ref_rejected)
    for name in ("apo_zero", "apo_down"):
        assert torch.equal(losses(name, same), torch.ones(5, dtype=torch.float64))


def test_discopop_at_zero_and_with_large_tau() -> None:
    pair = random_pair()
    same = replace(pair, chosen=pair.ref_chosen, rejected=pair.ref_rejected)
    assert_same(losses("discopop", same), torch.full((5,), (math.log(2) + 1) / 2, dtype=torch.float64))
    # w = 1/2 + O(m / tau)
    flat = losses("discopop", pair, beta=BETA, discopop_tau=1e9)
    want = (losses("sigmoid", pair, beta=BETA) + torch.exp(-BETA * pair.delta)) / 2
    torch.testing.assert_close(flat, want, rtol=1e-6, atol=1e-6)


def test_reference_free_losses_are_each_other() -> None:
    pair = random_pair(LOSSES["cpo"])
    zeros = torch.zeros(5, dtype=torch.float64)
    uniform = replace(pair, ref_chosen=zeros, ref_rejected=zeros)
    assert_same(mean_loss("cpo", pair, nll_weight=0.0, beta=BETA), mean_loss("sigmoid", uniform, beta=BETA))
    assert_same(mean_loss("cpo", pair, beta=BETA), mean_loss("tpo", pair, beta=BETA))  # gold = chosen
    options = {"beta": BETA, "gamma": GAMMA}
    assert_same(mean_loss("cpo_simpo", pair, nll_weight=0.0, **options), mean_loss("simpo", pair, **options))
    assert_same(mean_loss("cpo_simpo", pair, **options), mean_loss("tpo_l", pair, **options))
    length = torch.full((5,), 8.0, dtype=torch.float64)
    equal = replace(pair, chosen_tokens=length, rejected_tokens=length)
    simpo = mean_loss("simpo", equal, gamma=0.0, beta=4.0)
    assert_same(simpo, mean_loss("cpo", equal, nll_weight=0.0, beta=0.5))
    torch.testing.assert_close(
        mean_loss("simpo", pair, alpha=1e-9), mean_loss("simpo", pair), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["cpo", "cpo_simpo", "tpo", "tpo_l", "orpo"])
def test_the_nll_term_is_sft(name: str) -> None:
    pair = random_pair(LOSSES[name])
    bare, sft = mean_loss(name, pair, nll_weight=0.0), mean_loss("sft", pair)
    assert_same(mean_loss(name, pair, nll_weight=0.3), bare + 0.3 * sft)
    assert_same(mean_loss(name, pair), bare + LOSSES[name].nll_weight * sft)  # type: ignore[operator]
    gold = replace(pair, nll_sum=-2 * pair.chosen, nll_tokens=3 * pair.chosen_tokens)
    assert_same(mean_loss(name, gold, nll_weight=3.0), bare + 2 * sft)
    halved = build_objective([name, "sft"], [0.5, 0.25], nll_weight=0.3).loss(pair)
    assert_same(halved, 0.5 * bare + (0.5 * 0.3 + 0.25) * sft)  # a loss's weight is its NLL term's too
    assert not build_objective(name, nll_weight=0.0).uses_nll
    counted = build_objective(name, num_pairs=10, num_tokens=pair.chosen_tokens.sum())
    assert_same(counted.loss(pair), bare / 2 + LOSSES[name].nll_weight * sft)  # type: ignore[operator]
    with pytest.raises(ValueError, match="nll_weight: got -1.0, wanted a number in"):
        build_objective(name, nll_weight=-1)
    with pytest.raises(ValueError, match="num_tokens: got None"):
        build_objective(name, num_pairs=10)


def test_orpo_of_equal_means_and_near_certainty() -> None:
    pair = random_pair(LOSSES["orpo"])
    equal = replace(pair, rejected=pair.chosen, rejected_tokens=pair.chosen_tokens)
    assert_same(losses("orpo", equal, beta=BETA), torch.full((5,), BETA * math.log(2), dtype=torch.float64))
    assert_same(mean_loss("orpo", pair, beta=1e-300), mean_loss("sft", pair))
    one = torch.ones(3)
    near_one = PairLogps(torch.tensor([0.0, -1e-9, -1e-4]), torch.full((3,), -30.0), one, one)
    near_one.chosen.requires_grad_()
    value = losses("orpo", near_one)
    (grad,) = torch.autograd.grad(value.sum(), near_one.chosen)
    assert value.isfinite().all() and grad.isfinite().all()


def test_slic_is_zero_beyond_its_margin() -> None:
    pair = random_pair(LOSSES["slic"], pairs=50)
    value = losses("slic", pair, delta=2.0)
    beyond = pair.chosen - pair.rejected >= 2
    assert beyond.any() and not beyond.all()
    assert torch.equal(value == 0, beyond)
    smooth = random_pair(pairs=50)
    bare = losses("slic_smooth_ref", smooth, regularizer=0.0)
    floor = torch.log1p(torch.exp(1 - smooth.chosen_logratios / smooth.chosen_tokens))
    assert_same(losses("slic_smooth_ref", smooth, regularizer=0.5), bare + 0.5 * floor)


def test_relatives_of_dpo() -> None:
    pair = random_pair(pairs=50)
    plain = losses("sigmoid", pair, beta=BETA)
    clipped = losses("hypo", pair, beta=BETA)
    agrees = pair.reference_gap >= 0
    assert agrees.any() and not agrees.all()
    assert_same(clipped[agrees], plain[agrees])
    contrastive = losses("cpo", pair.without_reference(), beta=BETA)
    assert_same(clipped[~agrees], contrastive[~agrees])
    psi = torch.relu(-BETA * pair.reference_gap)
    assert_same(clipped, losses("sigmoid", pair, beta=BETA, margin=psi))
    assert_same(losses("dpop", pair, beta=BETA, penalty=0.0), plain)
    above = replace(pair, chosen=pair.ref_chosen + 1.0)  # type: ignore[operator]
    assert_same(losses("dpop", above, beta=BETA), losses("sigmoid", above, beta=BETA))
    equal = replace(pair, rejected_tokens=pair.chosen_tokens)
    assert_same(losses("sigmoid", equal, beta=BETA, length_penalty=0.3), plain)
    lengths = pair.chosen_tokens - pair.rejected_tokens
    by_margin = losses("sigmoid", pair, beta=BETA, margin=-0.3 * lengths)
    assert_same(losses("sigmoid", pair, beta=BETA, length_penalty=0.3), by_margin)


def test_composites_are_lists() -> None:
    """RPO, iterative RPO and MPO."""
    pair = random_pair()
    sigmoid, bco = (mean_loss(name, pair, beta=BETA) for name in ("sigmoid", "bco_pair"))
    sft = mean_loss("sft", pair)
    assert_same(
        build_objective(["sigmoid", "sft"], [1.0, 0.005], beta=BETA).loss(pair), sigmoid + 0.005 * sft
    )
    mpo = build_objective(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], beta=BETA).loss(pair)
    assert_same(mpo, 0.8 * sigmoid + 0.2 * bco + sft)


def test_sft_mean_counts_every_answer_alike() -> None:
    pair = random_pair(LOSSES["sft"])
    assert_same(mean_loss("sft_mean", pair), -(pair.chosen / pair.chosen_tokens).mean())
    length = torch.full((5,), 8.0, dtype=torch.float64)
    equal = replace(pair, chosen_tokens=length)
    assert_same(mean_loss("sft_mean", equal), mean_loss("sft", equal))
    own = replace(pair, nll_sum=3 * length, nll_tokens=length)
    assert mean_loss("sft_mean", own).item() == 3.0
    objective = build_objective("sft_mean", num_pairs=10)
    assert objective.uses_nll and not objective.compares_answers
    assert_same(objective.loss(pair), mean_loss("sft_mean", pair) / 2)
    with pytest.raises(ValueError, match="margin: got a value, wanted None: sft_mean takes none"):
        build_objective("sft_mean", margin=0.1)
    with pytest.raises(ValueError, match="token_weights: got a value that sft_mean does not use"):
        objective.check_batch(5, torch.device("cpu"), has_reference=False, has_token_weights=True)
    both = build_objective(["sigmoid", "sft_mean"], margin=0.1)  # the margin is sigmoid's
    assert_same(
        both.loss(random_pair()),
        mean_loss("sigmoid", random_pair(), margin=0.1) + mean_loss("sft_mean", pair),
    )
