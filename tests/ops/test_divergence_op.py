"""What ``token_divergence`` costs, and how it is as an op: products, memory, opcheck, compile, autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache

import fastdpo.ops.divergence_chunks as divergence_chunks
from fastdpo import Execution, token_divergence
from fastdpo.kernels.contract import LogitTransform
from fastdpo.kernels.divergence import divergence_rows
from fastdpo.ops.backends import resolve_divergence_backend
from tests.ops.divergence_cases import (
    DIFFERENTIABLE,
    DIVERGENCES,
    MIX,
    make_divergence_case,
    run_divergence,
    small,
    weighted,
)
from tests.ops.test_gemm_passes import count_passes
from tests.ops.test_memory import largest_allocation

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize(
    ("needs", "mode", "cache_mib", "passes"),
    [
        ("nothing", "auto", 64, (2, 0)),
        ("hidden", "auto", 64, (3, 0)),
        ("hidden", "recompute", 64, (2, 3)),
        ("both", "auto", 64, (2, 2)),
        ("weight", "auto", 64, (2, 1)),
        ("both", "auto", 0, (2, 4)),
        ("both", "recompute", 64, (2, 4)),
    ],
)
@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("logps", [(), ("logps", "ref_logps")], ids=["alone", "logps"])
def test_gemm_passes(
    needs: str, mode: str, cache_mib: int, passes: tuple[int, int], num_teachers: int, logps: tuple[str, ...]
) -> None:
    """As documented; a second teacher adds one where logits are made: none to a backward pass from D kept.

    Log-probabilities beside the divergence add one where D W is kept, and none else.
    """
    outputs = ("forward_kl", *logps)
    if logps and (needs, mode) == ("hidden", "auto"):
        passes = (4, 0)
    case = make_divergence_case("plain", num_teachers=num_teachers)
    # One hidden size for all, so that each product counts as one.
    teachers = tuple(
        replace(
            teacher, hidden=torch.randn_like(case.policy.hidden), weight=torch.randn_like(case.policy.weight)
        )
        for teacher in case.teachers
    )
    case = replace(case, teachers=teachers)
    h = case.policy.hidden.clone().requires_grad_(needs in ("hidden", "both"))
    w = case.policy.weight.clone().requires_grad_(needs in ("weight", "both"))
    execution = Execution(mode=mode, cache_mib=cache_mib, workspace_mib=1)
    sizes = (int(case.scored.sum()), *reversed(case.policy.weight.shape))
    made = []

    def forward() -> None:
        made.append(run_divergence(case, h, w, None, outputs, execution))

    extra = num_teachers - 1
    assert count_passes(forward, *sizes) == passes[0] + extra
    if needs == "nothing":
        return
    loss = weighted(case, made[0], outputs)
    recomputes = passes[1] > 2
    assert count_passes(loss.backward, *sizes) == passes[1] + (extra if recomputes else 0)


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("outputs", [("forward_kl",), DIVERGENCES, ("forward_kl", "logps")], ids=str)
@pytest.mark.parametrize("num_tokens", [64, 256])
def test_memory_stays_in_the_workspace(num_tokens: int, outputs: tuple[str, ...], num_teachers: int) -> None:
    """Whatever N is: each head's logits take an equal share of the 1 MiB, and plain torch's tiles another."""
    vocab = 4096
    hidden, weight = torch.randn(num_tokens, 8, requires_grad=True), torch.randn(vocab, 8)
    second: dict[str, Any] = {}
    if num_teachers == 2:
        second = {"second_hidden": torch.randn(num_tokens, 8), "combination": MIX}

    def step() -> None:
        out = token_divergence(
            hidden, weight, torch.randn(num_tokens, 8), torch.zeros(num_tokens).long(), outputs=outputs,
            execution=small(), **second,
        )  # fmt: skip
        sum(getattr(out, name).sum() for name in outputs).backward()

    backend = resolve_divergence_backend("auto", torch.device("cpu"), FP32)
    assert largest_allocation(step) <= 2**20 / divergence_chunks.workspace_units(num_teachers, backend)
    # All that one tile makes, of the 1 / 6 of a chunk's rows that it has, is within a chunk's share.
    tile = [torch.randn(12, vocab) for _ in range(2)]
    results = divergence_chunks.DivergenceOutputs(*(torch.empty(12) for _ in range(3)))
    d_out = torch.empty(12, vocab)
    transform = LogitTransform(softcap=30.0)
    labels = torch.zeros(12, dtype=torch.int64)
    peak = peak_of(lambda: divergence_rows(tile[0], tile[1], labels, transform, results, d_out=d_out))
    of_rows = 20 * 12 * 4  # numbers per row
    assert peak <= divergence_chunks.TEMPORARIES * 12 * vocab * 4 + of_rows


def peak_of(run: Callable[[], object]) -> int:
    """Bytes alive at once at most, beyond those before ``run()``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    records = [
        event
        for event in profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    alive = peak = 0
    for event in sorted(records, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert peak > 0
    return peak


def test_large_loss_scales() -> None:
    """The largest coefficient of a row stays out of D."""
    case = make_divergence_case("plain", FP16)
    grads = []
    for scale in (1.0, 2.0**10):
        h = case.policy.hidden.clone().requires_grad_()
        out = run_divergence(case, h, case.policy.weight, None, DIVERGENCES)
        (grad,) = torch.autograd.grad(weighted(case, out, DIVERGENCES) * scale / 2**10, h)
        grads.append(grad.double() / scale)
    torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-5)


ASKED = (
    ("stash", "jsd", True),
    ("cache", "forward_kl", True),
    ("recompute", "reverse_kl,forward_kl", True),
    ("stash", "forward_kl,logps,ref_logps", True),
    ("cache", "forward_kl,logps", True),
    ("stash", "reverse_kl,logps", False),
    ("cache", "reverse_kl,logps,ref_logps", False),
)


# Each kind with one teacher and with two, with and without a gradient of logps, and with the modes; the
# backward op, always of mode recompute, has its pairs of these as well.
@pytest.mark.parametrize(
    ("kind", "asked", "num_teachers"),
    [
        (("found", "given", "repeated")[(i + num_teachers) % 3], asked, num_teachers)
        for i, asked in enumerate(ASKED)
        for num_teachers in (1, 2)
    ],
    ids=str,
)
def test_opcheck(kind: str, asked: tuple[str, str, bool], num_teachers: int) -> None:
    mode, outputs, logps_grad = asked
    h = torch.randn(12, 8, requires_grad=True)
    w, b = (t.requires_grad_(mode != "stash") for t in (torch.randn(20, 8), torch.randn(20)))
    labels = torch.randint(20, (12,)).masked_fill(torch.arange(12) % 3 == 0, -100)
    index = None if kind == "found" else (labels != -100).nonzero().squeeze(1)
    if kind == "repeated":
        labels = labels[index]
    teacher: tuple[Any, ...] = (torch.randn(12, 6), torch.randn(20, 6), None)
    coefficients, second = None, (None, None, None)
    if num_teachers == 2:
        outputs += ",l1_distance"
        coefficients, second = (
            torch.rand(2, len(labels)),
            (torch.randn(12, 8), torch.randn(20, 8), torch.randn(20)),
        )
    scalars = (0.7, 5.0, 1.3, FP32, 1.0, None, 1.0, FP32, 1.0, 3.0, 1.0, FP32)
    args = (
        h,
        w,
        b,
        labels,
        index,
        kind,
        -100,
        *teacher,
        *second,
        coefficients,
        outputs,
        logps_grad,
        0.3,
        0.5,
        0.0,
        mode,
        "auto",
        1,
        64,
        *scalars,
    )
    torch.library.opcheck(torch.ops.fastdpo.token_divergence.default, args)
    found = (labels != -100).nonzero().squeeze(1) if index is None else index
    made = [name for name in outputs.split(",") if name != "logps" or logps_grad]
    grads = [torch.randn(len(labels)) if name in made else None for name in DIFFERENTIABLE]
    args = (
        *grads, h.detach(), w.detach(), b.detach(), labels, found, kind, torch.empty(0), True, True, True,
        *teacher, *second, coefficients, outputs, logps_grad, 0.3, 0.5, 0.0,
        "recompute", "auto", 1, 64, *scalars,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastdpo.token_divergence_backward.default, args)


# Inductor alone checks the strides that fake kernels promise, and compiles for seconds.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    case = make_divergence_case("plain")

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return weighted(
            case, run_divergence(case, h * 1.0, w, None, ("reverse_kl",), small()), ("reverse_kl",)
        )

    results = []
    with fresh_inductor_cache():  # a cached graph has the strides of the fake kernel that it was made with
        for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
            h, w = case.policy.hidden.clone().requires_grad_(), case.policy.weight.clone().requires_grad_()
            function(h, w).backward()
            results.append((h.grad, w.grad))
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want)


