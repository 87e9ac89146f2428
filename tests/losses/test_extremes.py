"""Every loss at every end of what it takes: 1e4 nats of either sign, beta and options from 1e-4 to 1e4."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, LossOption, LossSpec, PairLogps
from tests.losses.common import ALL_LOSSES, COMPANIONS, PAIRED, row_losses
from tests.losses.kinds import OTHER_KINDS, ROWS, leaf, random_batch, with_leaf

SMALL, LARGE = 1e-4, 1e4
# What an array of pairs has one of for each: its rows are these over and over.
PER_PAIR = {
    "margin": (-LARGE, 0.0, LARGE),
    "soft_labels": (0.0, SMALL, 1.0),
    "reward_gap": (-LARGE, SMALL, LARGE),
    "chosen_is_reference": (0.0, 1.0, 1.0),
}


def ends(option: LossOption) -> list[Any]:
    """Of a choice every other value; of a number those nearest to 0, to its ends and to 1e4."""
    if option.type is bool:
        return [not option.default]
    if option.choices:
        return [choice for choice in option.choices if choice != option.default]
    interval = option.interval
    assert interval is not None, option
    inside = [interval.low + 1e-6, interval.low, interval.high - 1e-6, interval.high]
    sizes = [sign * size for size in (0.0, SMALL, 0.01, 1.0, LARGE) for sign in (1, -1)]
    values = (*sizes, *inside)
    return sorted({x for x in values if x in interval and abs(x) <= LARGE and x != option.default})


def settings(spec: LossSpec) -> Iterator[dict[str, Any]]:
    """Every end of every option, with every choice of every other, and every end of beta."""
    betas: list[dict[str, Any]] = [{}]
    if spec.default_beta is not None:
        betas += [{"beta": SMALL}, {"beta": LARGE}]
    own = [option for option in spec.options if option.name != "nll_weight"]
    singles = [{}, *({option.name: value} for option in own for value in ends(option))]
    choices = [option for option in own if option.choices or option.type is bool]
    chosen = [{option.name: value} for option in choices for value in ends(option)]
    for one, two, beta in itertools.product(singles, [{}, *chosen], betas):
        if one.keys() & two.keys():
            continue
        both = one | two
        for name, companion in COMPANIONS.items():
            both |= companion if name in both else {}
        yield both | beta


def grid(spec: LossSpec) -> tuple[PairLogps, list[Tensor]]:
    """All combinations of the four sums, in fp32."""
    sums = torch.tensor(list(itertools.product((-LARGE, -79.0, -SMALL, 0.0, LARGE), repeat=4))).T
    chosen, rejected = (sums[i].clone().requires_grad_() for i in (0, 1))
    reference = (sums[2], sums[3]) if spec.uses_reference else (None, None)
    pairs = sums.shape[1]
    return PairLogps(chosen, rejected, torch.ones(pairs), torch.full((pairs,), 7.0), *reference), [
        chosen,
        rejected,
    ]


def assert_finite(losses: Tensor, leaves: list[Tensor], said: dict[str, Any]) -> None:
    assert losses.dtype == torch.float32
    assert losses.isfinite().all(), said
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    for grad in grads:
        assert grad is None or grad.isfinite().all(), said


@pytest.mark.promise(24)
@pytest.mark.parametrize("name", PAIRED)
def test_pairs(name: str) -> None:
    spec = LOSSES[name]
    pair, leaves = grid(spec)
    size = len(pair.chosen)
    tensors = {
        key: torch.tensor(values)[torch.arange(size) % 3]
        for key, values in PER_PAIR.items()
        if key in spec.per_pair
    }
    rows: list[dict[str, Any]] = [{}, *({key: value} for key, value in tensors.items())]
    if spec.default_beta is not None:
        rows.append({"beta": torch.tensor([SMALL, 0.1, LARGE])[torch.arange(size) % 3]})
    for said in settings(spec):
        for row in rows:
            if "soft_labels" in row and "label_smoothing" in said:
                continue
            arguments = said | row
            assert_finite(row_losses(name, pair, arguments), leaves, arguments)


@pytest.mark.promise(24)
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds(name: str) -> None:
    spec = LOSSES[name]
    batch = random_batch(spec)
    single = {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in vars(batch).items()
        if key != "index"
    }
    batch = type(batch)(**single)
    shape = leaf(batch).shape
    sign = torch.where(torch.arange(leaf(batch).numel()) % 2 == 0, 1.0, -1.0).view(shape)
    ones = torch.ones(shape)
    for said in settings(spec):
        for pattern in (LARGE * ones, -LARGE * ones, LARGE * sign, -SMALL * ones):
            values = pattern.clone().requires_grad_()
            assert_finite(row_losses(name, with_leaf(batch, values), said), [values], said)
    if "beta" in spec.per_pair and name != "aligndistil":
        betas = {"beta": torch.logspace(-4, 4, ROWS)}
        values = (LARGE * sign).requires_grad_()
        assert_finite(row_losses(name, with_leaf(batch, values), betas), [values], betas)


def test_every_loss_is_swept() -> None:
    assert sorted([*PAIRED, *OTHER_KINDS]) == ALL_LOSSES
