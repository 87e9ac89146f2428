"""The function behind TRL's trainers beside its replacement: the same arguments, results and gradients."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

pytest.importorskip("trl")

from fastdpo import Execution
from fastdpo.integrations.trl_logprob import APPLY_SIGNATURE, STATISTICS, FusedLogProb
from fastdpo.testing import assert_close_to_fp64, assert_logps_close
from tests.ops.test_gemm_passes import count_passes
from tests.ops.test_memory import largest_allocation

NUM_TOKENS, HIDDEN, VOCAB = 37, 16, 199
NAMES = ("log_probs", *STATISTICS)


def trl_function() -> Any:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction


class Inputs:
    """Hidden states, a head and targets, with logits of a standard deviation of about 3."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, has_bias: bool = True, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=g).to(dtype)
        self.weight = (torch.randn(VOCAB, HIDDEN, generator=g) * 3 / HIDDEN**0.5).to(dtype)
        self.bias = torch.randn(VOCAB, generator=g).to(dtype) if has_bias else None
        self.targets = torch.randint(VOCAB, (NUM_TOKENS,), generator=g)
        # One for each of log_probs and entropy: what flows back.
        self.upstream = torch.randn(2, NUM_TOKENS, generator=g)

    def leaves(
        self, dtype: torch.dtype | None = None, needs: tuple[bool, bool, bool] = (True, True, True)
    ) -> list[Tensor | None]:
        tensors = (self.hidden, self.weight, self.bias)
        return [
            None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_(need)
            for t, need in zip(tensors, needs, strict=True)
        ]


