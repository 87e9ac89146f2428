"""Lists of losses: who gets which argument, what is divided by what, and what is refused."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.losses import LOSSES, PairLogps, build_objective
from fastdpo.losses.metrics import pair_metrics, token_metrics
from tests.losses.common import random_pair

CPU = torch.device("cpu")


def rows(pair: PairLogps, index: slice) -> PairLogps:
    return PairLogps(**{key: None if value is None else value[index] for key, value in vars(pair).items()})


def test_weighted_list_is_the_sum_of_its_losses_and_of_their_gradients() -> None:
    pair = random_pair()

    def value_and_grads(names: Any, weights: Any = None, **options: Any) -> list[Tensor]:
        loss = build_objective(names, weights, **options).loss(pair)
        return [loss.detach(), *torch.autograd.grad(loss, (pair.chosen, pair.rejected), allow_unused=True)]

    both = value_and_grads(["sigmoid", "ipo", "sft"], [0.8, 0.01, 0.3], beta=0.3, label_smoothing=0.1)
    sigmoid = value_and_grads("sigmoid", beta=0.3, label_smoothing=0.1)
    ipo = value_and_grads("ipo", beta=0.3)
    sft = value_and_grads("sft")
    assert sft[2] is None
    sft[2] = torch.zeros(5)
    for got, *parts in zip(both, sigmoid, ipo, sft, strict=True):
        torch.testing.assert_close(got, 0.8 * parts[0] + 0.01 * parts[1] + 0.3 * parts[2])


def test_weight_zero_removes_a_term_and_weights_default_to_one() -> None:
    pair = random_pair()
    sigmoid, hinge = (build_objective(name).loss(pair) for name in ("sigmoid", "hinge"))
    assert torch.equal(build_objective(["sigmoid", "hinge"], [1.0, 0.0]).loss(pair), sigmoid)
    assert torch.equal(build_objective(["sigmoid", "hinge"]).loss(pair), sigmoid + hinge)


def test_shared_option_goes_to_every_loss_that_has_it() -> None:
    pair = random_pair()
    got = build_objective(["sigmoid", "robust", "hinge"], label_smoothing=0.2).loss(pair)
    parts = [LOSSES[name].function(pair, label_smoothing=0.2).mean() for name in ("sigmoid", "robust")]
    torch.testing.assert_close(got, parts[0] + parts[1] + LOSSES["hinge"].function(pair).mean())


def test_beta_none_is_each_losss_own_default() -> None:
    pair = random_pair()
    got = build_objective(["sigmoid", "simpo"]).loss(pair)
    bare = pair.without_reference()
    want = LOSSES["sigmoid"].function(pair, beta=0.1) + LOSSES["simpo"].function(bare, beta=2.0)
    torch.testing.assert_close(got, want.mean())
    assert not torch.allclose(build_objective(["sigmoid", "simpo"], beta=0.1).loss(pair), got)


def test_pair_weights_multiply_the_share_of_a_pair() -> None:
    pair = random_pair()
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    for name in ("sigmoid", "ipo"):
        got = build_objective(name, pair_weights=weights).loss(pair)
        torch.testing.assert_close(got, (weights * LOSSES[name].function(pair)).mean())
    got = build_objective("sft", pair_weights=weights).loss(pair)
    torch.testing.assert_close(got, -(weights * pair.chosen).sum() / pair.chosen_tokens.sum())
    halved = build_objective("sigmoid", pair_weights=0.5).loss(pair)
    torch.testing.assert_close(halved, LOSSES["sigmoid"].function(pair).mean() / 2)


@pytest.mark.promise(47)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up_with_counts(as_tensor: bool) -> None:
    pair = random_pair(pairs=7, dtype=torch.float32)
    num_tokens: Any = pair.chosen_tokens.sum()
    counts: dict[str, Any] = {"num_pairs": 7, "num_tokens": num_tokens.item()}
    if as_tensor:
        counts = {"num_pairs": torch.tensor(7), "num_tokens": num_tokens}
    whole = build_objective(["sigmoid", "sft"]).loss(pair)
    parts = [
        build_objective(["sigmoid", "sft"], **counts).loss(rows(pair, index))
        for index in (slice(0, 1), slice(1, 5), slice(5, 7))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


def test_pairs_without_tokens_count_nowhere() -> None:
    pair = random_pair()
    zeros = torch.zeros(3, dtype=torch.float64)
    padded = PairLogps(**{k: None if v is None else torch.cat([v, zeros]) for k, v in vars(pair).items()})
    weights = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=torch.float64)
    for name in ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"):
        assert torch.equal(build_objective(name).loss(padded), build_objective(name).loss(pair))
        got = build_objective(name, pair_weights=weights).loss(padded)
        assert torch.equal(got, build_objective(name, pair_weights=weights[:5]).loss(pair))
    objective = build_objective("orpo")
    bare, padded = pair.without_reference(), padded.without_reference()
    want, got = (
        pair_metrics(batch, objective.rewards(batch), objective.logged_logps(batch))
        | objective.further_metrics(batch)
        for batch in (bare, padded)
    )
    assert {"nll_loss", "log_odds_ratio", "log_odds_chosen"} <= got.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("names", [["sigmoid"], ["sft"], ["ipo", "sft"]])
def test_no_tokens_at_all(names: list[str]) -> None:
    zeros = torch.zeros(4)
    chosen, rejected = zeros.clone().requires_grad_(), zeros.clone().requires_grad_()
    loss = build_objective(names).loss(PairLogps(chosen, rejected, zeros, zeros, zeros, zeros))
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, (chosen, rejected), allow_unused=True):
        assert grad is None or torch.equal(grad, zeros)


def test_one_empty_answer_counts_as_log_probability_zero() -> None:
    pair = random_pair()
    empty = torch.zeros(5, dtype=torch.float64)
    one_sided = replace(pair, rejected=empty, ref_rejected=empty, rejected_tokens=empty)
    for name in ("sigmoid", "ipo", "sigmoid_norm"):
        assert build_objective(name).loss(one_sided).isfinite()
    assert torch.equal(one_sided.delta, pair.chosen_logratios)
    torch.testing.assert_close(one_sided.mean_delta, pair.chosen_logratios / pair.chosen_tokens)


def test_rewards() -> None:
    pair = random_pair()
    for names, beta, want in (
        ("sigmoid", None, 0.1 * pair.chosen_logratios),
        ("ipo", 0.4, 0.4 * pair.chosen_logratios),
        (["sft", "sigmoid_norm"], None, 0.1 * pair.chosen_logratios),
        ("simpo", None, 2.0 * pair.chosen / pair.chosen_tokens),
        ("sft", None, 0.1 * pair.chosen),
        ("sft", 0.7, 0.7 * pair.chosen),
    ):
        objective = build_objective(names, beta=beta)
        chosen, rejected = objective.rewards(pair if objective.uses_reference else pair.without_reference())
        torch.testing.assert_close(chosen, want)
        assert not chosen.requires_grad and not rejected.requires_grad
    betas = torch.arange(1.0, 6.0, dtype=torch.float64)
    chosen, rejected = build_objective(beta=betas).rewards(pair)
    torch.testing.assert_close(rejected, betas * pair.rejected_logratios)


@pytest.mark.promise(27)
def test_metrics_by_hand() -> None:
    pair = PairLogps(
        torch.tensor([-4.0, -6.0, 0.0]),
        torch.tensor([-5.0, -2.0, 0.0]),
        torch.tensor([2.0, 3.0, 0.0]),
        torch.tensor([1.0, 0.0, 0.0]),
    )
    rewards = (torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.5, 2.0, 9.0]))
    got = pair_metrics(pair, rewards, (pair.chosen, pair.rejected))
    assert got == {
        "rewards/chosen": 1.5,
        "rewards/rejected": 1.25,
        "rewards/accuracies": 0.5,  # a tie is no success
        "rewards/margins": 0.25,
        "logps/chosen": -5.0,
        "logps/rejected": -3.5,
    }
    per_token = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    got = token_metrics(
        pair,
        lambda values: torch.stack([values[:, :3].sum(1), values[:, 3:].sum(1)]),
        entropy=per_token,
        mean_logit=per_token,
        is_top1=torch.tensor([[True, False, True, True]]),
    )
    assert got["num_tokens"] == 6.0 and got["entropy"] == 2.0
    assert got["logits/chosen"] == pytest.approx(1.2) and got["logits/rejected"] == 6.0
    assert got["mean_token_accuracy"] == pytest.approx(0.4)
    assert set(token_metrics(pair, lambda values: values)) == {"num_tokens"}


BAD_ARGUMENTS = [
    (dict(loss_type="sigmoi"), "loss_type: got 'sigmoi', wanted one of .* did you mean 'sigmoid'"),
    (dict(loss_type=[]), "loss_type: got an empty list"),
    (dict(loss_type=["sigmoid", "ppo"]), "loss_type: got 'ppo'"),
    (dict(loss_weights=[1.0, 2.0]), "loss_weights: got [1.0, 2.0], wanted a list of 1"),
    (dict(loss_weights=1.0), "loss_weights: got 1.0, wanted a list of 1"),
    (dict(loss_weights=[float("nan")]), "loss_weights: got nan, wanted finite numbers"),
    (dict(loss_weights=["1"]), "loss_weights: got '1', wanted finite numbers"),
    (dict(beta=0.0), "beta: got 0.0, wanted a number in (0, inf)"),
    (dict(beta=float("inf")), "beta: got inf"),
    (dict(beta="0.1"), "beta: got '0.1', wanted a number or a (P,) tensor"),
    (dict(beta=True), "beta: got True, wanted a number"),
    (dict(beta=torch.tensor([1])), "beta: got torch.int64, wanted a floating-point tensor"),
    (dict(margin=float("nan")), "margin: got nan, wanted a finite number"),
    (dict(margin=[0.1]), "margin: got [0.1], wanted a number or a (P,) tensor"),
    (dict(soft_labels=1.5), "soft_labels: got 1.5, wanted a number in [0, 1]"),
    (dict(pair_weights=-1), "pair_weights: got -1, wanted a number in [0, inf)"),
    (dict(loss_type="robust", soft_labels=0.5), "soft_labels: got a value, wanted None: robust takes none"),
    (dict(loss_type=["sigmoid", "robust"], soft_labels=0.5), "soft_labels: .* robust takes none"),
    (dict(loss_type="sft", margin=0.5), "margin: got a value, wanted None: sft takes none"),
    (
        dict(chosen_win_rate=0.5, rejected_win_rate=0.5),
        "chosen_win_rate: got a value, wanted None: sigmoid takes none",
    ),
    (
        dict(loss_type="sppo", chosen_win_rate=0.5),
        "rejected_win_rate: got None beside chosen_win_rate, wanted both",
    ),
    (dict(loss_type="sppo", rejected_win_rate=0.5), "chosen_win_rate: got None beside rejected_win_rate"),
    (
        dict(loss_type="sppo", chosen_win_rate=1.5, rejected_win_rate=0.5),
        "chosen_win_rate: got 1.5, wanted a number in [0, 1]",
    ),
    (
        dict(loss_type="sppo", chosen_win_rate=0.7, rejected_win_rate=0.5, soft_labels=0.7),
        "soft_labels: got a value together with win rates, wanted one of the two",
    ),
    (dict(num_pairs=0), "num_pairs: got 0, wanted a positive number or a 0-d tensor"),
    (dict(num_pairs=torch.ones(2)), "num_pairs: got shape (2,)"),
    (dict(loss_type="sft", num_pairs=4), "num_tokens: got None, wanted a count: sft divides by it"),
    (dict(loss_type=["sigmoid", "sft"], num_pairs=4), "num_tokens: got None, wanted a count"),
    (dict(num_tokens=4), "num_pairs: got None, wanted a count: sigmoid divides by it"),
    (dict(label_smoothing=0.5), "label_smoothing: got 0.5, wanted a number in [0, 0.5)"),
    (dict(label_smoothing=-0.1), "label_smoothing: got -0.1"),
    (dict(label_smoothing="0.1"), "label_smoothing: got '0.1', wanted float"),
    (dict(label_smoothing=True), "label_smoothing: got True, wanted float"),
    (dict(loss_type="ipo", length_normalize=1), "length_normalize: got 1, wanted bool"),
    (dict(loss_type="simpo", gamma=-0.5), "gamma: got -0.5, wanted a number in [0, inf)"),
    (dict(gamma=0.5), "gamma: got an option that sigmoid does not have, wanted one of .* label_smoothing"),
    (dict(loss_type="hinge", label_smoothing=0.1), "label_smoothing: got an option that hinge does not have"),
]


@pytest.mark.promise(23)
@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_objective(**arguments)
    pattern = ".*".join(re.escape(part) for part in message.split(" .* "))
    assert re.search(pattern, str(error.value)), error.value


def test_soft_labels_and_label_smoothing_are_one_too_many() -> None:
    objective = build_objective(soft_labels=0.7, label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing: got 0.1 together with soft_labels"):
        objective.loss(random_pair())
    build_objective(soft_labels=0.7, label_smoothing=0.0).loss(random_pair())


@pytest.mark.parametrize(
    ("arguments", "batch", "message"),
    [
        (
            {},
            dict(has_reference=False),
            "ref_logps: got no reference, wanted ref_hidden or ref_logps for sigmoid",
        ),
        (dict(loss_type="simpo"), dict(has_reference=True), "ref_logps: got a value that simpo does not use"),
        (
            dict(loss_type="sft"),
            dict(has_reference=False, has_token_weights=True),
            "token_weights: got a value that",
        ),
        (
            {},
            dict(has_reference=True, has_nll_tokens=True),
            "nll_labels or nll_mask: got a value that sigmoid does not use",
        ),
        (
            dict(beta=torch.ones(4)),
            dict(has_reference=True),
            r"beta: got shape \(4,\), wanted a number or \(5,\)",
        ),
        (dict(margin=torch.ones(5, 1)), dict(has_reference=True), r"margin: got shape \(5, 1\)"),
        (
            dict(soft_labels=torch.ones(5, device="meta")),
            dict(has_reference=True),
            "soft_labels: got meta, wanted cpu",
        ),
    ],
)
def test_batches_that_do_not_fit(arguments: dict[str, Any], batch: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(**arguments).check_batch(5, CPU, **batch)


def test_batches_that_fit() -> None:
    build_objective(["sigmoid", "sft"], beta=torch.tensor(0.1), margin=torch.ones(5)).check_batch(
        5, CPU, has_reference=True, has_token_weights=True, has_nll_tokens=True
    )


OUT_OF_RANGE = [
    ({"beta": [0.1, 0.0]}, "beta: got 0.0 among them, wanted each a number in (0, inf)"),
    ({"beta": [0.1, -0.1]}, "beta: got -0.1"),
    ({"beta": [math.inf, 0.1]}, "beta: got inf"),
    ({"margin": [math.nan, 0.1]}, "margin: got nan among them, wanted each a finite number"),
    ({"margin": [-math.inf, 0.1]}, "margin: got -inf"),
    ({"soft_labels": [0.5, 1.5]}, "soft_labels: got 1.5 among them, wanted each a number in [0, 1]"),
    ({"soft_labels": [-0.5, 1.0]}, "soft_labels: got -0.5"),
    ({"pair_weights": [1.0, -1.0]}, "pair_weights: got -1.0 among them, wanted each a number in [0, inf)"),
    ({"pair_weights": [1.0, math.nan]}, "pair_weights: got nan"),
    (
        {"loss_type": "sppo", "chosen_win_rate": [0.5, 2.0], "rejected_win_rate": [0.5, 0.0]},
        "chosen_win_rate: got 2.0 among them, wanted each a number in [0, 1]",
    ),
]


def as_tensors(arguments: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    # In fp64, so that the message has the number as it was written.
    return {
        name: torch.tensor(value, dtype=torch.float64, device=device) if isinstance(value, list) else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize(("arguments", "message"), OUT_OF_RANGE)
def test_values_of_tensors_on_the_cpu(arguments: dict[str, Any], message: str) -> None:
    given = as_tensors(arguments)
    pair = random_pair(pairs=2)
    for check in (
        lambda objective: objective.check_batch(2, CPU, has_reference=True),
        lambda objective: objective.check(pair),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check(build_objective(**given))
        one_for_all = build_objective("sigmoid", beta=torch.tensor(-2.0))
        with pytest.raises(ValueError, match="beta: got -2.0 among them"):
            check(one_for_all)


@pytest.mark.parametrize(("arguments", "message"), OUT_OF_RANGE)
def test_values_of_tensors_are_taken_on_trust_where_reading_would_wait(
    arguments: dict[str, Any], message: str
) -> None:
    """Of tensors on a device, or without values yet (fake ones, of any device); and in compiled code."""
    build_objective(**as_tensors(arguments, "meta")).check_batch(2, torch.device("meta"), has_reference=True)
    with FakeTensorMode():
        for device in ("cuda", "cpu"):
            fake = {
                name: torch.zeros(2, device=device) if isinstance(value, list) else value
                for name, value in arguments.items()
            }
            where = next(value.device for value in fake.values() if isinstance(value, Tensor))
            build_objective(**fake).check_batch(2, where, has_reference=True)

    def check(given: dict[str, Any]) -> Tensor:
        build_objective(**given).check_batch(2, CPU, has_reference=True)
        return torch.zeros(())

    torch.compile(check, fullgraph=True, backend="eager")(as_tensors(arguments))


def test_the_ends_of_the_ranges_and_a_learnt_beta_are_fine() -> None:
    build_objective(
        beta=torch.tensor([1e-30, 1e30], requires_grad=True),
        margin=torch.tensor([-1e30, 1e30]),
        soft_labels=torch.tensor([0.0, 1.0]).bfloat16(),
        pair_weights=torch.tensor([0.0, 1e30]),
    ).check_batch(2, CPU, has_reference=True)
