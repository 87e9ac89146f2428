"""Mode ``pairs``: whatever a loss and a layout give it is cut into groups at the right places."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fastdpo import TokenLayout, fused_dpo_loss
from tests.functional.pair_cases import (  # noqa: F401  (a fixture)
    HIDDEN,
    IGNORED,
    LENGTHS,
    SMALL,
    Pairs,
    dense,
    gradients,
    make_pairs,
    mode,
    run,
    tiny_budgets,
)

pytestmark = pytest.mark.usefixtures("tiny_budgets")


def test_arguments_per_pair_and_per_token() -> None:
    """Every tensor that a loss takes is cut into groups at the right place."""
    pairs = make_pairs(torch.float64)
    num_pairs = len(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    per_pair = {
        name: torch.rand(num_pairs, generator=generator, dtype=torch.float64) + 0.1
        for name in ("beta", "margin", "pair_weights", "soft_labels")
    }
    per_pair["soft_labels"] /= 2
    token_weights = torch.rand(pairs.labels.shape, generator=generator, dtype=torch.float64)
    kwargs = per_pair | {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.3],
        "token_weights": token_weights,
        "nll_labels": pairs.labels.clamp(min=0),
    }
    for extra in ({}, {"num_pairs": torch.tensor(20.0), "num_tokens": 77}):
        want_out, want = gradients(pairs, mode("cache"), **kwargs, **extra)
        out, got = gradients(pairs, mode("pairs"), **kwargs, **extra)
        torch.testing.assert_close(out.loss, want_out.loss)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["cache", "pairs"])
def test_win_rates_are_regressed_on(name: str) -> None:
    """SPPO with soft win rates, by hand: half the squares of u - (P - 1/2) / beta, in every mode."""
    pairs, beta = make_pairs(torch.float64), 0.05
    generator = torch.Generator().manual_seed(4)
    rates = torch.rand(2, len(LENGTHS), generator=generator, dtype=torch.float64)
    given = {"chosen_win_rate": rates[0], "rejected_win_rate": rates[1]}
    out, got = gradients(pairs, mode(name), loss_type="sppo", beta=beta, **given)
    other, _ = gradients(pairs, mode("cache"))  # for its log-probabilities
    assert other.ref_chosen_logps is not None and other.ref_rejected_logps is not None
    u = torch.stack(
        [other.chosen_logps - other.ref_chosen_logps, other.rejected_logps - other.ref_rejected_logps]
    )
    is_scored = torch.tensor([chosen + rejected > 0 for chosen, rejected in LENGTHS])
    losses = 0.5 * (u - (rates - 0.5) / beta).square().sum(0)
    torch.testing.assert_close(out.loss, losses[is_scored].mean())
    _, want = dense(pairs, torch.float64, loss_type="sppo", beta=beta, **given)
    torch.testing.assert_close(got[:2], want[:2])
    hard, _ = gradients(
        pairs, mode(name), loss_type="sppo", beta=beta, chosen_win_rate=1, rejected_win_rate=0
    )
    twice, _ = gradients(pairs, mode(name), loss_type="sppo_hard", beta=beta)
    torch.testing.assert_close(2 * hard.loss, twice.loss)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_learnable_token_weights_get_their_gradient(loss_type: str) -> None:
    """`auto` then leaves `pairs`, whose gradients are of hidden states and head alone."""
    pairs = make_pairs(torch.float64)
    found = []
    for name in ("auto", "cache"):
        weights = torch.rand(
            pairs.labels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )
        weights.requires_grad_()
        hidden, head = pairs.leaves()
        ref = {"ref_logps": torch.zeros(pairs.labels.shape, dtype=torch.float64)}
        out = run(pairs, hidden, head, mode(name), loss_type=loss_type, token_weights=weights, **ref)
        found.append(torch.autograd.grad(out.loss, [weights, hidden, head.weight]))
    assert found[0][0].abs().sum() > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "given",
    [
        {"beta": numpy.float64(0.2)},
        {"margin": numpy.float64(0.5), "label_smoothing": numpy.float64(0.125)},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": numpy.array([1.0, 0.5])},
        {"loss_type": numpy.str_("ipo")},
    ],
    ids=str,
)
def test_numbers_of_numpy(given: dict[str, Any]) -> None:
    pairs = make_pairs()
    ref = {"ref_logps": torch.zeros(2 * len(LENGTHS))}
    found = [gradients(pairs, mode(name), **ref, **given) for name in ("pairs", "cache")]
    torch.testing.assert_close(found[0][0].loss, found[1][0].loss)
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("form", ["sums", "tokens"])
def test_precomputed_reference(form: str) -> None:
    pairs = make_pairs(torch.float64)
    num_pairs = len(LENGTHS)
    shape = (2 * num_pairs,) if form == "sums" else tuple(pairs.labels.shape)
    ref_logps = -torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want_out, want = gradients(pairs, mode("cache"), ref_logps=ref_logps)
    out, got = gradients(pairs, mode("pairs"), ref_logps=ref_logps)
    torch.testing.assert_close(out.loss, want_out.loss)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_labelled_token() -> None:
    pairs = make_pairs()
    pairs.labels.fill_(IGNORED)
    out, grads = gradients(pairs, mode("pairs"))
    assert out.loss.item() == 0 and not any(grad.any() for grad in grads)


def test_refusals() -> None:
    pairs = make_pairs(lengths=((2, 3),))
    hidden, head = pairs.leaves()
    learned = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="mode: 'pairs' needs fused_dpo_loss"):
        run(pairs, hidden, head, mode("pairs"), margin=learned)
    run(pairs, hidden, head, SMALL, margin=learned).loss.backward()
    assert learned.grad is not None  # `auto` took a mode that has it
    half = make_pairs(torch.float16, lengths=((2, 3),))
    with pytest.raises(ValueError, match="float16"):
        run(half, *half.leaves(), mode("pairs"))
    run(half, *half.leaves(), SMALL).loss.backward()


def shared_prompts(pairs: Pairs) -> tuple[Tensor, TokenLayout]:
    """The pairs' hidden states where chosen and rejected share the row that predicts their first token."""
    num_pairs, longest = len(pairs.labels) // 2, pairs.labels.shape[1]
    hidden = pairs.hidden.clone()
    index, targets, sequences = [], [], []
    for row in range(2 * num_pairs):
        first = True
        for position in range(longest - 1):
            token = int(pairs.labels[row, position + 1])
            if token == IGNORED:
                continue
            source = row % num_pairs if first else row
            index.append(source * longest + position)
            targets.append(token)
            sequences.append(row)
            hidden[row, position] = hidden[source, position]
            first = False
    lengths = tuple(sequences.count(row) for row in range(2 * num_pairs))
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    order = order[torch.tensor(sequences)[order].argsort(stable=True)]  # any order within an answer
    return hidden, TokenLayout(
        torch.tensor(index)[order], torch.tensor(targets)[order], torch.tensor(sequences)[order], lengths
    )


