"""Gradients and identities of the unpaired and token-level losses, and of terms, each against its paper's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import (
    LOSSES,
    DivergencePairLogps,
    StepLogps,
    TokenDivergences,
    TokenLogps,
    UnpairedLogps,
)
from fastdpo.losses.distillation import aligndistil_teacher
from fastdpo.losses.terms import (
    anchor,
    exploration_bonus,
    implicit_rewards,
    k3,
    reward_accuracy,
    score_function_kl,
    trust_region,
)
from fastdpo.losses.unpaired import kto_kl
from tests.losses.common import mean_loss, random_pair
from tests.losses.kinds import random_batch

BETA, EPS = 0.17, 0.2
sig = torch.sigmoid


def losses(name: str, batch: Any, **arguments: Any) -> Tensor:
    return LOSSES[name].function(batch, **arguments)


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-12)


def gradient(name: str, batch: Any, **arguments: Any) -> Tensor:
    values = batch.logps.clone().requires_grad_()
    return torch.autograd.grad(losses(name, replace(batch, logps=values), **arguments).sum(), values)[0]


# Unpaired.


def test_unpaired_losses_of_pairs() -> None:
    pair = random_pair()
    both = UnpairedLogps.from_pairs(pair)
    zero = torch.zeros((), dtype=torch.float64)
    apo = losses("apo_zero", pair, beta=BETA)
    got = losses("apo_zero_unpaired", both, beta=BETA)
    assert_same(got[:5] + got[5:], apo)
    assert_same(losses("kto", replace(both, kl=zero), beta=BETA), got)
    bco = losses("bco", replace(both, reward_shift=zero), beta=BETA)
    assert_same(bco[:5] + bco[5:], losses("bco_pair", pair, beta=BETA))
    assert UnpairedLogps.from_pairs(pair.without_reference()).ref_logps is None


def test_unpaired_gradients() -> None:
    batch = random_batch(LOSSES["kto"])
    good, z0 = batch.is_desirable, batch.kl
    s = sig(torch.where(good, 1.0, -1.0).double() * BETA * (batch.logratios - z0))
    want = torch.where(good, -1.3 * BETA * s * (1 - s), 0.7 * BETA * s * (1 - s))
    got = gradient("kto", batch, beta=BETA, desirable_weight=1.3, undesirable_weight=0.7)
    assert_same(got, want)
    batch = random_batch(LOSSES["bco"])
    m = BETA * batch.logratios - batch.reward_shift
    assert_same(gradient("bco", batch, beta=BETA), torch.where(good, -BETA * sig(-m), BETA * sig(m)))


def test_kto_label_flips_the_gradient_at_the_reference_point() -> None:
    batch = random_batch(LOSSES["kto"])
    at = replace(batch, logps=batch.ref_logps + batch.kl)
    flipped = replace(at, is_desirable=~at.is_desirable)
    assert_same(gradient("kto", at), -gradient("kto", flipped))
    assert_same(losses("kto", at), torch.full((4,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
@pytest.mark.parametrize("desirable", [True, False])
def test_rows_of_one_kind_only(name: str, desirable: bool) -> None:
    batch = random_batch(LOSSES[name])
    alone = replace(batch, is_desirable=torch.full((4,), desirable))
    assert mean_loss(name, alone).isfinite()
    keep = batch.is_desirable == desirable
    assert_same(losses(name, alone)[keep], losses(name, batch)[keep])


def test_kto_kl_is_detached_and_not_negative() -> None:
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert kto_kl(logps, torch.tensor([-2.0, -4.0])).item() == 1.5
    assert kto_kl(logps, torch.tensor([0.0, 0.0])).item() == 0.0
    assert not kto_kl(logps, logps).requires_grad


# Tokens and steps.


def test_tdpo() -> None:
    batch = random_batch(LOSSES["tdpo1"])
    dpo = losses("sigmoid", batch, beta=BETA)
    assert_same(losses("tdpo2", batch, beta=BETA, kl_weight=0.0), dpo)
    assert_same(losses("tdpo1", batch, beta=BETA), losses("tdpo2", batch, beta=BETA, kl_weight=1.0))
    same: DivergencePairLogps = replace(
        batch, chosen=batch.ref_chosen, rejected=batch.ref_rejected,
        chosen_kl=torch.zeros(4).double(), rejected_kl=torch.zeros(4).double(),
    )  # fmt: skip
    for name in ("tdpo1", "tdpo2"):
        assert_same(losses(name, same), torch.full((4,), math.log(2), dtype=torch.float64))
        leaves = {
            field: getattr(batch, field).clone().requires_grad_()
            for field in ("chosen", "rejected", "chosen_kl", "rejected_kl")
        }
        weight = {"tdpo1": 1.0, "tdpo2": 0.4}[name]
        options = {"kl_weight": 0.4} if name == "tdpo2" else {}
        value = losses(name, replace(batch, **leaves), beta=BETA, **options)
        grads = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        m = BETA * (batch.delta - weight * (batch.rejected_kl - batch.chosen_kl))
        c = BETA * sig(-m)
        wanted = [-c, c, -c if name == "tdpo1" else None, weight * c]
        for got, want in zip(grads, wanted, strict=True):
            assert got is want is None or torch.allclose(got, want, rtol=1e-12)


def test_aligndistil_teacher_and_theorem_1() -> None:
    """beta2 KL(pi || q*) = beta2 KL(pi || pi_0) - beta E_pi[log pi_D / pi_0] + const, over all pi."""
    generator = torch.Generator().manual_seed(0)
    z_dpo, z_ref = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    beta, beta2 = 0.3, 2.0
    first, second, scale = aligndistil_teacher(
        torch.zeros(1).double(), mode="theorem1", beta=beta, beta2=beta2
    )
    assert scale.item() == beta2
    teacher = (first * z_dpo + second * z_ref).log_softmax(-1)
    log_d, log_0 = z_dpo.log_softmax(-1), z_ref.log_softmax(-1)
    differences = []
    for _ in range(3):
        log_p = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
        p = log_p.exp()
        left = beta2 * (p * (log_p - teacher)).sum()
        right = beta2 * (p * (log_p - log_0)).sum() - beta * (p * (log_d - log_0)).sum()
        differences.append(left - right)
    assert_same(differences[0], differences[1])
    assert_same(differences[0], differences[2])


def test_aligndistil_modes() -> None:
    distance = torch.tensor([0.0, 0.5, 2.0])
    weight = 10 * distance + 1e-3
    got = aligndistil_teacher(distance)
    torch.testing.assert_close(tuple(got), (1 + weight, -weight, 0.1 / weight))
    torch.testing.assert_close(got.first + got.second, torch.ones(3))  # equal teachers: the DPO model
    adaptive = aligndistil_teacher(distance, mode="theorem1_adaptive")
    torch.testing.assert_close(tuple(adaptive), (weight, 1 - weight, 0.1 / weight))
    contrast = aligndistil_teacher(distance, mode="theorem1_contrast", beta=0.2, beta2=4.0)
    torch.testing.assert_close(
        tuple(contrast), tuple(torch.full((3,), value) for value in (1.05, -0.05, 4.0))
    )
    with pytest.raises(ValueError, match="mode: got 'kd', wanted one of aligndistil"):
        aligndistil_teacher(distance, mode="kd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta2: got 0"):
        aligndistil_teacher(distance, beta2=0)
    with pytest.raises(ValueError, match="beta: got 0"):
        aligndistil_teacher(distance, mode="theorem1", beta=0)
    with pytest.raises(ValueError, match=r"beta: got a tensor of shape \(3,\), wanted a number with"):
        aligndistil_teacher(distance, mode="theorem1", beta=distance)


def test_aligndistil_scales_every_token() -> None:
    mask = torch.tensor([True, True, False])[None]
    distance = torch.tensor([[0.1, 0.4, torch.nan]])
    tokens = TokenDivergences(torch.tensor([[1.0, 2.0, torch.nan]]), mask, l1_distance=distance)
    options: dict[str, Any] = {"beta": 0.3, "beta2": 5.0}
    want = 0.3 * (1 / 0.501 + 2 / 2.001) / 2  # a mean over tokens, as in the authors' scripts
    assert losses("aligndistil", tokens, **options).item() == pytest.approx(want)
    assert losses("aligndistil", tokens, length_normalize=False, **options).item() == pytest.approx(2 * want)
    constant = losses("aligndistil", tokens, teacher_mode="theorem1_contrast", **options)
    assert constant.item() == pytest.approx(5 * (1 + 2) / 2)
    bounds = torch.tensor([0, 3])
    packed = TokenDivergences(tokens.divergences[0], mask[0], bounds, distance[0])
    assert torch.equal(losses("aligndistil", packed, **options), losses("aligndistil", tokens, **options))
    both = TokenDivergences(
        *(torch.cat([x, x]) for x in (tokens.divergences, mask)), None, distance.repeat(2, 1)
    )
    each = losses("aligndistil", both, beta=torch.tensor([0.3, 0.6]), beta2=5.0)
    torch.testing.assert_close(each, torch.tensor([want, 2 * want]))
    with pytest.raises(ValueError, match="beta: got a tensor"):
        losses("aligndistil", both, beta=torch.tensor([0.3, 0.6]), teacher_mode="theorem1")


def test_direct_advantage() -> None:
    steps = random_batch(LOSSES["direct_advantage"])
    want = (BETA * steps.logratios - steps.advantages) ** 2 / (2 * BETA**2)
    assert_same(losses("direct_advantage", steps, beta=BETA), want)
    assert_same(gradient("direct_advantage", steps, beta=BETA), steps.logratios - steps.advantages / BETA)
    target = replace(steps, logps=steps.ref_logps + steps.advantages / BETA)
    assert gradient("direct_advantage", target, beta=BETA).abs().max() < 1e-13
    # Targets of +-1/(2 beta) are the two halves of hard SPPO, up to its factor.
    pair = random_pair()
    half = torch.full((5,), 0.5, dtype=torch.float64)
    one = torch.ones(5, dtype=torch.float64)
    winner = StepLogps(pair.chosen, half, one, pair.ref_chosen)
    loser = StepLogps(pair.rejected, -half, one, pair.ref_rejected)
    total = losses("direct_advantage", winner, beta=BETA) + losses("direct_advantage", loser, beta=BETA)
    assert_same(total, losses("sppo_hard", pair, beta=BETA) / 2)


def test_nash_md() -> None:
    tokens = random_batch(LOSSES["nash_md"])
    got = gradient("nash_md", tokens, beta=BETA)
    want = BETA * (tokens.logps - tokens.ref_logps) - (tokens.win_rates - 0.5)[:, None]
    assert_same(got, want * tokens.mask)
    even: TokenLogps = replace(tokens, win_rates=torch.full((4,), 0.5, dtype=torch.float64))
    same = replace(even, ref_logps=tokens.logps)
    assert gradient("nash_md", same).abs().max() == 0


# Terms.


def test_score_function_kl_has_the_gradient_of_the_divergence() -> None:
    """Summed over a tiny vocabulary with the policy's own probabilities, it is the exact KL's gradient."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ref = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logits.requires_grad_()
    log_p = logits.log_softmax(0)
    (want,) = torch.autograd.grad((log_p.exp() * (log_p - ref)).sum(), logits, retain_graph=True)
    estimate = (log_p.exp().detach() * score_function_kl(log_p, ref)).sum()
    assert_same(torch.autograd.grad(estimate, logits)[0], want)
    zero = score_function_kl(log_p, log_p.detach()).sum()
    assert torch.autograd.grad(zero, log_p)[0].abs().max() == 0


