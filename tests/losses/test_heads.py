"""The generic heads on plain scores, as reward models and diffusion users call them, and stable pieces."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES
from fastdpo.losses.heads import (
    alpha_reward,
    bradley_terry,
    direct_preference_head,
    discopop,
    last_token_states,
    listwise_ce,
    log_odds_ratio,
    logistic,
    margin_loss,
    masked_log_softmax,
    rank_hinge,
    regress,
    unlikelihood,
    value_loss,
)
from fastdpo.losses.stable import bounded_exp, bounded_expm1, log1mexp, sigmoid_times_exp
from tests.losses.common import random_pair

sig = torch.sigmoid


def scores(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = 3 * torch.randn(2, 20, generator=generator, dtype=torch.float64)
    return chosen.requires_grad_(), rejected.requires_grad_()


def test_bradley_terry() -> None:
    chosen, rejected = scores()
    d = (chosen - rejected).detach()
    value = bradley_terry(chosen, rejected, label_smoothing=0.1)
    got = torch.autograd.grad(value.sum(), (chosen, rejected))
    torch.testing.assert_close(got, (sig(d) - 0.9, 0.9 - sig(d)))
    torch.testing.assert_close(bradley_terry(chosen, rejected).detach(), torch.log1p(torch.exp(-d)))
    # DPO is the reward model whose rewards are beta u; COALA's margin gamma is psi.
    pair = random_pair()
    as_rewards = bradley_terry(0.3 * pair.chosen_logratios, 0.3 * pair.rejected_logratios, margin=0.7)
    torch.testing.assert_close(as_rewards, LOSSES["sigmoid"].function(pair, beta=0.3, margin=0.7))
    centred = bradley_terry(chosen, rejected, centering=0.01)
    want = bradley_terry(chosen, rejected) + 0.01 * (chosen + rejected) ** 2
    torch.testing.assert_close(centred, want)


def test_direct_preference_heads() -> None:
    chosen, rejected = scores()
    value = direct_preference_head(chosen, rejected, label_smoothing=0.1)
    got = torch.autograd.grad(value.sum(), (chosen, rejected))
    torch.testing.assert_close(got, (sig(chosen.detach()) - 0.9, sig(rejected.detach()) - 0.1))
    pair = random_pair()
    con = bradley_terry(0.3 * pair.chosen_logratios, 0.3 * pair.rejected_logratios, label_smoothing=0.2)
    torch.testing.assert_close(con, LOSSES["sigmoid"].function(pair, beta=0.3, label_smoothing=0.2))


def test_last_token_states() -> None:
    hidden = torch.arange(24.0).view(3, 4, 2).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    got = last_token_states(hidden, mask)
    assert got.tolist() == [[2.0, 3.0], [14.0, 15.0], [0.0, 0.0]]
    (grad,) = torch.autograd.grad(got.sum(), hidden)
    assert grad.sum() == 4 and grad[2].sum() == 0


def test_diffusion_dpo_is_the_sigmoid_head_on_errors() -> None:
    """-log sigmoid(-beta' [(e_w - e_w^ref) - (e_l - e_l^ref)]) with beta' = 0.5 beta_dpo."""
    errors = torch.rand(4, 6, dtype=torch.float64)
    beta_dpo = 5.0
    inside = -0.5 * beta_dpo * ((errors[0] - errors[2]) - (errors[1] - errors[3]))
    s = -0.5 * errors
    got = margin_loss(beta_dpo * ((s[0] - s[2]) - (s[1] - s[3])), logistic)
    torch.testing.assert_close(got, -torch.log(sig(inside)))
    # Diffusion-DRO: relu(d + margin) is the hinge with beta = 1 / margin, times the margin.
    d = (errors[0] - errors[2]) - (errors[1] - errors[3])
    got = rank_hinge(-(errors[0] - errors[2]), -(errors[1] - errors[3]), 0.001)
    torch.testing.assert_close(got, torch.relu(d + 0.001))


def test_regress_and_value() -> None:
    x = torch.linspace(-2, 2, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(regress(x, 0.5, 3.0).sum(), x)
    torch.testing.assert_close(grad, 6 * (x.detach() - 0.5))
    desirable = torch.tensor([True, False, True, False, True])
    got = value_loss(x, desirable, unlikelihood)
    torch.testing.assert_close(got, torch.where(desirable, 1 - sig(x), sig(x)))
    assert unlikelihood(torch.tensor(50.0)) > 0  # 1 - sigmoid would be 0


def test_listwise_ce_gradient_and_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad(listwise_ce(logits, target).sum(), logits)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(grad, target.sum(-1, keepdim=True) * p - target)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    got = masked_log_softmax(logits, mask)
    torch.testing.assert_close(got[0, [0, 1, 3]], logits[0, [0, 1, 3]].log_softmax(-1))
    assert got[0, 2] == 0 and not got[1:].any()
    value = listwise_ce(logits, target * mask, mask)
    assert value[1] == 0 and value[2] == 0
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert not grad[~mask].any() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_on_both_branches(dtype: torch.dtype) -> None:
    x = -torch.logspace(-6, 2, 200, dtype=torch.float64)
    want = torch.where(x > -0.5, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    got = log1mexp(x.to(dtype)).double()
    # x itself is rounded to the dtype, and log(-x) carries its relative error on.
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    edge = torch.tensor([0.0, 1.0, -1e4], dtype=dtype, requires_grad=True)
    value = log1mexp(edge)
    (grad,) = torch.autograd.grad(value.sum(), edge)
    assert value.isfinite().all() and grad.isfinite().all()


def test_pieces_stay_finite() -> None:
    far = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], requires_grad=True)
    pieces: list[Callable[[Tensor], Tensor]] = [
        bounded_exp,
        bounded_expm1,
        lambda x: sigmoid_times_exp(x / 0.05, -x),
        lambda x: discopop(x, 0.05),
        lambda x: discopop(x, 2.0),
        lambda x: alpha_reward(x, 0.25),
        lambda x: alpha_reward(x, -0.25),
        lambda x: log_odds_ratio(x, -torch.ones(5)),
    ]
    for piece in pieces:
        value = piece(far)
        (grad,) = torch.autograd.grad(value.sum(), far)
        assert value.isfinite().all() and grad.isfinite().all()


def test_alpha_reward_and_odds() -> None:
    x = torch.linspace(-5, -0.1, 9, dtype=torch.float64)
    assert alpha_reward(x, 0.0) is x
    torch.testing.assert_close(alpha_reward(x, 0.25), (1 - torch.exp(x) ** -0.25) / 0.25)
    y = x.flip(0)
    odds = torch.log(torch.exp(x) / (1 - torch.exp(x))) - torch.log(torch.exp(y) / (1 - torch.exp(y)))
    torch.testing.assert_close(log_odds_ratio(x, y), odds)
    assert discopop(torch.zeros(1), 0.05).item() == pytest.approx((math.log(2) + 1) / 2)