def test_autocast_and_mixed_dtypes() -> None:
    """Each head is cast as autocast says; without it a bf16 teacher stays so beside an fp32 policy."""
    case = make_divergence_case("plain", BF16)
    h, w = case.policy.hidden.float().requires_grad_(), case.policy.weight.float().requires_grad_()
    own = run_divergence(case, case.policy.hidden, case.policy.weight, None, ("forward_kl",)).forward_kl
    mixed = run_divergence(case, h, w, None, ("forward_kl",)).forward_kl
    assert own is not None and mixed is not None
    torch.testing.assert_close(mixed, own, atol=1e-5, rtol=0)
    with torch.autocast("cpu", BF16):
        cast = run_divergence(case, h, w, None, ("forward_kl",)).forward_kl
    assert cast is not None and torch.equal(cast, own)
    assert all(grad.dtype == FP32 for grad in torch.autograd.grad(cast.sum(), (h, w)))


@pytest.mark.parametrize("outputs", [("jsd",), ("jsd", "logps")], ids=str)
@pytest.mark.parametrize("mode", ["stash", "cache", "recompute"])
def test_a_second_backward_pass_and_the_same_bits(mode: str, outputs: tuple[str, ...]) -> None:
    """What is kept is read, not written; and the same call gives the same bits."""
    case = make_divergence_case("a cap on the policy")
    grads = []
    for _ in range(2):
        h = case.policy.hidden.clone().requires_grad_()
        w = case.policy.weight.clone().requires_grad_(mode != "stash")
        out = run_divergence(case, h, w, case.policy.bias, outputs, small(mode))
        loss, leaves = weighted(case, out, outputs), [t for t in (h, w) if t.requires_grad]
        grads += [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    for others in grads[1:]:
        assert all(torch.equal(x, y) for x, y in zip(grads[0], others, strict=True))


def test_a_second_derivative_raises() -> None:
    h = torch.randn(3, 4, requires_grad=True)
    out = token_divergence(h, torch.randn(9, 4), torch.randn(3, 4), torch.zeros(3).long())
    assert out.forward_kl is not None
    (grad,) = torch.autograd.grad(out.forward_kl.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
