"""Aggregators beyond plain sums, and weights: against loops, the papers' identities, and TRL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.functional.pairs import dpo_loss_from_logps
from fastdpo.losses.aggregate import (
    ld_weights,
    segment_sums,
    sequence_means,
    sequence_sums,
    suffix_weights,
    weighted_sums,
)
from fastdpo.losses.weights import search_soft_labels, semantic_weights, wpo_weights
from tests.losses.test_trl_parity import (
    BETA,
    TRL_BATCHES,
    needs_trl,
    on_grid,
    random_tokens,
    trl_trainer_loss,
)

LENGTHS = [3, 0, 5, 2, 4, 1]


def packed_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(values, mask, cu_seqlens) of three pairs; some tokens are masked away, and one sequence is empty."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    values = torch.randn(total, generator=generator, dtype=torch.float64)
    mask = torch.rand(total, generator=generator) < 0.8
    return values, mask, torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])


def padded(packed: Tensor, fill: float | bool | int) -> Tensor:
    out = torch.full((len(LENGTHS), 6), fill, dtype=packed.dtype)
    for row, part in zip(out, packed.split(LENGTHS), strict=True):
        row[: len(part)] = part
    return out


def test_means_and_weighted_sums_against_loops() -> None:
    values, mask, bounds = packed_batch()
    weights = torch.rand(len(values), dtype=torch.float64)
    sums, means = [], []
    for v, m, w in zip(values.split(LENGTHS), mask.split(LENGTHS), weights.split(LENGTHS), strict=True):
        sums.append((v[m] * w[m]).sum())
        means.append(v[m].mean() if m.any() else torch.zeros(()).double())
    torch.testing.assert_close(weighted_sums(values, weights, mask, bounds), torch.stack(sums))
    torch.testing.assert_close(sequence_means(values, mask, bounds), torch.stack(means))
    dense = sequence_means(padded(values, 0.0), padded(mask, False))
    torch.testing.assert_close(dense, sequence_means(values, mask, bounds))


def test_weighted_sums_are_linear_with_the_weights_as_gradient() -> None:
    values, mask, bounds = packed_batch()
    values.requires_grad_()
    weights = torch.rand(len(values), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(weighted_sums(values, weights, mask, bounds).sum(), values)
    assert torch.equal(grad, weights.detach() * mask)


def ld_by_loop(mask: Tensor, alpha: float) -> Tensor:
    rows = [part.long() for part in mask.split(LENGTHS)]
    pairs = len(rows) // 2
    out = []
    for i, row in enumerate(rows):
        shared = min(int(rows[i % pairs].sum()), int(rows[i % pairs + pairs].sum()))
        rank, weights = 0, []
        for kept in row.tolist():
            weights.append(0.0 if not kept else 1.0 if rank < shared else alpha)
            rank += kept
        out += weights
    return torch.tensor(out)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_ld_weights_against_a_loop(alpha: float, seed: int) -> None:
    _, mask, bounds = packed_batch(seed)
    want = ld_by_loop(mask, alpha)
    assert torch.equal(ld_weights(mask, alpha, bounds), want)
    assert torch.equal(ld_weights(padded(mask, False), alpha), padded(want, 0.0))


def test_ld_identities_and_refusals() -> None:
    mask = torch.arange(6) < torch.tensor([[4], [2], [4], [2]])
    assert torch.equal(ld_weights(mask, 0.3), mask.float())  # equal lengths: DPO for any alpha
    assert torch.equal(ld_weights(mask[:0], 0.3), torch.zeros(0, 6))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha: got"):
            ld_weights(mask, alpha)
    with pytest.raises(ValueError, match="mask: got 3 sequences, wanted chosen and rejected"):
        ld_weights(mask[:3], 0.3)


def test_suffix_starts_at_the_first_difference() -> None:
    labels = torch.tensor(
        [
            [9, 1, 2, 3, 4],  # differs from its partner at the third token
            [9, 5, 6, 0, 0],  # its partner begins with it
            [9, 7, 0, 0, 0],
            [1, 2, 8, 4, 0],
            [9, 5, 6, 7, 0],
            [6, 0, 0, 0, 0],
        ]
    )
    mask = torch.tensor(
        [
            [0, 1, 1, 1, 1],
            [0, 1, 1, 0, 0],
            [0, 1, 0, 0, 0],
            [1, 1, 1, 1, 0],
            [0, 1, 1, 1, 0],
            [1, 0, 0, 0, 0],
        ]
    ).bool()
    want = torch.tensor(
        [
            [0, 0, 0, 1, 1],
            [0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 0, 1, 0],
            [1, 0, 0, 0, 0],
        ]
    ).float()
    assert torch.equal(suffix_weights(labels, mask), want)
    bounds = torch.arange(7) * 5
    assert torch.equal(suffix_weights(labels.view(-1), mask.view(-1), bounds), want.view(-1))
    assert suffix_weights(labels[:0], mask[:0]).shape == (0, 5)
    with pytest.raises(ValueError, match=r"labels: got shape \(6, 4\), wanted \(6, 5\)"):
        suffix_weights(labels[:, 1:], mask)


def test_suffix_sums_give_the_same_margin_where_the_prefix_has_the_same_logps() -> None:
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, 7, 8]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    logps = -torch.rand(2, 4, dtype=torch.float64)
    logps[1, :2] = logps[0, :2]
    sums = sequence_sums(logps, mask)
    suffix = weighted_sums(logps, suffix_weights(labels, mask), mask)
    torch.testing.assert_close(sums[0] - sums[1], suffix[0] - suffix[1])


def test_segment_sums_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(-1, 6, (4, 9), generator=generator)
    ids[ids == 3] = 4  # an empty segment
    got = segment_sums(values, ids, 7)
    want = torch.stack([values[ids == i].sum() for i in range(7)])
    torch.testing.assert_close(got, want)
    assert got[3] == 0 and got[6] == 0
    upstream = torch.arange(1.0, 8.0, dtype=torch.float64)
    (grad,) = torch.autograd.grad(got, values, upstream)
    assert torch.equal(grad, torch.where(ids >= 0, upstream[ids.clamp(min=0)], 0))
    broken = values.detach().masked_fill(ids < 0, torch.nan)
    assert torch.equal(segment_sums(broken, ids, 7), got)
    with pytest.raises(ValueError, match="segment_ids: got 5, wanted less than 5"):
        segment_sums(values, ids, 5)
    with pytest.raises(ValueError, match="segment_ids: got shape"):
        segment_sums(values, ids[:2], 7)
    assert segment_sums(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2).tolist() == [0.0, 0.0]


def test_wpo_weights_of_predictable_policies() -> None:
    mask = torch.arange(6) < torch.tensor([[4], [2], [5], [0]])
    vocabulary = 50.0
    uniform = torch.full((4, 6), vocabulary).log()
    torch.testing.assert_close(wpo_weights(-uniform, -uniform, mask), torch.ones(2))  # log(V / V^2)
    certain = torch.zeros(4, 6)
    torch.testing.assert_close(wpo_weights(certain, certain, mask), torch.ones(2))
    likely, unlikely = torch.full((4, 6), -0.1), torch.full((4, 6), -3.0)
    collision = torch.full((4, 6), -0.5)
    assert torch.equal(wpo_weights(likely, collision, mask), torch.ones(2))  # bounded
    unbounded = wpo_weights(likely, collision, mask, max_weight=None)
    torch.testing.assert_close(unbounded, torch.tensor([0.8, 0.4]).exp())  # an empty answer counts 1
    torch.testing.assert_close(wpo_weights(unlikely, collision, mask), torch.tensor([-5.0, -2.5]).exp())
    grad = wpo_weights(likely.requires_grad_(), collision, mask)
    assert not grad.requires_grad


def test_semantic_weights() -> None:
    cosine = torch.tensor([1.0, 0.0, -1.0])
    torch.testing.assert_close(semantic_weights(cosine, 0.5), torch.tensor([0.0, -0.5, -1.0]).exp())
    assert torch.equal(semantic_weights(cosine, 0.0), torch.ones(3))
    with pytest.raises(ValueError, match="alpha: got -1"):
        semantic_weights(cosine, -1.0)


def test_search_soft_labels() -> None:
    got = search_soft_labels(torch.tensor([4.0, 0.5, 1.0]), torch.tensor([1.0, 3.0, 0.0]))
    # c = 1 / (1 + 1/4) = 0.8; c = 1 / (1 + 3) = 0.25, so eps is cut to 1/2; c = 1
    torch.testing.assert_close(got, torch.tensor([0.8, 0.5, 1.0]))


@needs_trl
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "apo_zero"])
def test_ld_equals_installed_trl(name: str) -> None:
    for seed in range(TRL_BATCHES):
        token, mask, _ = random_tokens(seed)
        generator = torch.Generator().manual_seed(seed)
        ref = (token.logps.detach() + on_grid(torch.randn(6, 12, generator=generator))).where(mask, 0)
        weights = ld_weights(mask, 0.5)  # a power of two, so that TRL's sums stay exact
        want, metrics = trl_trainer_loss(name, token, mask, (ref * weights).sum(1), ld_alpha=0.5)
        got = dpo_loss_from_logps(
            token, mask, ref_logps=ref, token_weights=weights, loss_type=name, beta=BETA
        )
        torch.testing.assert_close(got.loss, want, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(x, token.logps)[0][mask] for x in (got.loss, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
        assert got.metrics["rewards/margins"].item() == pytest.approx(
            metrics["rewards/margins"], rel=1e-5, abs=1e-6
        )


@needs_trl
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard"])
def test_wpo_equals_installed_trl(name: str) -> None:
    for seed in range(TRL_BATCHES):
        token, mask, ref = random_tokens(seed)
        want, _ = trl_trainer_loss(name, token, mask, ref, use_weighting=True)
        statistics: Any = token.log_sum_sq_probs
        weights = wpo_weights(token.logps, statistics, mask, max_weight=None)
        got = dpo_loss_from_logps(token, mask, ref_logps=ref, pair_weights=weights, loss_type=name, beta=BETA)
        torch.testing.assert_close(got.loss, want, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(x, token.logps)[0][mask] for x in (got.loss, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
