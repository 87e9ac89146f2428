"""Losses settled by their authors' code: constrained, reward-aware, calibrated, of unlearning, of lists.

The formulas are written out here as those codes have them, answer by answer.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, ListLogps, PairLogps, StepLogps, UnpairedLogps, build_objective
from fastdpo.losses.pairwise_batch import alpha_dpo_loss
from fastdpo.losses.ranking import lipo_lambda_loss
from tests.losses.common import mean_loss, random_pair
from tests.losses.kinds import random_batch

BETA = 0.3
ls = torch.nn.functional.logsigmoid


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-12)


def pair_loss(name: str, pair: PairLogps, **arguments: object) -> Tensor:
    return LOSSES[name].function(pair, **arguments)


def means(pair: PairLogps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = (pair.chosen, pair.rejected, pair.ref_chosen, pair.ref_rejected)
    lengths = (pair.chosen_tokens, pair.rejected_tokens) * 2
    return tuple(x / n for x, n in zip(sums, lengths, strict=True))  # type: ignore[return-value, operator]


def test_constrained_po_is_its_authors() -> None:
    pair = random_pair(pairs=40)
    chosen, rejected, ref_chosen, ref_rejected = means(pair)
    policy, reference = chosen - rejected, ref_chosen - ref_rejected
    gamma, tau, alpha = 0.7, 1.5, 2.0
    margin = 1.0 / tau * torch.log(1 + torch.exp(tau * (gamma - reference)))
    want = -ls(BETA * policy - (BETA * reference + (BETA / alpha) * margin))
    assert_same(pair_loss("ccpo", pair, beta=BETA, gamma=gamma, tau=tau, alpha=alpha), want)
    easy = gamma * (1 / ref_chosen + 1 / ref_rejected)
    want = -ls(BETA * policy - (BETA * reference + easy))
    assert_same(pair_loss("ccpo_easy", pair, beta=BETA, gamma=gamma), want)
    want = -ls(BETA * (policy - reference.clamp(min=0)))
    assert_same(pair_loss("ccpo_clip", pair, beta=BETA), want)
    # No margin is left where the reference is far on the right side, and none at gamma = 0 in the easy form.
    norm = pair_loss("sigmoid_norm", pair, beta=BETA)
    assert_same(pair_loss("ccpo_easy", pair, beta=BETA, gamma=0.0), norm)
    far = replace(pair, ref_chosen=pair.ref_chosen + 1e3 * pair.chosen_tokens)  # type: ignore[operator]
    assert_same(pair_loss("ccpo", far, beta=1e-3), pair_loss("sigmoid_norm", far, beta=1e-3))
    single = replace(pair, chosen_tokens=torch.ones(40), rejected_tokens=torch.ones(40))
    assert_same(pair_loss("ccpo_clip", single, beta=BETA), pair_loss("hypo", single, beta=BETA))


GAPS = torch.linspace(-2.0, 3.0, 20, dtype=torch.float64)


def test_reward_aware_losses_are_nemos() -> None:
    pair = random_pair(pairs=20)
    h, true = BETA * pair.delta, 0.7 * GAPS
    given = {"beta": BETA, "reward_gap": GAPS, "reward_scale": 0.7}
    assert_same(pair_loss("rpo_sq", pair, **given), (h - true) ** 2)
    sides = [(ls(true), ls(h)), (ls(-true), ls(-h))]
    backward = sum(torch.exp(a) * (a - b) for a, b in sides)
    forward = sum(torch.exp(b) * (b - a) for a, b in sides)
    assert_same(pair_loss("rpo_bwd_kl", pair, **given), backward)
    assert_same(pair_loss("rpo_fwd_kl", pair, **given), forward)
    # A divergence: 0, with its gradient, where the policy's gap is that of the rewards.
    shifted = pair.ref_chosen + pair.rejected_logratios + true / BETA  # type: ignore[operator]
    at = replace(pair, rejected=pair.rejected.detach(), chosen=shifted.detach().requires_grad_())
    for name in ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"):
        value = pair_loss(name, at, **given)
        assert value.abs().max() < 1e-12 and (pair_loss(name, pair, **given) > 0).all()
        assert torch.autograd.grad(value.sum(), at.chosen)[0].abs().max() < 1e-12
    # The backward form is DPO with soft labels but for its entropy, the forward one EXO with an eps per pair.
    soft = pair_loss("sigmoid", pair, beta=BETA, soft_labels=torch.sigmoid(true))
    first, second = (
        torch.autograd.grad(x.sum(), pair.chosen)[0] for x in (soft, pair_loss("rpo_bwd_kl", pair, **given))
    )
    assert_same(first, second)
    eps = 0.2
    same = {"beta": BETA, "reward_gap": math.log((1 - eps) / eps)}
    exo = pair_loss("exo_pair", pair, beta=BETA, label_smoothing=eps)
    torch.testing.assert_close(pair_loss("rpo_fwd_kl", pair, **same), exo, rtol=1e-9, atol=1e-12)


def test_rebel_is_its_authors() -> None:
    pair = random_pair(pairs=20)
    ratio = (pair.chosen - pair.ref_chosen) - (pair.rejected - pair.ref_rejected)  # type: ignore[operator]
    assert_same(pair_loss("rebel", pair, reward_gap=GAPS, reward_scale=3.0), (ratio - 3.0 * GAPS) ** 2)
    scaled = pair_loss("rpo_sq", pair, beta=BETA, reward_gap=GAPS, reward_scale=BETA)
    assert_same(scaled, BETA**2 * pair_loss("rebel", pair, reward_gap=GAPS))


@pytest.mark.parametrize("name", ["rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "rebel"])
def test_a_gap_of_rewards_is_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match=f"reward_gap: got None, wanted a number or .* for {name}"):
        build_objective(name)
    with pytest.raises(ValueError, match="reward_gap: got None, wanted r_w - r_l"):
        pair_loss(name, random_pair())
    with pytest.raises(ValueError, match="reward_gap: got inf among them"):
        build_objective(name, reward_gap=torch.full((5,), torch.inf)).check(random_pair())
    with pytest.raises(ValueError, match="reward_gap: got a value, wanted None: sigmoid takes none"):
        build_objective("sigmoid", reward_gap=1.0)


def test_alpha_dpo_is_its_authors_on_one_batch() -> None:
    pair = random_pair(pairs=12)
    chosen, rejected, ref_chosen, ref_rejected = means(pair)
    beta, ratio, alpha, eps = 2.5, 0.6, 0.2, 0.1
    gap = (chosen - rejected) - (ref_chosen - ref_rejected)
    constant = ((gap - gap.mean()) / gap.std() * alpha + ratio).detach()
    logits = beta * ((chosen - rejected) - constant)
    want = -ls(logits) * (1 - eps) - ls(-logits) * eps
    got = alpha_dpo_loss(pair, beta=beta, gamma=beta * ratio, alpha=alpha, label_smoothing=eps)
    assert_same(got, want)
    grads = [torch.autograd.grad(x.mean(), (pair.chosen, pair.rejected)) for x in (got, want)]
    for first, second in zip(*grads, strict=True):
        assert_same(first, second)
    simpo = pair_loss("simpo", pair.without_reference(), beta=beta, gamma=1.5)
    assert_same(alpha_dpo_loss(pair, beta=beta, gamma=1.5, alpha=0.0), simpo)
    alone = PairLogps(**{k: None if v is None else v[:1] for k, v in vars(pair).items()})
    assert_same(alpha_dpo_loss(alone), pair_loss("simpo", alone.without_reference(), beta=2.5, gamma=1.5))
    # Pairs that do not count are not in the mean and the deviation.
    weights = torch.ones(12, dtype=torch.float64)
    weights[3:] = 0
    few = PairLogps(**{k: None if v is None else v[:3] for k, v in vars(pair).items()})
    weighted = build_objective("alpha_dpo", pair_weights=weights, num_pairs=3).loss(pair)
    assert_same(weighted, build_objective("alpha_dpo").loss(few))


def test_cal_dpo_is_its_authors() -> None:
    pair = random_pair(pairs=20)
    chosen, rejected = pair.chosen_logratios, pair.rejected_logratios
    target = torch.full((20,), 1 / (2 * 0.05), dtype=torch.float64)
    mse = torch.nn.functional.mse_loss
    want = (-ls(chosen - rejected) + 0.5 * (mse(chosen, target) + mse(rejected, -target))).mean()
    assert_same(build_objective("cal_dpo", beta=0.05).loss(pair), want)
    plain = pair_loss("cal_dpo", pair, calibration_weight=0.0)
    assert_same(plain, pair_loss("sigmoid", pair, beta=1.0))


def test_mdpo_is_its_authors() -> None:
    """Over pairs of two texts and pairs of two views, which have their chosen answers in common."""
    both = random_pair(pairs=20)
    chosen = torch.arange(20) % 10
    both = PairLogps(
        **{
            name: value if value is None or "rejected" in name else value[chosen]
            for name, value in vars(both).items()
        }
    )
    held, rejected = both.chosen_logratios, both.rejected_logratios
    text, view = held[:10] - rejected[:10], held[10:] - rejected[10:]
    want = (-ls(0.2 * text) - ls(0.2 * view) - ls(0.2 * held[:10])).mean()
    ours = build_objective(["sigmoid", "mdpo_anchor"], [2.0, 1.0], beta=0.2)
    assert_same(ours.loss(both), want)
    assert_same(pair_loss("mdpo_anchor", both, delta=0.3), -ls(0.1 * held - 0.3))


def answers(desirable: list[bool], *, with_reference: bool) -> UnpairedLogps:
    batch = random_batch(LOSSES["apo_zero_unpaired"])
    batch = replace(batch, is_desirable=torch.tensor(desirable))
    return batch if with_reference else batch.without_reference()


def test_npo_and_simnpo_are_their_authors() -> None:
    batch = answers([False] * 4, with_reference=True)
    neg_log_ratios = -(batch.logps - batch.ref_logps)
    want = -ls(BETA * neg_log_ratios).mean() * 2 / BETA
    assert_same(build_objective("npo", beta=BETA).loss(batch), want)
    free = batch.without_reference()
    forget = -free.logps / free.tokens - 0.4
    want = -ls(BETA * forget).mean() * 2 / BETA
    assert_same(build_objective("simnpo", beta=BETA, gamma=0.4).loss(free), want)
    # Of a small beta NPO is gradient ascent on the forget set, but for a constant.
    (grad,) = torch.autograd.grad(
        LOSSES["npo"]
        .function(replace(batch, logps=(x := batch.logps.clone().requires_grad_())), beta=1e-9)
        .sum(),
        x,
    )
    torch.testing.assert_close(grad, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["npo", "simnpo"])
def test_answers_to_keep_are_trained_on(name: str) -> None:
    batch = answers([True, False, True, False], with_reference=LOSSES[name].uses_reference)
    values = LOSSES[name].function(batch, desirable_weight=3.0, undesirable_weight=0.5)
    plain = LOSSES[name].function(batch)
    keep = batch.is_desirable
    assert_same(plain[keep], (-batch.logps / batch.tokens)[keep])
    assert_same(values, torch.where(keep, 3.0, 0.5) * plain)
    logps = batch.logps.clone().requires_grad_()
    (grad,) = torch.autograd.grad(LOSSES[name].function(replace(batch, logps=logps)).sum(), logps)
    assert (grad[keep] < 0).all() and (grad[~keep] > 0).all()  # up, and down


def test_lipo_lambda_by_its_formula() -> None:
    lists = random_batch(LOSSES["lipo_lambda"])
    want = []
    for i in range(4):
        keep = lists.group_ids == i
        s, psi = BETA * (lists.logps - lists.ref_logps)[keep], lists.scores[keep]
        place = 1 + (s[None] > s[:, None]).sum(1)
        total = torch.zeros((), dtype=torch.float64)
        for a in range(len(s)):
            for b in range(len(s)):
                if psi[a] > psi[b]:
                    gain = abs((2 ** psi[a] - 1) - (2 ** psi[b] - 1))
                    discount = abs(1 / math.log1p(place[a]) - 1 / math.log1p(place[b]))
                    total = total + gain * discount * torch.log1p(torch.exp(-(s[a] - s[b])))
        want.append(total)
    assert_same(lipo_lambda_loss(lists, beta=BETA), torch.stack(want))


def test_lipo_lambda_of_two_is_weighted_dpo() -> None:
    pair = random_pair()
    lists = ListLogps(
        torch.cat([pair.chosen, pair.rejected]), torch.ones(10).double(), torch.arange(5).repeat(2),
        torch.tensor([1.0, 0.0], dtype=torch.float64).repeat_interleave(5),
        torch.cat([pair.ref_chosen, pair.ref_rejected]),  # type: ignore[list-item]
    )  # fmt: skip
    weight = 1 / math.log(2) - 1 / math.log(3)
    assert_same(lipo_lambda_loss(lists, beta=BETA), weight * pair_loss("sigmoid", pair, beta=BETA))


def test_a_star_po_is_its_authors() -> None:
    lists = random_batch(LOSSES["a_star_po"])
    want = []
    for i in range(4):
        keep = lists.group_ids == i
        rewards, u = lists.scores[keep], (lists.logps - lists.ref_logps)[keep]
        v_star = torch.log(torch.exp(rewards / 0.5).mean()) * 0.5
        want.append(((BETA * u + v_star - rewards) ** 2).mean())
    assert_same(LOSSES["a_star_po"].function(lists, beta=BETA), torch.stack(want))
    # With the value from elsewhere it is the regression on an advantage: the same loss times 2 beta^2.
    keep = lists.group_ids == 2
    advantages = lists.scores[keep] - torch.log(torch.exp(lists.scores[keep] / 0.5).mean()) * 0.5
    steps = StepLogps(lists.logps[keep], advantages, lists.tokens[keep], lists.ref_logps[keep])
    direct = LOSSES["direct_advantage"].function(steps, beta=BETA)
    assert_same(2 * BETA**2 * direct.mean(), torch.stack(want)[2])


def test_slics_regulariser_is_of_whole_answers() -> None:
    """|y| times what a mean over tokens would be: HALOs' lambda_coef, and the paper's lambda."""
    pair = random_pair(LOSSES["slic"])
    bare = pair_loss("slic", pair)
    want = (bare - 0.1 * pair.chosen).mean()
    assert_same(mean_loss("slic", pair), want)
    assert_same(mean_loss("slic", pair, nll_weight=0.0), bare.mean())
    assert_same(build_objective("slic", num_pairs=10).loss(pair), want / 2)  # divided by pairs alone
    (got,) = torch.autograd.grad(mean_loss("slic", pair), pair.chosen)
    assert_same(got, torch.autograd.grad(bare.mean(), pair.chosen)[0] - 0.1 / 5)
    assert_same(mean_loss("sft_sum", pair), -pair.chosen.mean())
