"""Mode ``pairs``: the results of the other modes in one pass, for every loss that is a sum over pairs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fastdpo import Execution, LMHead, TokenLayout, explain_plan, fused_dpo_loss, plan, schedule
from fastdpo.losses import LOSSES, PairLogps
from fastdpo.ops.paired_loss import paired_loss_op
from tests.ops.test_gemm_passes import count_passes
from tests.pair_cases import (
    HIDDEN,
    IGNORED,
    LENGTHS,
    SMALL,
    VOCAB,
    Pairs,
    assert_gradients,
    dense,
    gradients,
    make_pairs,
    mode,
    run,
)

TINY_MIB = 8 * 320 * 4  # bytes: with budgets of one such "MiB" a chunk holds 8 rows of logits, a group of D 9


@pytest.fixture(autouse=True)
def tiny_budgets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many chunks and groups of a small vocabulary, whose sums fp32 products get right to the last bits."""
    for module in (schedule, plan):
        monkeypatch.setattr(module, "MIB", TINY_MIB)
    schedule.chunk_rows.cache_clear()
    yield
    schedule.chunk_rows.cache_clear()


PAIRWISE = [
    name
    for name, spec in LOSSES.items()
    if spec.inputs is PairLogps and spec.scope in ("pair", "token") and not spec.needs
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRWISE)
def test_equals_fp64_and_the_cache(name: str, dtype: torch.dtype) -> None:
    """What is reported is that of `cache` to the last bit, gradients are right by the tolerance rule."""
    pairs = make_pairs(dtype)
    want, _ = dense(pairs, torch.float64, loss_type=name)
    cache, _ = gradients(pairs, mode("cache"), loss_type=name)
    out, got = gradients(pairs, mode("pairs"), loss_type=name)
    assert torch.equal(out.loss, cache.loss)
    for field in ("chosen_logps", "rejected_logps", "chosen_rewards"):
        assert torch.equal(getattr(out, field), getattr(cache, field))
    for key, value in out.metrics.items():
        assert torch.equal(value, cache.metrics[key]), key
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    assert_gradients(pairs, got, loss_type=name)


@pytest.mark.parametrize(
    "head",
    [{"has_bias": True}, {"softcap": 20.0, "logit_scale": 0.5}, {"has_bias": True, "softcap": 30.0}],
    ids=str,
)
def test_heads(head: dict[str, Any]) -> None:
    pairs = make_pairs(**head)
    assert_gradients(pairs, gradients(pairs, mode("pairs"))[1])


def test_auto_takes_it_for_a_trained_head_only() -> None:
    """Told by the passes: 3 instead of cache's 3 and its share of recomputed rows."""
    pairs = make_pairs(lengths=((2, 3), (4, 1), (3, 3), (2, 5)))
    hidden, head = pairs.leaves()

    def step(execution: Execution) -> None:
        run(pairs, hidden, head, execution, ref_logps=torch.zeros(8)).loss.backward()

    sizes = (pairs.num_tokens, HIDDEN, VOCAB)
    assert count_passes(lambda: step(SMALL), *sizes) == 3
    assert count_passes(lambda: step(mode("cache")), *sizes) > 3.5
    head.weight.requires_grad_(False)
    assert count_passes(lambda: step(SMALL), *sizes) == 2


def test_passes_with_pairs_longer_than_a_group_are_as_planned() -> None:
    pairs = make_pairs()
    hidden, head = pairs.leaves()
    zeros = torch.zeros(2 * len(LENGTHS))

    def step() -> None:
        run(pairs, hidden, head, SMALL, ref_logps=zeros).loss.backward()

    lengths = [chosen + rejected for chosen, rejected in LENGTHS]
    planned = explain_plan(
        pairs.num_tokens, HIDDEN, VOCAB, weight_requires_grad=True, pair_lengths=lengths,
        operand_bytes=4, workspace_mib=1, cache_mib=1,
    )  # fmt: skip
    too_long = sum(length for length in lengths if length > 9)
    assert planned.mode == "pairs" and planned.gemm_passes == 3 + too_long / pairs.num_tokens
    assert planned.group_rows <= 9
    assert count_passes(step, pairs.num_tokens, HIDDEN, VOCAB) == pytest.approx(
        planned.gemm_passes, abs=1e-12
    )


def test_reference_in_the_same_call_costs_one_pass_more() -> None:
    pairs = make_pairs(lengths=((2, 3), (4, 1)))
    hidden, head = pairs.leaves()
    sizes = (pairs.num_tokens, HIDDEN, VOCAB)
    assert count_passes(lambda: run(pairs, hidden, head, SMALL).loss.backward(), *sizes) == 4


