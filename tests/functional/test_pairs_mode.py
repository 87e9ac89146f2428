"""Mode ``pairs``: the results of the other modes in one pass, for every loss that is a sum over pairs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, LMHead, explain_plan
from fastdpo.losses import LOSSES, PairLogps
from fastdpo.ops.grouped_loss import grouped_loss_op
from tests.functional.pair_cases import (  # noqa: F401  (a fixture)
    HIDDEN,
    LENGTHS,
    SMALL,
    VOCAB,
    assert_gradients,
    dense,
    gradients,
    make_pairs,
    mode,
    run,
    tiny_budgets,
)
from tests.ops.test_gemm_passes import count_passes

pytestmark = pytest.mark.usefixtures("tiny_budgets")

PAIRWISE = [
    name for name, spec in LOSSES.items() if spec.inputs is PairLogps and spec.scope in ("pair", "token")
]
NEEDED = {  # of rewards, and of who gave which answer
    "reward_gap": torch.linspace(-1.0, 2.0, len(LENGTHS)),
    "chosen_is_reference": (torch.arange(len(LENGTHS)) % 2).float(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRWISE)
def test_equals_fp64_and_the_cache(name: str, dtype: torch.dtype) -> None:
    """What is reported is that of `cache` to the last bit, gradients are right by the tolerance rule."""
    pairs = make_pairs(dtype)
    said: dict[str, Any] = {"loss_type": name} | {need: NEEDED[need] for need in LOSSES[name].needs}
    want, _ = dense(pairs, torch.float64, **said)
    cache, _ = gradients(pairs, mode("cache"), **said)
    out, got = gradients(pairs, mode("pairs"), **said)
    assert torch.equal(out.loss, cache.loss)
    for field in ("chosen_logps", "rejected_logps", "chosen_rewards"):
        assert torch.equal(getattr(out, field), getattr(cache, field))
    for key, value in out.metrics.items():
        assert torch.equal(value, cache.metrics[key]), key
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    assert_gradients(pairs, got, **said)


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


@pytest.mark.promise(10)
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


@pytest.mark.promise(28)
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


@pytest.mark.promise(35)
def test_opcheck() -> None:
    from fastdpo.functional import path as functional

    recorded: list[tuple[Any, ...]] = []

    def record(*args: Any) -> Any:
        recorded.append(args)
        return grouped_loss_op(*args)

    pairs = make_pairs(lengths=((2, 3), (1, 4)), vocab=101)
    hidden, head = pairs.leaves()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.ops.grouped_loss.grouped_loss_op", record)
        run(pairs, hidden, head, mode("pairs"))
    assert functional and recorded
    torch.library.opcheck(grouped_loss_op, recorded[0])


@pytest.mark.promise(36)
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
