"""Ignored positions, and pairs of weight 0, may hold anything: the same loss, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import (
    LOSSES,
    Execution,
    LinearLogprobOutput,
    PackedLayout,
    dpo_loss_from_logps,
    fused_dpo_loss,
    preference_loss_from_logps,
)
from fastdpo.losses import DivergencePairLogps, TokenDivergences
from tests.functional.batch_cases import IGNORED, PAIRS, make_batch
from tests.functional.test_rows import NAMES, Answers

BAD = (torch.nan, torch.inf)
LENGTH, SEQUENCES = 7, 2 * PAIRS
MASK = torch.arange(LENGTH) < torch.tensor([5, 3, 7, 2, 6, 4])[:, None]


def tokens(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(SEQUENCES, LENGTH, generator=generator, dtype=torch.float64)


def filled(values: Tensor, value: float, packed: bool) -> Tensor:
    """``value`` wherever the mask is False, as a leaf."""
    values = values.where(MASK, value)
    return (values.reshape(-1) if packed else values).clone().requires_grad_()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo", "orpo", "cpo", "aot"])
def test_pairs_from_logps(name: str, packed: bool) -> None:
    results = []
    layout = PackedLayout(torch.arange(SEQUENCES + 1) * LENGTH) if packed else None
    mask = MASK.reshape(-1) if packed else MASK
    for value in (0.5, *BAD):
        logps, weights = (filled(tokens(seed), value, packed) for seed in (0, 1))
        given: dict[str, Any] = {"token_weights": weights.abs().detach().requires_grad_()}
        if LOSSES[name].uses_reference:
            given["ref_logps"] = filled(tokens(2), value, packed).detach()
        out = dpo_loss_from_logps(LinearLogprobOutput(logps), mask, loss_type=name, layout=layout, **given)
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, (logps, given["token_weights"]))))
        assert all(value.isfinite() for value in out.metrics.values())
    for loss, grads in results:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(*pair) for pair in zip(grads, results[0][1], strict=True))


def test_several_references_from_logps() -> None:
    results = []
    for value in (0.5, *BAD):
        logps, weights = filled(tokens(0), value, False), tokens(1).abs().where(MASK, value)
        references = torch.stack([tokens(seed).where(MASK, value) for seed in (2, 3)])
        out = dpo_loss_from_logps(
            LinearLogprobOutput(logps), MASK, ref_logps=references, ref_combination="mrpo",
            token_weights=weights, loss_type="sigmoid",
        )  # fmt: skip
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, logps)[0]))
    assert all(torch.equal(loss, results[0][0]) and torch.equal(g, results[0][1]) for loss, g in results)


DIVERGENT = [n for n, s in LOSSES.items() if s.inputs in (DivergencePairLogps, TokenDivergences)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [*NAMES, *DIVERGENT])
def test_other_kinds_from_logps(name: str, packed: bool) -> None:
    spec = LOSSES[name]
    layout = PackedLayout(torch.arange(SEQUENCES + 1) * LENGTH) if packed else None
    mask = MASK.reshape(-1) if packed else MASK
    extras: dict[str, Any] = {} if name in DIVERGENT else Answers(torch.float64).extras(name)
    if "segment_ids" in extras:
        segments = torch.arange(LENGTH) // 3 + 3 * torch.arange(SEQUENCES)[:, None]
        extras["segment_ids"] = segments.reshape(-1) if packed else segments
    results = []
    for value in (0.25, *BAD):
        logps = filled(tokens(0), value, packed)
        leaves, given = [logps], dict(extras)
        if name in DIVERGENT:
            divergences = filled(tokens(1).abs(), value, packed)
            leaves.append(divergences)
            kind = "forward_kl" if spec.inputs is DivergencePairLogps else "reverse_kl"
            given["jsd" if name == "gkd" else kind] = divergences
            if spec.inputs is TokenDivergences and spec.uses_reference:
                given["l1_distance"] = filled(tokens(3).abs(), value, packed).detach()
        else:
            given["token_weights"] = filled(tokens(1).abs(), value, packed)
            leaves.append(given["token_weights"])
        if "teacher_logps" in spec.needs or (spec.uses_reference and spec.inputs is not TokenDivergences):
            given["ref_logps"] = filled(tokens(2), value, packed).detach()
        out = preference_loss_from_logps(
            LinearLogprobOutput(logps), mask, loss_type=name, layout=layout, **given
        )
        grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        results.append((out.loss.detach(), [grad for grad in grads if grad is not None]))
    for loss, grads in results:
        assert torch.equal(loss, results[0][0]) and grads[-1].any()
        assert all(torch.equal(*pair) for pair in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("mode", ["pairs", "cache"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_a_bad_reference_in_a_pair_of_weight_zero(name: str, mode: str) -> None:
    batch = make_batch()
    weights = torch.tensor([1.0, 0.0, 2.0])
    results = []
    for value in (-30.0, *BAD):
        hidden, head = batch.leaves()
        ref_logps = torch.tensor([-20.0, value, -25.0, -18.0, value, -31.0])
        out = fused_dpo_loss(
            hidden, head, batch.labels, ref_logps=ref_logps, loss_type=name, pair_weights=weights,
            execution=Execution(mode=mode),
        )  # fmt: skip
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, (hidden, head))))
    for loss, grads in results:
        assert torch.equal(loss, results[0][0]) and loss.isfinite()
        assert all(torch.equal(*pair) for pair in zip(grads, results[0][1], strict=True))


def test_bad_weights_of_tokens_without_a_label() -> None:
    """The prompt's, the padding's; with labels of an NLL term, of tokens in no answer too."""
    batch = make_batch()
    results = []
    for value in (1.0, *BAD):
        hidden, head = batch.leaves()
        weights = torch.full(batch.labels.shape, 0.5).where(batch.labels != IGNORED, value)
        whole = batch.labels.where(batch.is_real, IGNORED)
        whole[:, 1:3] = 3
        out = fused_dpo_loss(
            hidden, head, batch.labels, loss_type="cpo", token_weights=weights, nll_labels=whole
        )
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, (hidden, head))))
    for loss, grads in results:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(*pair) for pair in zip(grads, results[0][1], strict=True))