@pytest.mark.parametrize("name", ["score", "stash", "cache", "pairs", "recompute", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_policy_equal_to_reference_in_every_mode(name: str, dtype: torch.dtype) -> None:
    """Rewards exactly 0 and a loss of exactly ln 2, whether the reference shares the head or has a copy."""
    pairs = make_pairs(dtype)
    hidden, head = pairs.leaves()
    if name == "stash":
        head.weight.requires_grad_(False)
    for ref_head in (None, head.weight.detach().clone()):
        with torch.set_grad_enabled(name != "score"):
            out = run(pairs, hidden, head, mode(name), ref_hidden=pairs.hidden, ref_lm_head=ref_head)
        assert not out.chosen_rewards.any() and not out.rejected_rewards.any()
        assert out.loss.item() == torch.tensor(2.0).log().item()


def test_the_same_call_gives_the_same_bits() -> None:
    pairs = make_pairs()
    (first, first_grads), (again, again_grads) = (gradients(pairs, mode("pairs")) for _ in range(2))
    assert torch.equal(first.loss, again.loss)
    assert all(map(torch.equal, first_grads, again_grads))


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
def test_incoming_gradient_scales(factor: float) -> None:
    pairs = make_pairs()
    _, want = gradients(pairs, mode("pairs"))
    hidden, head = pairs.leaves()
    (run(pairs, hidden, head, mode("pairs")).loss * factor).backward()
    torch.testing.assert_close(hidden.grad, want[0] * factor)
    torch.testing.assert_close(head.weight.grad, want[1] * factor)


def test_backward_twice() -> None:
    """What was handed out stays as it was, and the second pass gives the same by recomputation."""
    pairs = make_pairs()
    hidden, head = pairs.leaves()
    loss = run(pairs, hidden, head, mode("pairs")).loss
    leaves = (hidden, head.weight)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [grad.clone() for grad in first]
    third = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    assert all(map(torch.equal, first, copies))
    assert all(map(torch.equal, third, again))
    assert_gradients(pairs, list(third), factor=3)


def test_second_derivative_raises() -> None:
    pairs = make_pairs(lengths=((2, 3),))
    hidden, head = pairs.leaves()
    loss = run(pairs, hidden, head, mode("pairs")).loss
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    _, want = gradients(pairs, mode("cache"))
    torch.testing.assert_close(grad, want[0])
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(grad.square().sum(), hidden)


def test_gradients_are_given_up_with_the_graph() -> None:
    """Neither a reference cycle nor the op keeps dweight after the backward pass."""
    pairs = make_pairs(lengths=((2, 3),))
    gc.disable()
    try:
        for has_backward in (False, True):
            hidden, head = pairs.leaves()
            loss = run(pairs, hidden, head, mode("pairs")).loss
            node = loss.grad_fn
            assert node is not None
            kept = weakref.ref(node.grads[1].untyped_storage())  # type: ignore[attr-defined]
            address = node.grads[1].data_ptr()  # type: ignore[attr-defined]
            if has_backward:
                loss.backward()
                assert node.grads is None  # type: ignore[attr-defined]
                assert head.weight.grad is not None
                assert head.weight.grad.data_ptr() == address  # handed out, not copied
            del loss, node, hidden, head
            assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
def test_only_what_needs_a_gradient(leaf: str) -> None:
    pairs = make_pairs(has_bias=True)
    _, want = gradients(pairs, mode("pairs"))
    hidden, head = pairs.leaves()
    leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    for name, tensor in leaves.items():
        assert tensor is not None
        tensor.requires_grad_(name == leaf)
    run(pairs, hidden, head, mode("pairs")).loss.backward()
    for (name, tensor), value in zip(leaves.items(), want, strict=True):
        assert tensor is not None
        assert tensor.grad is None if name != leaf else torch.equal(tensor.grad, value)


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


def test_opcheck() -> None:
    from fastdpo import functional

    recorded: list[tuple[Any, ...]] = []

    def record(*args: Any) -> Any:
        recorded.append(args)
        return paired_loss_op(*args)

    pairs = make_pairs(lengths=((2, 3), (1, 4)), vocab=101)
    hidden, head = pairs.leaves()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.ops.paired_loss.paired_loss_op", record)
        run(pairs, hidden, head, mode("pairs"))
    assert functional and recorded
    torch.library.opcheck(paired_loss_op, recorded[0])


def test_torch_compile_sees_one_graph() -> None:
    pairs = make_pairs(lengths=((2, 3), (1, 4)), vocab=101)
    want_out, want = gradients(pairs, mode("pairs"))
    hidden, head = pairs.leaves()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return run(pairs, hidden, LMHead(weight), mode("pairs")).loss

    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        got = compiled(hidden, head.weight)
        torch.testing.assert_close(got, want_out.loss)
        for ours, theirs in zip(torch.autograd.grad(got, (hidden, head.weight)), want, strict=True):
            torch.testing.assert_close(ours, theirs)
