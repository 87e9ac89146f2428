"""NaN and infinity where a label is ignored change nothing that the hook returns, and no gradient of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import HeadStates, TeacherCombination, Teachers
from fastdpo.integrations.fused_output import require_states
from fastdpo.integrations.model import FusedLMOutput, patch_model
from tests.integrations.tiny import BATCH, fused, make_batch, make_model

BAD = (math.nan, math.inf, -math.inf)
STATISTICS = ("lse", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "topk_mass", "topk_entropy")


def unused(labels: Tensor) -> Tensor:
    """``(B, T)``: where a state predicts nothing that is labelled."""
    return torch.nn.functional.pad(labels[:, 1:] == -100, (0, 1), value=True)


def spoil(model: Any, bad: float, labels: Tensor) -> None:
    """Make the backbone's states ``bad`` where they are not used; the hook's own probe has other shapes."""
    where = unused(labels)[..., None]

    def change(module: Any, args: Any, result: Any) -> None:
        if result.last_hidden_state.shape[:2] == labels.shape:
            result.last_hidden_state = torch.where(where, bad, result.last_hidden_state)

    model.model.register_forward_hook(change)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    model: Any,
    bad: float,
    ask: Callable[[Any, float], FusedLMOutput],
    loss_of: Callable[[FusedLMOutput], Tensor],
    labels: Tensor = BATCH.labels,
) -> None:
    """With spoilt states, and ``ask``'s own spoilt numbers, everything is as with clean ones, to the bit."""
    clean, spoilt = patch_model(model), patch_model(copy.deepcopy(model))
    spoil(spoilt, bad, labels)
    wanted, found = ask(clean, 0.0), ask(spoilt, bad)
    for name in wanted:
        if isinstance(wanted[name], Tensor):
            assert torch.equal(found[name], wanted[name]) and found[name].isfinite().all(), name
    want, got = gradients(clean, loss_of(wanted)), gradients(spoilt, loss_of(found))
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def total(out: FusedLMOutput, *names: str) -> Tensor:
    return torch.stack([(out[name] * BATCH.upstream).sum() for name in names]).sum()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_states(family: str, bad: float) -> None:
    def ask(model: Any, bad: float) -> FusedLMOutput:
        return fused(model, logps_outputs=STATISTICS, logps_topk=3)

    assert_same(make_model(family), bad, ask, lambda out: total(out, "logps", "lse"))


@pytest.mark.parametrize("bad", BAD)
def test_a_reference_and_its_combination(bad: float) -> None:
    model = make_model()
    with torch.no_grad():
        first, second = (
            require_states(patch_model(make_model(seed=seed))(**BATCH.inputs, return_states=True))
            for seed in (1, 2)
        )

    def ask(model: Any, bad: float) -> FusedLMOutput:
        def spoilt(states: HeadStates) -> HeadStates:
            where = unused(BATCH.labels)[..., None]
            return HeadStates(torch.where(where, bad, states.hidden), states.lm_head)

        where = unused(BATCH.labels).roll(1, dims=1)
        weight = torch.where(where, bad, torch.full(where.shape, 0.7))
        teachers = Teachers(spoilt(first), spoilt(second), TeacherCombination(weight, -0.3, 0.1, 0.1))
        return fused(model, reference=teachers, logps_outputs=("forward_kl", "l1_distance"))

    assert_same(model, bad, ask, lambda out: total(out, "logps", "forward_kl"))


@pytest.mark.parametrize("bad", BAD)
def test_the_loss_of_pairs(bad: float) -> None:
    """Weights by the token, aligned with labels, and a reference, aligned with the states."""
    batch = make_batch(batch=4)
    where = unused(batch.labels)

    def ask(model: Any, bad: float) -> FusedLMOutput:
        weights = torch.where(where.roll(1, dims=1), bad, torch.full(where.shape, 0.5))
        reference = torch.where(where, bad, torch.full(where.shape, -4.0))
        given = {"ref_logps": reference, "token_weights": weights, "loss_type": "sigmoid"}
        return fused(model, **batch.inputs, labels=batch.labels, pair_loss=given)

    assert_same(make_model(), bad, ask, lambda out: out.loss, batch.labels)
