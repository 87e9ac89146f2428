"""Gradients and identities stated in the papers, each against autograd or against another loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo.losses import LOSSES, PairLogps, build_objective
from tests.losses.common import mean_loss, random_pair

BETA, EPS, GAMMA = 0.17, 0.2, 0.7


def h_of(pair: PairLogps) -> Tensor:
    return BETA * pair.delta.detach()


def mean_h_of(pair: PairLogps) -> Tensor:
    return BETA * pair.mean_delta.detach()


def hinge_slope(h: Tensor) -> Tensor:
    return -(h < 1).double()


# Name and options -> dL/dm and m's derivative with respect to the chosen and the rejected sum.
Slope = Callable[[PairLogps], Tensor]
GRADIENTS: dict[str, tuple[str, dict[str, float | bool], Slope, bool]] = {
    "sigmoid": ("sigmoid", {}, lambda p: -BETA * torch.sigmoid(-h_of(p)), False),
    "cdpo": (
        "sigmoid",
        {"label_smoothing": EPS},
        lambda p: BETA * (torch.sigmoid(h_of(p)) - (1 - EPS)),
        False,
    ),
    "robust": (
        "robust",
        {"label_smoothing": EPS},
        lambda p: BETA * (torch.sigmoid(h_of(p)) - (1 - EPS) / (1 - 2 * EPS)),
        False,
    ),
    "hinge": ("hinge", {}, lambda p: BETA * hinge_slope(h_of(p)), False),
    "ipo_sums": (
        "ipo",
        {"length_normalize": False},
        lambda p: 2 * (p.delta.detach() - 1 / (2 * BETA)),
        False,
    ),
    "ipo": ("ipo", {}, lambda p: 2 * (p.mean_delta.detach() - 1 / (2 * BETA)), True),
    "sigmoid_norm": ("sigmoid_norm", {}, lambda p: -BETA * torch.sigmoid(-mean_h_of(p)), True),
    "simpo": (
        "simpo",
        {"gamma": GAMMA, "label_smoothing": EPS},
        lambda p: BETA * (torch.sigmoid(mean_h_of(p) - GAMMA) - (1 - EPS)),
        True,
    ),
}


@pytest.mark.parametrize("case", sorted(GRADIENTS))
def test_stated_gradient_coefficients(case: str) -> None:
    name, options, slope, is_mean = GRADIENTS[case]
    pair = random_pair(LOSSES[name])
    loss = LOSSES[name].function(pair, beta=BETA, **options).sum()
    g_chosen, g_rejected = torch.autograd.grad(loss, (pair.chosen, pair.rejected))
    want = slope(pair)
    chosen_tokens = pair.chosen_tokens if is_mean else torch.ones(5)
    rejected_tokens = pair.rejected_tokens if is_mean else torch.ones(5)
    torch.testing.assert_close(g_chosen, want / chosen_tokens, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g_rejected, -want / rejected_tokens, rtol=1e-12, atol=1e-14)


def test_gradient_of_sft_is_the_same_for_every_chosen_token() -> None:
    pair = random_pair(LOSSES["sft"])
    (grad,) = torch.autograd.grad(mean_loss("sft", pair), pair.chosen)
    torch.testing.assert_close(grad, -(1 / pair.chosen_tokens.sum()).expand(5))


def equal_policy() -> PairLogps:
    pair = random_pair()
    assert pair.ref_chosen is not None and pair.ref_rejected is not None
    return replace(
        pair,
        chosen=pair.ref_chosen.clone().requires_grad_(),
        rejected=pair.ref_rejected.clone().requires_grad_(),
    )


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
@pytest.mark.parametrize("pairs", [1, 3, 13, 29])  # fp32 sums of 13 or 29 equal numbers round
def test_policy_equal_to_reference_gives_ln2_to_the_last_bit(name: str, pairs: int) -> None:
    pair = random_pair(pairs=pairs, dtype=torch.float32)
    same = replace(pair, chosen=pair.ref_chosen, rejected=pair.ref_rejected)
    assert mean_loss(name, same).item() == torch.tensor(math.log(2)).item()


def test_gradient_at_the_reference_is_half_beta() -> None:
    pair = equal_policy()
    grad_chosen, grad_rejected = torch.autograd.grad(
        LOSSES["sigmoid"].function(pair, beta=BETA).sum(), (pair.chosen, pair.rejected)
    )
    assert torch.equal(grad_chosen, torch.full((5,), -BETA / 2, dtype=torch.float64))
    assert torch.equal(grad_rejected, -grad_chosen)


def assert_same_loss(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def losses(name: str, pair: PairLogps, **arguments: Any) -> Tensor:
    return LOSSES[name].function(pair, **arguments)


def test_dpo_is_the_softmax_over_two_answers() -> None:
    pair = random_pair()
    scores = BETA * torch.stack([pair.chosen_logratios, pair.rejected_logratios])
    hard = -scores.log_softmax(0)
    assert_same_loss(losses("sigmoid", pair, beta=BETA), hard[0])
    soft = (1 - EPS) * hard[0] + EPS * hard[1]
    assert_same_loss(losses("sigmoid", pair, beta=BETA, label_smoothing=EPS), soft)


def test_label_smoothing_is_a_soft_label() -> None:
    pair = random_pair()
    for name in ("sigmoid", "sigmoid_norm", "simpo"):
        soft = losses(name, pair, soft_labels=1 - EPS)
        assert_same_loss(losses(name, pair, label_smoothing=EPS), soft)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "sigmoid_norm"])
def test_soft_label_zero_swaps_the_pair(name: str) -> None:
    pair = random_pair()
    swapped = replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_tokens=pair.rejected_tokens,
        rejected_tokens=pair.chosen_tokens,
        ref_chosen=pair.ref_rejected,
        ref_rejected=pair.ref_chosen,
    )
    assert_same_loss(losses(name, pair, soft_labels=0.0), losses(name, swapped))
    mixed = 0.3 * losses(name, pair) + 0.7 * losses(name, swapped)
    assert_same_loss(losses(name, pair, soft_labels=0.3), mixed)


def test_robust_without_flips_is_dpo_and_averages_out_flips() -> None:
    pair = random_pair()
    assert_same_loss(losses("robust", pair), losses("sigmoid", pair))
    swapped = replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        ref_chosen=pair.ref_rejected,
        ref_rejected=pair.ref_chosen,
    )
    expected = (1 - EPS) * losses("robust", pair, label_smoothing=EPS) + EPS * losses(
        "robust", swapped, label_smoothing=EPS
    )
    assert_same_loss(expected, losses("sigmoid", pair))


def test_ipo_is_zero_at_its_target_and_soft_labels_move_it() -> None:
    def at(gap: float, **arguments: Any) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([gap], dtype=torch.float64, requires_grad=True)
        one, zero = torch.ones(1), torch.zeros(1, dtype=torch.float64)
        loss = losses("ipo", PairLogps(chosen, zero, one, one, zero, zero), beta=0.25, **arguments)
        (grad,) = torch.autograd.grad(loss.sum(), chosen)
        return loss.detach(), grad

    assert at(2.0) == (0.0, 0.0)  # 1 / (2 * 0.25)
    assert at(2.0, length_normalize=False) == (0.0, 0.0)
    assert at(0.0, soft_labels=0.5)[1] == 0.0
    assert at(2.0 * 0.6, soft_labels=0.8)[1].abs() < 1e-15  # (2 q - 1) / (2 tau)
    assert at(4.0, margin=0.5) == (0.0, 0.0)  # (1/2 + psi) / beta


def test_hinge_is_flat_beyond_the_margin_and_bounds_the_ranking_error() -> None:
    pair = random_pair(pairs=50)
    value = losses("hinge", pair, beta=BETA)
    (grad,) = torch.autograd.grad(value.sum(), pair.chosen)
    beyond = BETA * pair.delta >= 1
    assert beyond.any() and not beyond.all()
    assert not grad[beyond].any() and not value[beyond].any()
    assert (value >= (pair.delta < 0).double()).all()


def test_equal_lengths_turn_length_normalised_losses_into_sums() -> None:
    pair = random_pair()
    length = torch.full((5,), 8.0, dtype=torch.float64)
    pair = replace(pair, chosen_tokens=length, rejected_tokens=length)
    assert_same_loss(losses("sigmoid_norm", pair, beta=4.0), losses("sigmoid", pair, beta=0.5))
    bare = pair.without_reference()
    assert_same_loss(losses("simpo", bare, beta=4.0, gamma=0.0), losses("sigmoid", bare, beta=0.5))
    single = replace(pair, chosen_tokens=length / 8, rejected_tokens=length / 8)
    assert_same_loss(losses("ipo", single), losses("ipo", single, length_normalize=False))


def test_simpo_sees_no_reference_beside_a_loss_that_does() -> None:
    pair = random_pair()
    alone = mean_loss("simpo", pair.without_reference())
    both = build_objective(["sigmoid", "simpo"], [0.0, 1.0]).loss(pair)
    assert torch.equal(alone, both)


def test_constant_margin_is_simpos_gamma() -> None:
    bare = random_pair().without_reference()
    assert_same_loss(losses("simpo", bare, gamma=0.0, margin=0.9), losses("simpo", bare, gamma=0.9))


finite = st.floats(-200, 200)


@pytest.mark.promise(26)
@settings(max_examples=60, deadline=None)
@given(sums=st.tuples(finite, finite, finite, finite), beta=st.floats(0.01, 2.0), constant=finite)
def test_swap_and_shift_symmetry(
    sums: tuple[float, float, float, float], beta: float, constant: float
) -> None:
    """The likelihoods of 'w better' and 'l better' add up to 1; a constant per prompt changes nothing."""
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x], dtype=torch.float64) for x in sums)
    one = torch.ones(1)
    pair = PairLogps(chosen, rejected, one, one, ref_chosen, ref_rejected)
    swapped = PairLogps(rejected, chosen, one, one, ref_rejected, ref_chosen)
    p, q = (torch.exp(-losses("sigmoid", x, beta=beta)) for x in (pair, swapped))
    assert abs(p + q - 1) < 1e-12
    moved = replace(pair, ref_chosen=ref_chosen + constant, ref_rejected=ref_rejected + constant)
    for name in ("sigmoid", "hinge", "robust"):
        torch.testing.assert_close(
            losses(name, pair, beta=beta), losses(name, moved, beta=beta), rtol=0, atol=1e-9
        )


@pytest.mark.promise(26)
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_vanishing_beta_gives_ln2(name: str) -> None:
    value = losses(name, random_pair(), beta=1e-12)
    torch.testing.assert_close(value, torch.full_like(value, math.log(2)), rtol=0, atol=1e-9)