def run(
    function: Any,
    inputs: Inputs,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    outputs: tuple[str, ...] = NAMES,
    of_logps: bool = True,
    of_entropy: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
    """Results, and gradients of a weighted sum of log-probabilities, entropies, or both."""
    leaves = inputs.leaves(needs=needs)
    found = function.apply(*leaves, inputs.targets, temperature, 64, softcap, scale, outputs)
    total = torch.zeros(())
    if of_logps:
        total = total + (found[0] * inputs.upstream[0]).sum()
    if of_entropy:
        total = total + (found[1] * inputs.upstream[1]).sum()
    total.backward()
    return found, [None if leaf is None else leaf.grad for leaf in leaves]


def truth(
    inputs: Inputs, temperature: float, softcap: float | None, scale: float, of_logps: bool, of_entropy: bool
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """The definition in fp64, on the inputs as rounded to their dtype."""
    hidden, weight, bias = leaves = inputs.leaves(torch.float64)
    z = hidden @ weight.T
    z = scale * (z if bias is None else z + bias)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_p = z.log_softmax(-1)
    logps = log_p.gather(1, inputs.targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    found = {
        "log_probs": logps,
        "entropy": entropy,
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == inputs.targets,
    }
    upstream = inputs.upstream.double()
    total = (upstream[0] * logps).sum() * of_logps + (upstream[1] * entropy).sum() * of_entropy
    total.backward()
    return found, [None if leaf is None else leaf.grad for leaf in leaves]


def assert_grads(ours: list[Any], expected: list[Any], theirs: list[Any]) -> None:
    for name, mine, want, eager in zip(("hidden", "weight", "bias"), ours, expected, theirs, strict=True):
        assert (mine is None) == (eager is None), name
        if mine is not None:
            assert mine.dtype == eager.dtype
            assert_close_to_fp64(mine, want, eager, name=name)


@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "has_bias"),
    [
        *product((1.0, 0.7), (None, 5.0), (1.0, 0.25), (True, False)),
        (1.0, 30.0, 4.0, True),
    ],
)
def test_results_and_gradients(
    temperature: float, softcap: float | None, scale: float, has_bias: bool
) -> None:
    inputs = Inputs(has_bias=has_bias)
    options = {"temperature": temperature, "softcap": softcap, "scale": scale}
    ours, our_grads = run(FusedLogProb(), inputs, **options)
    theirs, their_grads = run(trl_function(), inputs, **options)
    expected, expected_grads = truth(inputs, temperature, softcap, scale, True, False)
    for name, mine, other in zip(NAMES, ours, theirs, strict=True):
        assert mine is not None and other is not None
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
        assert mine.requires_grad == other.requires_grad, name
        if name == "is_top1":
            assert torch.equal(mine, expected[name])
        else:
            assert_logps_close(mine.detach(), expected[name].detach(), torch.float32, name=name)
    assert_grads(our_grads, expected_grads, their_grads)


@pytest.mark.parametrize("of_logps", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_entropy_gradients(of_logps: bool, softcap: float | None, has_bias: bool) -> None:
    """GRPO's bonus: alone in the first call that asks for its gradient, then together with the other."""
    inputs = Inputs(has_bias=has_bias)
    options: dict[str, Any] = {"temperature": 0.8, "softcap": softcap, "outputs": ("log_probs", "entropy")}
    options |= {"of_logps": of_logps, "of_entropy": True}
    expected, expected_grads = truth(inputs, 0.8, softcap, 1.0, of_logps, True)
    _, their_grads = run(trl_function(), inputs, **options)
    function = FusedLogProb()
    for _ in range(2):
        found, grads = run(function, inputs, **options)
        assert found[2:] == (None, None, None)
        assert_logps_close(found[1].detach(), expected["entropy"].detach(), torch.float32)
        assert_grads(grads, expected_grads, their_grads)


@pytest.mark.parametrize("needs", [n for n in product((True, False), repeat=3) if any(n)])
def test_entropy_gradients_go_where_they_are_needed(needs: tuple[bool, bool, bool]) -> None:
    inputs = Inputs()
    _, expected = truth(inputs, 1.0, None, 1.0, True, True)
    _, theirs = run(trl_function(), inputs, of_entropy=True, needs=needs)
    function = FusedLogProb()
    for _ in range(2):
        _, grads = run(function, inputs, of_entropy=True, needs=needs)
        assert [grad is not None for grad in grads] == list(needs)
        assert_grads(grads, expected, theirs)


def test_an_entropy_that_nobody_differentiates_costs_nothing() -> None:
    """GEMM passes, ours and TRL's: 3 to 4 (head trained), 2 to 3 (frozen); 4 with GRPO's bonus, once 7."""

    def passes(function: Any, has_trained_head: bool, of_entropy: bool = False) -> float:
        inputs = Inputs(has_bias=False)
        needs = (True, has_trained_head, False)
        return count_passes(
            lambda: run(function, inputs, needs=needs, of_entropy=of_entropy), NUM_TOKENS, HIDDEN, VOCAB
        )

    ours = FusedLogProb()
    assert (passes(ours, True), passes(trl_function(), True)) == (3, 4)
    assert (passes(ours, False), passes(trl_function(), False)) == (2, 3)
    assert passes(ours, True, of_entropy=True) == 3 + 4
    assert passes(ours, True, of_entropy=True) == passes(trl_function(), True, of_entropy=True) == 4
    # Calls for other outputs, another trainer's, are not affected.
    inputs = Inputs(has_bias=False)
    others = ("log_probs", "entropy")
    assert count_passes(lambda: run(ours, inputs, outputs=others), NUM_TOKENS, HIDDEN, VOCAB) == 3


def test_a_mode_asked_for_is_kept() -> None:
    """With ``mode="cache"`` the entropy's gradient stays a pass of its own."""
    inputs = Inputs()
    function = FusedLogProb(Execution(mode="cache"))
    _, expected = truth(inputs, 1.0, None, 1.0, True, True)
    _, theirs = run(trl_function(), inputs, of_entropy=True)
    for _ in range(2):
        _, grads = run(function, inputs, of_entropy=True)
        assert_grads(grads, expected, theirs)


def test_a_second_derivative_raises() -> None:
    inputs = Inputs()
    leaves = inputs.leaves()
    found = FusedLogProb().apply(*leaves, inputs.targets, 1.0, 64)
    (grad,) = torch.autograd.grad(found[1].sum(), [leaves[0]], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("outputs", [("log_probs",), (), ("entropy", "is_top1"), ["mean_logits"]])
def test_only_what_is_asked_for(outputs: Any) -> None:
    found, _ = run(FusedLogProb(), Inputs(), outputs=outputs)
    assert found[0] is not None
    given = dict(zip(NAMES[1:], found[1:], strict=True))
    assert {name for name, value in given.items() if value is not None} == set(outputs) - {"log_probs"}


def test_without_gradients() -> None:
    inputs = Inputs()
    with torch.no_grad():
        found = FusedLogProb().apply(*inputs.leaves(), inputs.targets, 1.0, 64)
    assert not any(value.requires_grad for value in found)


def test_no_tokens_keep_the_graph() -> None:
    """A micro-batch without labels gives a differentiable zero; DDP waits for its gradients."""
    inputs = Inputs()
    leaves = inputs.leaves()
    found = FusedLogProb().apply(leaves[0][:0], *leaves[1:], inputs.targets[:0], 1.0, 64)
    assert all(value.shape == (0,) for value in found)
    (found[0].sum() + found[1].sum()).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_trls(weight_dtype: torch.dtype) -> None:
    """Autocast's dtype, else that of hidden whatever the weight's is (``cast_lm_head_to_fp32``)."""
    inputs = Inputs(has_bias=False)
    inputs.weight = inputs.weight.to(weight_dtype)
    expected, _ = truth(inputs, 1.0, None, 1.0, True, False)
    ours, grads = run(FusedLogProb(), inputs)
    _, their_grads = run(trl_function(), inputs)
    assert_logps_close(ours[0].detach(), expected["log_probs"].detach(), torch.float32)
    assert [g.dtype for g in grads[:2]] == [g.dtype for g in their_grads[:2]]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, grads = run(FusedLogProb(), inputs)
    inputs.hidden, inputs.weight = inputs.hidden.bfloat16(), inputs.weight.bfloat16()
    expected, _ = truth(inputs, 1.0, None, 1.0, True, False)
    assert_logps_close(ours[0].detach(), expected["log_probs"].detach(), torch.bfloat16)
    assert [g.dtype for g in grads[:2]] == [torch.float32, weight_dtype]


def test_fp64_gives_fp32_as_trl_does() -> None:
    inputs = Inputs(torch.float64)
    found, _ = run(FusedLogProb(), inputs)
    assert {value.dtype for value in found[:4]} == {torch.float32}


def test_the_logits_never_exist() -> None:
    g = torch.Generator().manual_seed(0)
    num_tokens, vocab = 2048, 2048
    hidden = torch.randn(num_tokens, 8, generator=g, requires_grad=True)
    weight = torch.randn(vocab, 8, generator=g, requires_grad=True)
    targets = torch.randint(vocab, (num_tokens,), generator=g)

    def step(execution: Execution) -> None:
        found = FusedLogProb(execution).apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, NAMES)
        (found[0].sum() + found[1].sum()).backward()

    assert largest_allocation(lambda: step(Execution(workspace_mib=1, cache_mib=0))) <= 2**20
    # With room for all of them they are one allocation: what is counted is what happens.
    assert largest_allocation(lambda: step(Execution(workspace_mib=64))) >= num_tokens * vocab * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": ("log_probs", "topk")}, r"outputs: got \['topk'\], wanted names from"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"scale": 0.0}, "logit_scale: got 0.0"),
        ({"scale": float("nan")}, "logit_scale: got nan"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(FusedLogProb(), Inputs(), **changes)


def test_heads_that_are_not_whole_matrices_are_refused() -> None:
    inputs = Inputs(has_bias=False)

    def apply(weight: Tensor) -> None:
        FusedLogProb().apply(inputs.hidden, weight, None, inputs.targets, 1.0, 64)

    with pytest.raises(ValueError, match="quantised"):
        apply(inputs.weight.to(torch.int8))
    put_away = inputs.weight.new_empty(0)
    with pytest.raises(ValueError, match=r"lm_head.weight: got shape \(0,\)"):
        apply(put_away)
    put_away.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"lm_head.weight: got shape \(0,\)"):
        apply(put_away)


def test_in_trl_they_are_left_to_its_own_function(caplog: pytest.LogCaptureFixture) -> None:
    inputs, own = Inputs(has_bias=False), trl_function()
    wrapped = TwoTensor(inputs.weight.detach(), inputs.weight.detach())
    arguments = (inputs.hidden, wrapped, None, inputs.targets, 0.9, 64, 5.0, 0.5, ("entropy",))
    ours = FusedLogProb(own=own)
    for _ in range(2):
        found, wanted = ours.apply(*arguments), own.apply(*arguments)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine is theirs or torch.equal(*(getattr(value, "a", value) for value in (mine, theirs)))
    assert caplog.text.count("runs its own code") == 1 and "TwoTensor" in caplog.text


def test_the_signature_is_that_of_the_installed_function() -> None:
    import inspect

    assert tuple(inspect.signature(trl_function().forward).parameters) == APPLY_SIGNATURE
    ours = inspect.signature(FusedLogProb.apply).parameters
    theirs = inspect.signature(trl_function().forward).parameters
    assert list(ours)[1:] == list(theirs)[1:]
    for name in list(theirs)[1:]:
        assert ours[name].default == theirs[name].default, name
