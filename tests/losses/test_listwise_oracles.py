"""Gradients and identities of the listwise losses, each against its paper's."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import (
    LOSSES,
    ListLogps,
    PairLogps,
    build_objective,
)
from tests.losses.common import random_pair
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


def as_lists(pair: PairLogps, *, scores: tuple[float, float] = (1.0, 0.0)) -> ListLogps:
    """P groups of two."""
    ref = pair.ref_chosen is not None and pair.ref_rejected is not None
    return ListLogps(
        torch.cat([pair.chosen, pair.rejected]),
        torch.cat([pair.chosen_tokens, pair.rejected_tokens]),
        torch.arange(5).repeat(2),
        torch.tensor(scores, dtype=torch.float64).repeat_interleave(5),
        torch.cat([pair.ref_chosen, pair.ref_rejected]) if ref else None,  # type: ignore[list-item]
    )


def group(logps: list[float], scores: list[float], ref: list[float] | None = None) -> ListLogps:
    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return ListLogps(
        tensor(logps),
        torch.full((len(logps),), 2.0).double(),
        torch.zeros(len(logps), dtype=torch.long),
        tensor(scores),
        None if ref is None else tensor(ref),
    )


def test_lists_of_two_are_dpo() -> None:
    pair = random_pair()
    dpo = losses("sigmoid", pair, beta=BETA)
    pairs = as_lists(pair)
    assert_same(losses("sdpo", pairs, beta=BETA), dpo)
    assert_same(losses("plackett_luce", pairs, beta=BETA), dpo)
    assert_same(losses("infonca", pairs, beta=BETA, score_temperature=1e-3), dpo)  # e^-1000: one-hot
    assert_same(losses("adpo", pairs, tau=1 / BETA, score_temperature=1e-3), dpo)
    q = 1 - EPS
    soft = as_lists(pair, scores=(math.log(q), math.log(1 - q)))
    cdpo = losses("sigmoid", pair, beta=BETA, label_smoothing=EPS)
    entropy = q * math.log(q) + (1 - q) * math.log(1 - q)
    own = {"tau": 1 / BETA, "score_temperature": 1.0, "normalize_scores": False}
    assert_same(losses("adpo", soft, **own), cdpo + entropy)
    assert_same(losses("infonca", soft, beta=BETA), cdpo)
    assert_same(losses("nca", pairs, beta=BETA, score_temperature=1e-3), losses("nca_pair", pair, beta=BETA))
    reversed_ = as_lists(pair, scores=(0.0, 1.0))
    assert_same(losses("sdpo", reversed_, beta=BETA), losses("sigmoid", pair, beta=BETA, soft_labels=0.0))


def test_softmax_gradients() -> None:
    lists = random_batch(LOSSES["sdpo"])
    index, mask = lists.index, lists.mask
    rewards = (BETA * lists.logratios).masked_fill(~mask, -torch.inf)
    p = rewards.softmax(-1)
    best = torch.zeros_like(p).scatter(
        1, lists.dense_scores.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True), 1.0
    )
    q = lists.dense_scores.masked_fill(~mask, -torch.inf).softmax(-1)

    def per_candidate(values: Tensor) -> Tensor:
        return torch.zeros(len(lists.logps)).double().index_put((index[mask],), values[mask])

    assert_same(gradient("sdpo", lists, beta=BETA), per_candidate(BETA * (p - best)))
    assert_same(gradient("infonca", lists, beta=BETA), per_candidate(BETA * (p - q)))
    own = {"tau": 1 / BETA, "score_temperature": 1.0, "normalize_scores": False}
    assert_same(gradient("adpo", lists, **own), per_candidate(BETA * (p - q)))
    free = replace(lists, ref_logps=None)
    means = free.per_token(free.logratios).masked_fill(~mask, -torch.inf)
    p = (means / 0.7).softmax(-1)
    q = ((means + 0.3 * lists.dense_scores) / 0.7).softmax(-1)
    tokens = lists.dense(lists.tokens).clamp(min=1)
    got = gradient("ddo_rm", free, tau=0.7, eta=0.3)
    assert_same(got, per_candidate((p - q) / 0.7 / tokens))


def test_sdpo_with_duplicates_and_ties() -> None:
    once = group([-1.0, -2.0], [1.0, 0.0], [0.0, 0.0])
    thrice = group([-1.0, -2.0, -2.0, -2.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4)
    # n copies of the rejected answer move the margin by log n
    assert_same(losses("sdpo", thrice), torch.log1p(3 * torch.exp(-1 - 0 * once.logps[:1])))
    tied = group([-1.0, -2.0, -4.0], [1.0, 1.0, 0.0], [0.0] * 3)
    rewards = tied.logps.log_softmax(0)
    assert_same(losses("sdpo", tied), -(rewards[0] + rewards[1])[None] / 2)


def test_plackett_luce_is_the_likelihood_of_the_ranking() -> None:
    """All rankings of four candidates add up to probability 1."""
    total = torch.zeros(1, dtype=torch.float64)
    for ranks in itertools.permutations([3.0, 2.0, 1.0, 0.0]):
        total += torch.exp(-losses("plackett_luce", group([-1.0, -2.5, 0.3, -4.0], list(ranks), [0.0] * 4)))
    torch.testing.assert_close(total, torch.ones(1, dtype=torch.float64))
    # Uneven groups, against a loop.
    lists = random_batch(LOSSES["plackett_luce"])
    want = []
    for i in range(4):
        keep = lists.group_ids == i
        u = (lists.logps - lists.ref_logps)[keep][lists.scores[keep].argsort(descending=True)]
        want.append(
            sum((torch.logsumexp(0.3 * u[k:], 0) - 0.3 * u[k] for k in range(len(u))), torch.zeros(()))
        )
    assert_same(losses("plackett_luce", lists, beta=0.3), torch.stack(want))


@pytest.mark.parametrize("name", ["infonca", "adpo", "ddo_rm", "sdpo"])
def test_equal_scores_ask_for_the_uniform_distribution(name: str) -> None:
    flat = group([-1.0, -1.0, -1.0], [0.7, 0.7, 0.7], [0.0] * 3 if LOSSES[name].uses_reference else None)
    value = losses(name, flat)
    assert_same(value, torch.tensor([0.0 if name == "adpo" else math.log(3)], dtype=torch.float64))
    assert gradient(name, flat).abs().max() < 1e-15


def test_ddo_rm_limits() -> None:
    lists = random_batch(LOSSES["ddo_rm"])
    assert gradient("ddo_rm", lists, eta=0.0).abs().max() < 1e-15
    constant = replace(lists, scores=torch.full_like(lists.logps, 3.0))
    assert gradient("ddo_rm", constant).abs().max() < 1e-14
    shifted = replace(lists, scores=lists.scores + 5.0)  # centring cancels
    assert_same(losses("ddo_rm", shifted), losses("ddo_rm", lists))
    means = lists.per_token(lists.logratios).masked_fill(~lists.mask, -torch.inf)
    best = lists.dense_scores.masked_fill(~lists.mask, -torch.inf).argmax(1, keepdim=True)
    hard = -means.log_softmax(-1).gather(1, best).squeeze(1)
    assert_same(losses("ddo_rm", lists, eta=1e6), hard)


def test_adpo_is_zero_with_zero_gradient_where_q_is_p() -> None:
    lists = random_batch(LOSSES["adpo"])
    own = {"tau": 2.0, "score_temperature": 1.0, "normalize_scores": False}
    at = replace(lists, scores=((lists.logps - lists.ref_logps) / 2).detach())
    assert losses("adpo", at, **own).abs().max() < 1e-13
    assert gradient("adpo", at, **own).abs().max() < 1e-13
    scaled = replace(lists, scores=100 * lists.scores + 7)  # normalised away
    torch.testing.assert_close(losses("adpo", scaled), losses("adpo", lists), rtol=1e-4, atol=1e-6)


def test_adpo_normalises_by_the_sample() -> None:
    """The deviation of n - 1, as torch.std has it."""
    lists = random_batch(LOSSES["adpo"])
    for i in (0, 2, 3):
        keep = lists.group_ids == i
        scores, u = lists.scores[keep], (lists.logps - lists.ref_logps)[keep]
        q = ((scores - scores.mean()) / scores.std() / 0.5).softmax(0)
        want = (q * (q.log() - u.log_softmax(0))).sum()
        torch.testing.assert_close(losses("adpo", lists)[i], want, rtol=1e-5, atol=1e-6)


def test_in_context_ranking() -> None:
    pair = random_pair()
    # n = 2 with w_2 = 0: (w_1 / 2) DPO, w_1 = (2^1 - 1) / log2(2) = 1
    assert_same(
        losses("in_context_ranking", as_lists(pair), beta=BETA), losses("sigmoid", pair, beta=BETA) / 2
    )
    flat = group([-1.0] * 3, [2.0, 0.0, 1.0], [0.0] * 3)
    weights = (3 / 1 + 0 + 1 / 2) / 3
    assert_same(
        losses("in_context_ranking", flat), torch.tensor([weights * math.log(2)], dtype=torch.float64)
    )
    assert losses("in_context_ranking", group([-3.0], [1.0], [0.0])).item() == 0
    lists = random_batch(LOSSES["in_context_ranking"])
    want = []
    for i in range(4):
        keep = (lists.group_ids == i).nonzero().squeeze(1)
        u, relevance, n = (lists.logps - lists.ref_logps)[keep], lists.scores[keep], len(keep)
        total = torch.zeros((), dtype=torch.float64)
        for a in range(n if n > 1 else 0):
            others = torch.tensor([b for b in range(n) if b != a])
            log_mean = torch.log(torch.exp(BETA * (u[others] - u[a])).mean())
            total = total + (2 ** relevance[a] - 1) / math.log2(2 + a) * torch.log1p(torch.exp(log_mean))
        want.append(total / n)
    assert_same(losses("in_context_ranking", lists, beta=BETA), torch.stack(want))


def test_rrhf() -> None:
    ordered = group([-1.0, -3.0, -5.0], [2.0, 1.0, 0.0])
    assert losses("rrhf", ordered).item() == 1.0  # pure SFT of the best
    assert losses("rrhf", ordered, mean_nll=True).item() == 0.5
    # One pair the wrong way round by (3 - 1) / 2 per token, on every length power.
    wrong = group([-3.0, -1.0], [1.0, 0.0])
    assert losses("rrhf", wrong, rank_weight=10.0).item() == 13.0
    assert losses("rrhf", wrong, length_power=0.0).item() == 5.0
    torch.testing.assert_close(gradient("rrhf", wrong, rank_weight=10.0), torch.tensor([-6.0, 5.0]).double())
    equal = group([-3.0, -1.0], [1.0, 1.0])
    assert losses("rrhf", equal).item() == 2.0  # nothing to rank; the NLL is shared
    assert losses("rrhf", group([-3.0], [1.0])).item() == 3.0


def test_trpa() -> None:
    pair = random_pair()
    norm = losses("sigmoid_norm", pair, beta=2.5 * BETA)
    for scores in (
        (1.0, 0.0),
        (-1.0, -2.0),
        (0.5, 0.25),
        (-2.0, -7.0),
    ):  # the order counts
        levels = as_lists(pair, scores=scores)
        assert_same(losses("trpa", levels, beta=BETA), norm)
    assert_same(losses("trpa", levels, beta=BETA, anisotropy=1.0), losses("sigmoid_norm", pair, beta=BETA))
    # Of three levels only pairs with the best answer are anisotropic, whatever the numbers.
    u = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    softplus = torch.nn.functional.softplus
    want = softplus(-torch.stack([0.25 * (u[2] - u[0]), 0.25 * (u[2] - u[1]), 0.1 * (u[0] - u[1])])).mean()
    for scores in ([0.0, -1.0, 3.0], [-2.0, -4.0, -1.0]):
        assert_same(losses("trpa", group((2 * u).tolist(), scores, [0.0] * 3)), want[None])


@pytest.mark.parametrize(
    ("name", "score"),
    [("trpa", 1.0), ("trpa", 0.0), ("trpa", -1.0), ("lipo_lambda", 1.0), ("lipo_lambda", 0.0)],
)
def test_a_group_of_one_level_teaches_nothing_and_counts_nowhere(name: str, score: float) -> None:
    """All right or all wrong: rewards do not say which, so nothing is pushed."""
    flat = group([-1.0, -3.0], [score, score], [0.0, 0.0])
    assert losses(name, flat).item() == 0 and not gradient(name, flat).any()
    both = ListLogps(
        torch.tensor([-1.0, -3.0, -2.0, -5.0], dtype=torch.float64),
        torch.full((4,), 2.0).double(),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([score, score, 1.0, 0.0], dtype=torch.float64),
        torch.zeros(4).double(),
    )
    alone = group([-2.0, -5.0], [1.0, 0.0], [0.0, 0.0])
    assert_same(build_objective(name).loss(both), build_objective(name).loss(alone))
    assert build_objective(name).loss(flat).item() == 0


def test_relevances_are_not_negative() -> None:
    """Ranks 1, 2, 3 as scores -1, -2, -3 would train the ranking upside down, without a floor."""
    backwards = group([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [0.0] * 3)
    for name in ("in_context_ranking",):
        with pytest.raises(ValueError, match=rf"scores of {name}: got -1.0 among them, wanted each a number"):
            build_objective(name).check(backwards)
        assert losses(name, backwards).isnan().all()  # where nobody reads them: not a plausible number
        with pytest.raises(ValueError, match=r"got 31.0 among them, wanted each a number in \[0, 30\]"):
            build_objective(name).check(group([-1.0, -2.0], [31.0, 0.0], [0.0] * 2))
        build_objective(name).check(group([-1.0, -2.0], [30.0, 0.0], [0.0] * 2))


def test_plackett_luce_gives_equal_scores_one_place() -> None:
    tied = group([-1.0, -2.5, 0.3], [1.0, 1.0, 0.0], [0.0] * 3)
    other = group([-2.5, -1.0, 0.3], [1.0, 1.0, 0.0], [0.0] * 3)
    u = 0.1 * tied.logps
    want = 2 * u.logsumexp(0) - u[0] - u[1]
    assert_same(losses("plackett_luce", tied), want[None])
    assert_same(losses("plackett_luce", other), want[None])


def test_bolt() -> None:
    lists = random_batch(LOSSES["bolt"])
    flat = losses("bolt", lists, score_temperature=1e9)
    counts = lists.mask.sum(-1)
    torch.testing.assert_close(flat, -lists.logratios.sum(-1) / counts, rtol=1e-7, atol=0)
    best = lists.dense_scores.masked_fill(~lists.mask, -torch.inf).argmax(1, keepdim=True)
    assert_same(losses("bolt", lists, score_temperature=1e-4), -lists.logratios.gather(1, best).squeeze(1))
    weights = torch.softmax(lists.dense_scores.masked_fill(~lists.mask, -torch.inf), -1)
    assert_same(gradient("bolt", lists)[lists.index[0, :3]], -weights[0, :3])


def test_wrpo() -> None:
    pair = random_pair()
    other = random_pair(seed=7)

    def three(source: PairLogps, own: PairLogps) -> ListLogps:
        return ListLogps(
            torch.cat([source.chosen, own.chosen, pair.rejected]),
            torch.ones(15).double(),
            torch.arange(5).repeat(3),
            ref_logps=torch.cat([source.ref_chosen, own.ref_chosen, pair.ref_rejected]),  # type: ignore[list-item]
        )

    dpo = losses("sigmoid", pair, beta=BETA)
    assert_same(losses("wrpo", three(other, pair), beta=BETA, source_weight=0.0), dpo)
    assert_same(losses("wrpo", three(pair, other), beta=BETA, source_weight=1.0), dpo)
    assert_same(losses("wrpo", three(pair, pair), beta=BETA, source_weight=0.3), dpo)
    lists = three(other, pair)
    m = BETA * (lists.logratios @ torch.tensor([0.3, 0.7, -1.0], dtype=torch.float64))
    slope = BETA * (sig(m) - 1)
    want = torch.cat([0.3 * slope, 0.7 * slope, -slope])
    assert_same(gradient("wrpo", lists, beta=BETA, source_weight=0.3), want)
    with pytest.raises(ValueError, match="groups of another size, wanted three candidates each"):
        losses("wrpo", as_lists(pair))
    with pytest.raises(ValueError, match="groups of another size"):
        losses("wrpo", replace(lists, group_ids=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5])))


@pytest.mark.parametrize("name", [n for n, s in LOSSES.items() if s.inputs is ListLogps and s.needs])
def test_a_nan_score_that_slips_through_makes_the_loss_nan(name: str) -> None:
    """On a device scores are not read before the loss: then they must not be taken for low or high."""
    lists = random_batch(LOSSES[name])
    position = int((lists.group_ids == 2).nonzero()[1])
    scores = lists.scores.index_fill(0, torch.tensor([position]), torch.nan)
    value = losses(name, replace(lists, scores=scores))
    assert value[2].isnan() and value[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("sdpo", 0.0),
        ("plackett_luce", 0.0),
        ("infonca", 0.0),
        ("adpo", 0.0),
        ("ddo_rm", 0.0),
        ("in_context_ranking", 0.0),
        ("rrhf", 3.0),  # its NLL
        ("bolt", 3.0),
        ("nca", 2 * math.log1p(math.exp(0.3)) - 0.3),  # softplus(0.3) + softplus(-0.3) at beta u = -0.3
        ("trpa", 0.0),
    ],
)
def test_a_group_of_one_candidate(name: str, want: float) -> None:
    one = group([-3.0], [2.0], [0.0] if LOSSES[name].uses_reference else None)
    assert losses(name, one).item() == pytest.approx(want, abs=1e-15)
    if want == 0:
        assert gradient(name, one).item() == 0
