"""The op as torch.library knows it: opcheck, torch.compile without a graph break, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_inductor_cache

from fastdpo import Execution, LMHead, linear_logprob
from fastdpo.ops.library import INDEX_KINDS, PER_TOKEN
from fastdpo.testing import assert_close_to_fp64, eager_results, fp64_results, make_case
from fastdpo.types import TOKEN_STATISTICS
from tests.ops.common import leaves, run_op


def op_args(
    dtype: torch.dtype,
    mode: str,
    *,
    hidden: bool,
    weight: bool,
    kind: str = "found",
    has_reference: bool = False,
    topk: int = 0,
) -> tuple[Any, ...]:
    case = make_case(batch=2, length=12, hidden_size=8, vocab=20, dtype=dtype)
    h, w, b = leaves(case, hidden=hidden, weight=weight)
    labels = case.labels.flatten()
    index = None if kind == "found" else (labels != -100).nonzero().squeeze(1)
    if index is not None and kind in PER_TOKEN:
        labels = labels[index]
    reference = torch.randn_like(case.hidden.flatten(0, 1)) if has_reference else None
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        h.detach().flatten(0, 1).requires_grad_(hidden), w, b, labels, index, kind, reference, None,
        -100, ",".join(TOKEN_STATISTICS), topk, False, False,
        0.7, 5.0, 1.3, mode, "auto", dtype, logits, 1, 64,
    )  # fmt: skip


DTYPES = (torch.float64, torch.float32, torch.bfloat16)
NEEDS = ((False, False, "score"), (True, False, "stash"), (False, True, "cache"), (True, True, "cache"))


# Every pair of a dtype, a mode and a kind: fake kernels know each by itself, and at most two together.
@pytest.mark.promise(35)
@pytest.mark.parametrize(
    ("dtype", "needs", "kind"),
    [
        (DTYPES[(i + j) % 3], needs, kind)
        for i, needs in enumerate(NEEDS)
        for j, kind in enumerate(INDEX_KINDS)
    ],
    ids=str,
)
def test_opcheck(dtype: torch.dtype, needs: tuple[bool, bool, str], kind: str) -> None:
    hidden, weight, mode = needs
    has_reference = kind in PER_TOKEN
    topk = 3 if kind in ("found", "repeated") else 0
    args = op_args(
        dtype, mode, hidden=hidden, weight=weight, kind=kind, has_reference=has_reference, topk=topk
    )
    torch.library.opcheck(torch.ops.fastdpo.linear_logprob.default, args)


@pytest.mark.parametrize("kind", ["found", "given"])
@pytest.mark.parametrize("has_out", [False, True])
def test_opcheck_of_the_backward_op(kind: str, has_out: bool) -> None:
    h, w, b, labels, *_ = op_args(torch.float32, "recompute", hidden=False, weight=False)
    index = (labels != -100).nonzero().squeeze(1)
    grads = [torch.randn(len(labels)) for _ in range(3)]
    logps, lse = torch.randn(2, len(labels))
    out = torch.zeros_like(w) if has_out else None
    args = (
        *grads, h, w.detach(), b.detach(), labels, index, kind, logps, lse, torch.empty(0), out,
        True, True, True, 0.7, 5.0, 1.3, "recompute", "auto", torch.float32, torch.float32, 1, 64,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastdpo.linear_logprob_backward.default, args)


@pytest.fixture
def fresh_compile_cache() -> Iterator[None]:
    """torch caches compiled graphs by the names of ops: it would go on with the strides of an older fake."""
    with fresh_inductor_cache():
        yield


# Inductor alone checks the strides that fake kernels promise, and compiles for ten seconds.
@pytest.mark.promise(36)
@pytest.mark.usefixtures("fresh_compile_cache")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["stash", "cache"])
def test_compile_without_a_graph_break(mode: str, backend: str) -> None:
    """Whole graph, shapes and numbers of labelled tokens that change, the same bits as eager."""
    torch._dynamo.reset()

    def loss(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        head = LMHead(w, softcap=20.0, temperature=1.2)
        out = linear_logprob(h * 1.0, head, labels, outputs=("lse",), execution=Execution(workspace_mib=1))
        assert out.lse is not None
        return (out.logps * upstream).sum() + out.lse.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for seed, length in ((0, 20), (1, 33)):
        case = make_case(
            batch=3, length=length, hidden_size=16, vocab=50, dtype=torch.float32, has_bias=False, seed=seed
        )
        results = []
        for function in (loss, compiled):
            h, w, _ = leaves(case, weight=mode == "cache")
            value = function(h, w, case.labels, case.upstream)
            value.backward()
            results.append([t for t in (value.detach(), h.grad, w.grad) if t is not None])
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(
                ours, eager, rtol=1e-6, atol=1e-6
            )  # Inductor may reorder the outer sums


@pytest.mark.promise(17)
def test_compile_does_not_recompile_for_every_length() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda h, w, y: linear_logprob(h, w, y).logps.sum(), backend=counter, fullgraph=True
    )
    weight = torch.randn(30, 8)
    for length in range(5, 25):
        compiled(torch.randn(length, 8), weight, torch.randint(30, (length,)))
    assert counter.frame_count <= 2  # the first, and one with dynamic shapes


@pytest.mark.promise(33)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_an_fp32_gradient_for_an_fp32_weight(hidden_dtype: torch.dtype) -> None:
    case = make_case(dtype=torch.bfloat16, has_bias=False)
    h = case.hidden.to(hidden_dtype).requires_grad_()
    w = case.weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(h, w, case.labels)
    dhidden, dweight = torch.autograd.grad(out.logps, (h, w), case.upstream)
    assert out.logps.dtype == torch.float32
    assert dhidden.dtype == hidden_dtype and dweight.dtype == torch.float32
    # The inputs are bf16 values, so casting them loses nothing and the truth is that of bf16 inputs.
    truth, eager = fp64_results(case), eager_results(case)
    assert_close_to_fp64(dweight.bfloat16(), truth.dweight, eager.dweight, name="dweight")
    assert_close_to_fp64(
        dhidden.bfloat16().flatten(0, 1), truth.dhidden.flatten(0, 1), eager.dhidden.flatten(0, 1)
    )


@pytest.mark.promise(33)
def test_autocast_rounds_the_inputs_as_linear_does() -> None:
    case = make_case(dtype=torch.float32, has_bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_logprob(case.hidden, case.weight, case.labels).logps
    rounded = linear_logprob(case.hidden.bfloat16(), case.weight.bfloat16(), case.labels).logps
    assert torch.equal(cast, rounded)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        plain = linear_logprob(case.hidden, case.weight, case.labels).logps
    assert not torch.equal(plain, cast)


def test_autocast_does_not_reach_into_the_backward_pass() -> None:
    case = make_case(dtype=torch.float32, has_bias=False)
    h, w, _ = leaves(case)
    out = run_op(case, h, w, None)
    plain = torch.autograd.grad(out.logps, (h, w), case.upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out.logps, (h, w), case.upstream)
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


@pytest.mark.parametrize("compute", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_compute_dtype_mixes_dtypes(compute: torch.dtype) -> None:
    case = make_case(dtype=torch.bfloat16, has_bias=False)
    h, w = case.hidden.requires_grad_(), case.weight.float().requires_grad_()
    out = linear_logprob(h, w, case.labels, execution=Execution(compute_dtype=compute))
    dhidden, dweight = torch.autograd.grad(out.logps, (h, w), case.upstream.to(out.logps.dtype))
    assert dhidden.dtype == torch.bfloat16 and dweight.dtype == torch.float32
    same = linear_logprob(h.to(compute), w.to(compute), case.labels)
    assert torch.equal(out.logps, same.logps)


def test_registered_names() -> None:
    for name, kind in itertools.product(("linear_logprob", "linear_logprob_backward"), ("default",)):
        assert getattr(getattr(torch.ops.fastdpo, name), kind)
