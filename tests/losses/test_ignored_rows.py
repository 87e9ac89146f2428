"""Rows of weight 0 and rows without a token: whatever stands in them, loss and gradient are those without."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, ListLogps, PairLogps, build_objective
from fastdpo.losses.token_batches import TokenDivergences, TokenLogps
from tests.losses.common import ALL_LOSSES, random_pair
from tests.losses.kinds import random_batch

ROWS, IGNORED = 4, 2
# What tells rows and tokens apart stays sound: garbage there is a mistake, not something to ignore.
STRUCTURE = ("tokens", "chosen_tokens", "rejected_tokens", "nll_tokens")


def batch_of(name: str) -> Any:
    spec = LOSSES[name]
    if spec.inputs is not PairLogps:
        return random_batch(spec)
    pair = random_pair(spec, pairs=ROWS)
    return replace(pair, chosen=pair.chosen.detach(), rejected=pair.rejected.detach())


def row_of(batch: Any, values: Tensor) -> Tensor:
    """Which row each of a field's numbers belongs to."""
    if isinstance(batch, ListLogps):
        return batch.group_ids
    return torch.arange(ROWS).view(-1, *[1] * (values.dim() - 1)).expand_as(values)


def spoilt(batch: Any, value: float, *, without_tokens: bool) -> tuple[Any, list[Tensor]]:
    """The batch with ``value`` all over the ignored row, its numbers leaves."""
    changed: dict[str, Any] = {}
    for item in fields(batch):
        values = getattr(batch, item.name)
        if not isinstance(values, Tensor) or values.dim() == 0:
            continue
        is_ignored = row_of(batch, values) == IGNORED
        if item.name in STRUCTURE:
            changed[item.name] = values.masked_fill(is_ignored, 0) if without_tokens else values
        elif item.name == "mask":
            changed[item.name] = values & ~is_ignored if without_tokens else values
        elif values.is_floating_point():
            changed[item.name] = values.masked_fill(is_ignored, value).requires_grad_()
    leaves = [values for name, values in changed.items() if name not in (*STRUCTURE, "mask")]
    return replace(batch, **changed), leaves


def arguments_of(name: str, value: float) -> dict[str, Any]:
    """Numbers per row where the loss takes them, ``value`` in the ignored row."""
    usual = {"beta": 0.3, "margin": 0.2, "soft_labels": 0.7, "reward_gap": 0.5, "chosen_is_reference": 1.0}
    names = [key for key in usual if key in LOSSES[name].per_pair]
    if name == "aligndistil":
        names = []
    spoil = torch.arange(ROWS) == IGNORED
    return {key: torch.full((ROWS,), usual[key]).double().masked_fill(spoil, value) for key in names}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_rows_that_do_not_count_are_not_seen(name: str, value: float) -> None:
    weights = torch.ones(ROWS, dtype=torch.float64)
    weights[IGNORED] = 0
    results = []
    for filling in (0.5, value):
        for without_tokens in (False, True):
            batch, leaves = spoilt(batch_of(name), filling, without_tokens=without_tokens)
            given: dict[str, Any] = {} if without_tokens else {"pair_weights": weights}
            counts = {"num_pairs": 3, "num_tokens": 50} if LOSSES[name].nll_weight else {"num_pairs": 3}
            counts = {"num_tokens": 50} if LOSSES[name].scope == "token" else counts
            objective = build_objective(name, **arguments_of(name, filling), **given, **counts)
            loss = objective.loss(batch)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            results.append((loss.detach(), [x for x in grads if x is not None]))
    for loss, grads in results:
        assert loss.isfinite() and torch.equal(loss, results[0][0])
        for grad, want in zip(grads, results[0][1], strict=True):
            assert grad.isfinite().all() and torch.equal(grad, want)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [n for n, s in LOSSES.items() if s.inputs in (TokenLogps, TokenDivergences)])
def test_tokens_that_do_not_count_are_not_seen(name: str, packed: bool) -> None:
    clean = random_batch(LOSSES[name])
    names = [
        item.name
        for item in fields(clean)
        if isinstance(values := getattr(clean, item.name), Tensor) and values.shape == clean.mask.shape
    ]
    results = []
    for filling in (0.25, torch.nan, torch.inf):
        changed = {key: getattr(clean, key).where(clean.mask, filling) for key in names if key != "mask"}
        if packed:
            changed = {key: values.reshape(-1) for key, values in changed.items()}
            changed |= {"mask": clean.mask.reshape(-1), "cu_seqlens": torch.arange(ROWS + 1) * 5}
        leaves = [
            values.requires_grad_() for key, values in changed.items() if key in names and key != "mask"
        ]
        objective = build_objective(name, pair_weights=torch.tensor([1.0, 0.0, 2.0, 1.0]).double())
        loss = objective.loss(replace(clean, **changed))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append((loss.detach(), [x for x in grads if x is not None]))
    for loss, grads in results:
        assert torch.equal(loss, results[0][0])
        for grad, want in zip(grads, results[0][1], strict=True):
            assert torch.equal(grad, want) and grad.any()


def test_a_loss_of_weight_zero_is_not_there() -> None:
    """Beside a loss that is not finite its share would be NaN."""
    pair = random_pair()
    broken = replace(pair, rejected=torch.full_like(pair.rejected, torch.nan))
    loss = build_objective(["sigmoid", "sft"], [0.0, 1.0]).loss(broken)
    assert torch.equal(loss, build_objective("sft").loss(pair))
    assert build_objective("sigmoid", [0.0]).loss(pair).item() == 0
