"""What autograd may expect of the op: repeatable, honest about what it cannot do, harmless to its inputs."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastdpo import Execution, LMHead, linear_logprob
from fastdpo.testing import make_case
from tests.ops.common import leaves, run_op

MODES = ["stash", "cache", "cache_partly", "recompute"]


def execution(mode: str, backend: str = "auto") -> Execution:
    cache = 1 if mode == "cache_partly" else 64
    return Execution(mode=mode.removesuffix("_partly"), workspace_mib=1, cache_mib=cache, backend=backend)


@pytest.mark.promise(8)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.5, "temperature": 1.5}])
def test_gradcheck(mode: str, options: dict[str, float]) -> None:
    case = make_case(batch=2, length=5, hidden_size=4, vocab=7, dtype=torch.float64, **options)  # type: ignore[arg-type]
    h, w, b = leaves(case, weight=mode != "stash")

    def op(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, *head = inputs
        weight, bias = head or (w, b)
        out = run_op(case, hidden, weight, bias, execution(mode), outputs=("lse",))
        return out.logps, out.lse  # type: ignore[return-value]

    inputs = (h,) if mode == "stash" else (h, w, b)
    assert torch.autograd.gradcheck(op, inputs)


def test_gradcheck_of_entropy() -> None:
    case = make_case(batch=2, length=5, hidden_size=4, vocab=7, dtype=torch.float64, softcap=3.0)
    h, w, b = leaves(case)

    def op(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = run_op(case, *inputs, outputs=("lse", "entropy"), entropy_requires_grad=True)  # type: ignore[arg-type]
        return out.logps, out.lse, out.entropy  # type: ignore[return-value]

    assert torch.autograd.gradcheck(op, (h, w, b))


@pytest.mark.promise(28)
@pytest.mark.parametrize("mode", MODES)
def test_second_backward_pass_finds_what_the_first_did(mode: str) -> None:
    case = make_case(dtype=torch.float32, has_bias=mode != "stash")
    h, w, b = leaves(case, weight=mode != "stash")
    wanted = [leaf for leaf in (h, w, b) if leaf is not None and leaf.requires_grad]
    out = run_op(case, h, w, b, execution(mode))
    first = torch.autograd.grad(out.logps, wanted, case.upstream, retain_graph=True)
    doubled = torch.autograd.grad(out.logps, wanted, 2 * case.upstream, retain_graph=True)
    again = torch.autograd.grad(out.logps, wanted, case.upstream)
    for one, two, three in zip(first, doubled, again, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(2 * one, two)  # a factor of two rounds nothing


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_the_same_bits_in_every_mode(mode: str) -> None:
    case = make_case(dtype=torch.bfloat16)
    h, w, b = leaves(case, weight=mode != "stash")
    with torch.no_grad():
        scored = run_op(case, h, w, b, Execution(workspace_mib=1)).logps
    out = run_op(case, h, w, b, execution(mode))
    assert torch.equal(out.logps, scored)
    assert (out.logps - scored == 0).all()


@pytest.mark.promise(39)
def test_the_same_call_gives_the_same_bits() -> None:
    case = make_case(dtype=torch.float32)
    runs = []
    for _ in range(3):
        h, w, b = leaves(case)
        out = run_op(case, h, w, b, execution("cache_partly"), outputs=("lse",))
        assert out.lse is not None and b is not None
        runs.append(torch.autograd.grad((out.logps + out.lse), (h, w, b), case.upstream))
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


@pytest.mark.promise(30)
def test_second_derivative_raises() -> None:
    case = make_case(dtype=torch.float32)
    h, w, b = leaves(case)
    (grad,) = torch.autograd.grad(run_op(case, h, w, b).logps.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        grad.sum().backward()


@pytest.mark.promise(30)
def test_torch_func_raises() -> None:
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda h: linear_logprob(h, weight, labels).logps.sum())(hidden)


@pytest.mark.promise(31)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["cache", "stash"])
def test_activation_checkpointing_is_bit_equal(mode: str, use_reentrant: bool) -> None:
    case = make_case(dtype=torch.float32)
    h, w, b = leaves(case, weight=mode == "cache")

    def logps(hidden: torch.Tensor) -> torch.Tensor:
        return run_op(case, torch.tanh(hidden), w, b, Execution(workspace_mib=1)).logps

    wanted = [leaf for leaf in (h, w, b) if leaf is not None and leaf.requires_grad]
    results = []
    for run in (logps, lambda x: checkpoint(logps, x, use_reentrant=use_reentrant)):
        for leaf in wanted:
            leaf.grad = None
        out = run(h)
        (out * case.upstream).sum().backward()
        results.append((out.detach(), *(leaf.grad for leaf in wanted)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.promise(34)
def test_the_callers_tensors_are_left_alone() -> None:
    case = make_case(dtype=torch.float32)
    h, w, b = leaves(case)
    assert b is not None
    everything = [h, w, b, case.labels, case.upstream]
    before = [(t._version, t.detach().clone()) for t in everything]
    run_op(case, h, w, b).logps.backward(case.upstream)
    for tensor, (version, value) in zip(everything, before, strict=True):
        assert tensor._version == version and torch.equal(tensor.detach(), value)


def test_gradients_accumulate_in_grad() -> None:
    case = make_case(dtype=torch.float32)
    h, w, b = leaves(case)
    run_op(case, h, w, b).logps.backward(case.upstream)
    assert w.grad is not None
    once = w.grad.clone()
    run_op(case, h, w, b).logps.backward(case.upstream)
    assert torch.equal(w.grad, 2 * once)


@pytest.mark.promise(32)
def test_one_head_used_twice_sums_both_gradients() -> None:
    """A tied or shared weight: the paths add up."""
    case = make_case(dtype=torch.float64, has_bias=False)
    h, w, _ = leaves(case)
    first = run_op(case, h, w, None).logps
    second = run_op(case, h.flip(0), w, None).logps
    (both,) = torch.autograd.grad((first + second), w, case.upstream, retain_graph=True)
    (one,) = torch.autograd.grad(first, w, case.upstream)
    (two,) = torch.autograd.grad(second, w, case.upstream)
    assert torch.allclose(both, one + two, rtol=1e-12, atol=1e-12)


@pytest.mark.promise(29)
@pytest.mark.parametrize("needs", ["hidden", "weight", "bias", "none"])
def test_only_what_is_needed_is_returned(needs: str) -> None:
    case = make_case(dtype=torch.float32)
    h, w, b = leaves(case, hidden=False, weight=False)
    assert b is not None
    named = {"hidden": h, "weight": w, "bias": b}
    if needs == "none":
        out = run_op(case, h, w, b)
        assert not out.logps.requires_grad
        return
    named[needs].requires_grad_()
    run_op(case, h, w, b).logps.backward(case.upstream)
    assert {name for name, leaf in named.items() if leaf.grad is not None} == {needs}


def test_statistics_are_not_differentiable_unless_asked() -> None:
    case = make_case(dtype=torch.float32)
    names = ("lse", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
    out = run_op(case, *leaves(case), outputs=names)
    assert {name for name in names if getattr(out, name).requires_grad} == {"lse"}


@pytest.mark.promise(29)
def test_inference_mode_and_no_grad() -> None:
    case = make_case(dtype=torch.float32)
    h, w, b = leaves(case)
    expected = run_op(case, h, w, b).logps.detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = run_op(case, h, w, b)
        assert not out.logps.requires_grad and torch.equal(out.logps, expected)


@pytest.mark.promise(40)
def test_nothing_is_kept_alive_after_the_graph_is_gone() -> None:
    gc.disable()
    try:
        case = make_case(dtype=torch.float32)
        h, w, b = leaves(case)
        out = run_op(case, h, w, b)
        node = weakref.ref(out.logps)
        storages = weakref.ref(w)
        out.logps.sum().backward()
        del out, h, w, b
        assert node() is None and storages() is None  # by reference counts alone: no cycle
    finally:
        gc.enable()


def test_head_objects_are_interchangeable() -> None:
    case = make_case(dtype=torch.float32, has_bias=False)
    layer = torch.nn.Linear(*reversed(case.weight.shape))
    layer.weight.data.copy_(case.weight)
    layer.bias.data.zero_()
    plain = linear_logprob(case.hidden, case.weight, case.labels).logps
    for head in (LMHead(case.weight), layer, copy.deepcopy(layer)):
        assert torch.equal(linear_logprob(case.hidden, head, case.labels).logps, plain)