@pytest.mark.parametrize("has_lengths", [False, True])
@pytest.mark.parametrize("name", ["cache", "pairs", "recompute", "lean"])
def test_token_layout_adds_up_the_gradients_of_shared_rows(name: str, has_lengths: bool) -> None:
    pairs = make_pairs(torch.float64)
    hidden, layout = shared_prompts(pairs)
    num_pairs = len(LENGTHS)
    unshared, weight = hidden.clone().requires_grad_(), pairs.head.weight.clone().requires_grad_()
    ref_logps = torch.zeros(2 * num_pairs)
    want = fused_dpo_loss(unshared, weight, pairs.labels, ref_logps=ref_logps, execution=mode(name))
    want_hidden, want_weight = torch.autograd.grad(want.loss, (unshared, weight))
    # What the rows of the rejected answers' copies got belongs to the rows shared.
    longest = pairs.labels.shape[1]
    for row in range(num_pairs, 2 * num_pairs):
        tokens = (pairs.labels[row, 1:] != IGNORED).nonzero()
        if len(tokens):
            position = int(tokens[0])
            want_hidden[row - num_pairs, position] += want_hidden[row, position]
            want_hidden[row, position] = 0
    if not has_lengths:
        layout = TokenLayout(layout.token_index, layout.target_ids, layout.sequence_ids)
    leaf = hidden.clone().requires_grad_()
    flat = leaf.view(-1, HIDDEN)
    out = fused_dpo_loss(flat, weight, None, layout=layout, ref_logps=ref_logps, execution=mode(name))
    got_hidden, got_weight = torch.autograd.grad(out.loss, (leaf, weight))
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(out.chosen_logps, want.chosen_logps)
    torch.testing.assert_close(got_weight, want_weight)
    torch.testing.assert_close(got_hidden.view(2 * num_pairs, longest, HIDDEN), want_hidden)