def test_exploration_anchor_k3_and_rewards() -> None:
    pair = random_pair()
    flags = torch.tensor([True, False, True, False, False])
    bonus = exploration_bonus(pair, flags)
    assert torch.equal(bonus, torch.where(flags, pair.chosen, pair.rejected))
    assert_same(
        anchor(pair.chosen_logratios, beta=BETA, delta=0.3),
        -torch.log(sig(BETA * pair.chosen_logratios - 0.3)),
    )
    d = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    assert (k3(d) >= 0).all() and k3(torch.zeros(1)).item() == 0
    assert_same(torch.autograd.grad(k3(d).sum(), d)[0], torch.exp(d.detach()) - 1)
    assert k3(torch.tensor([1e4, -1e4])).isfinite().all()
    mask = torch.tensor([[True, True], [True, False]])
    logps = torch.tensor([[-1.0, -2.0], [-1.5, torch.nan]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.2, -2.0], [-1.0, -3.0]], dtype=torch.float64)
    value = trust_region(logps, old, mask)
    gaps = (old - logps.detach())[mask]
    assert_same(value.detach(), (torch.exp(gaps) - gaps - 1).sum() / 3)
    (grad,) = torch.autograd.grad(value, logps)
    assert_same(grad[mask], (1 - torch.exp(gaps)) / 3)
    assert grad[1, 1] == 0
    assert trust_region(logps, old, torch.zeros_like(mask)).item() == 0
    rewards = implicit_rewards(pair.chosen, pair.ref_chosen, beta=BETA)  # type: ignore[arg-type]
    assert not rewards.requires_grad
    assert_same(rewards, BETA * pair.chosen_logratios.detach())
    assert not implicit_rewards(pair.ref_chosen, pair.ref_chosen).any()  # type: ignore[arg-type]
    assert reward_accuracy(
        torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 1.0])
    ).item() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="chosen_rewards: got no pairs"):
        reward_accuracy(torch.zeros(0), torch.zeros(0))
