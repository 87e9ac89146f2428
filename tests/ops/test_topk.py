"""Entropy and mass of the k most likely tokens: in every mode, on every backend, against fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, TokenLayout, linear_logprob
from fastdpo.definitions.logprob import linear_logprob_reference
from fastdpo.kernels.contract import LogitTransform
from fastdpo.kernels.topk import chunk_top_sums, merge_top, no_top, top_sums
from fastdpo.plan.call import make_plan
from fastdpo.testing import Case, assert_logps_close, make_case
from fastdpo.types import TOPK_STATISTICS, LinearLogprobOutput
from tests.ops.common import backend_or_skip, leaves, run_op
from tests.ops.test_gemm_passes import count_passes
from tests.ops.test_memory import largest_allocation

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MODES = ("score", "stash", "cache", "recompute", "lean")
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"has_bias": False},
    "bias": {},
    "cap, scale and temperature": {"softcap": 5.0, "logit_scale": 0.3, "temperature": 1.4},
    "negative scale": {"logit_scale": -0.5, "softcap": 25.0},
    "one tile wide": {"vocab": 16, "has_bias": False},
}


def run(case: Case, mode: str = "score", k: int | None = None, **execution: Any) -> LinearLogprobOutput:
    """The statistics of a case in small chunks, some gradient required where the mode has one."""
    h, w, b = leaves(case, hidden=mode != "score", weight=mode in ("cache", "recompute"))
    settings = {"workspace_mib": 1, "cache_mib": 1} | execution
    return run_op(case, h, w, b, Execution(mode=mode, **settings), outputs=TOPK_STATISTICS, topk=k)


def assert_right(case: Case, out: LinearLogprobOutput, k: int) -> None:
    """Held to the limits of a log-probability: mass is at most 1, and entropy is in nats."""
    truth = linear_logprob_reference(
        case.hidden.double(),
        case.weight.double(),
        case.labels,
        bias=None if case.bias is None else case.bias.double(),
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        temperature=case.temperature,
        outputs=TOPK_STATISTICS,
        topk=k,
    )
    for name in TOPK_STATISTICS:
        got, want = getattr(out, name), getattr(truth, name)
        assert got.shape == case.labels.shape and not got.requires_grad
        assert got[case.labels == -100].count_nonzero() == 0
        assert_logps_close(got, want, case.hidden.dtype, hidden_size=case.hidden.shape[-1], name=name)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_backend(mode: str, dtype: torch.dtype, backend: str, head: str) -> None:
    if dtype == FP64 and backend != "reference":
        pytest.skip("float64 runs on the reference backend only")
    backend_or_skip(backend)
    case = make_case(dtype=dtype, batch=3, length=32, **HEADS[head])
    assert_right(case, run(case, mode, backend=backend), 10)


@pytest.mark.parametrize("k", [1, 2, 63, 500, 1003])
@pytest.mark.parametrize("mode", ["score", "lean"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_k(k: int, mode: str, has_bias: bool) -> None:
    case = make_case(dtype=FP32, batch=3, length=32, has_bias=has_bias)
    assert_right(case, run(case, mode, k), k)


@pytest.mark.parametrize("mode", ["score", "lean"])
def test_k_of_the_whole_vocabulary_is_mass_1_and_the_entropy(mode: str) -> None:
    case = make_case(dtype=FP32, batch=2, length=16)
    execution = Execution(mode=mode, workspace_mib=1)
    names = ("entropy", *TOPK_STATISTICS)
    out = run_op(case, case.hidden, case.weight, case.bias, execution, outputs=names, topk=1003)
    scored = case.labels != -100
    assert out.topk_mass is not None and out.topk_entropy is not None and out.entropy is not None
    torch.testing.assert_close(out.topk_mass[scored], torch.ones(int(scored.sum())), atol=2e-6, rtol=0)
    torch.testing.assert_close(out.topk_entropy, out.entropy, atol=1e-5, rtol=0)


def test_uniform_logits() -> None:
    """H_k = (k / V) log V and M_k = k / V."""
    out = linear_logprob(torch.zeros(3, 4), torch.randn(40, 4), torch.arange(3), outputs=TOPK_STATISTICS)
    assert out.topk_mass is not None and out.topk_entropy is not None
    assert torch.allclose(out.topk_mass, torch.tensor(10 / 40))
    assert torch.allclose(out.topk_entropy, torch.tensor(10 / 40 * math.log(40)))


@pytest.mark.parametrize("mode", ["score", "lean"])
@pytest.mark.parametrize("spread", [1e-3, 300.0])
def test_flat_and_peaked_logits(mode: str, spread: float) -> None:
    """Peaked, all but one p underflow and the logsumexp is in the hundreds: held to its own spacing there."""
    case = make_case(dtype=FP32, batch=2, length=32, has_bias=False)
    case = replace(case, weight=case.weight * (spread / 3))
    out = run(case, mode)
    truth = run(replace(case, hidden=case.hidden.double(), weight=case.weight.double()), mode)
    # Half a spacing of lse each from the log-probability and the largest logit, through dH/dlse = M - H.
    lse = linear_logprob_reference(case.hidden, case.weight, case.labels, outputs=("lse",)).lse
    assert lse is not None
    allowed = float(lse.abs().max()) * 2**-22 + 1e-5
    for name in TOPK_STATISTICS:
        assert (getattr(out, name).double() - getattr(truth, name)).abs().max() < allowed, name


@pytest.mark.parametrize("mode", ["score", "lean"])
def test_masked_vocabulary_and_bad_rows(mode: str) -> None:
    """-inf counts as probability 0, also where fewer than k are left; NaN stays in its row."""
    case = make_case(dtype=FP32, batch=2, length=16)
    assert case.bias is not None
    case.bias[torch.randperm(1003)[:1000]] = -torch.inf
    assert_right(case, run(case, mode), 10)
    row = tuple((case.labels != -100).nonzero()[3].tolist())
    clean = run(case, mode)
    case.hidden[row] = torch.nan
    dirty = run(case, mode)
    others = torch.ones_like(case.labels, dtype=torch.bool)
    others[row] = False
    for name in TOPK_STATISTICS:
        assert getattr(dirty, name)[row].isnan()
        assert torch.equal(getattr(dirty, name)[others], getattr(clean, name)[others])


@pytest.mark.parametrize("k", [10, 1003])
def test_bf16_logits_take_the_labels_exact_one(k: int) -> None:
    """As the logsumexp does, so that k = V still has mass 1."""
    case = make_case(dtype=BF16, batch=2, length=32)
    h, w, b = case.hidden, case.weight, case.bias
    assert b is not None
    execution = Execution(logits_dtype="bf16", workspace_mib=1)
    out = run_op(case, h, w, b, execution, outputs=(*TOPK_STATISTICS, "entropy"), topk=k)
    raw = (h.float() @ w.float().T).bfloat16().double()
    label = case.labels.clamp(min=0)[..., None]
    raw.scatter_(-1, label, (h.double() @ w.double().T).gather(-1, label))
    p = (
        (raw + b.double())
        .softmax(-1)
        .sort(-1)
        .values[..., -k:]
        .masked_fill(case.labels[..., None] == -100, 0)
    )
    assert out.topk_mass is not None and out.topk_entropy is not None
    assert_logps_close(out.topk_mass, p.sum(-1), BF16)
    assert_logps_close(out.topk_entropy, -torch.special.xlogy(p, p).sum(-1), BF16)


@pytest.mark.parametrize("mode", ["score", "lean"])
def test_layout_with_repeated_rows_and_no_tokens(mode: str) -> None:
    case = make_case(dtype=FP32, batch=2, length=16, has_bias=False)
    index, targets = torch.tensor([3, 3, 0, 9]), torch.tensor([1, 2, 3, 4])
    execution = Execution(mode=mode, workspace_mib=1)

    def of(index: Tensor, targets: Tensor) -> LinearLogprobOutput:
        layout = TokenLayout(index, targets, torch.zeros_like(index))
        return linear_logprob(case.hidden, case.weight, layout, outputs=TOPK_STATISTICS, execution=execution)

    out, none = of(index, targets), of(index[:0], targets[:0])
    rows = linear_logprob(
        case.hidden.flatten(0, 1)[index], case.weight, targets, outputs=TOPK_STATISTICS, execution=execution
    )
    for name in TOPK_STATISTICS:
        torch.testing.assert_close(getattr(out, name), getattr(rows, name), atol=1e-6, rtol=0)
        assert getattr(none, name).shape == (0,)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_else_changes(mode: str) -> None:
    """The same bits of log-probabilities and gradients, and as many products, with and without it."""
    case = make_case(dtype=FP32, has_bias=False, softcap=20.0)
    num_tokens = int((case.labels != -100).sum())
    results, passes = [], []
    for outputs in ((), TOPK_STATISTICS):
        h, w, _ = leaves(case, hidden=mode != "score", weight=mode in ("cache", "recompute", "lean"))
        execution = Execution(mode=mode, workspace_mib=1, cache_mib=1)

        def step(
            h: Tensor = h, w: Tensor = w, outputs: Any = outputs, execution: Execution = execution
        ) -> None:
            out = run_op(case, h, w, None, execution, outputs=outputs)
            if h.requires_grad:
                out.logps.backward(case.upstream)
            results.append([out.logps.detach(), h.grad, w.grad])

        passes.append(count_passes(step, num_tokens, *reversed(case.weight.shape)))
    assert passes[0] == passes[1]
    for plain, ours in zip(*results, strict=True):
        assert (plain is None) == (ours is None)
        assert plain is None or torch.equal(plain, ours)


@pytest.mark.parametrize("k", [10, 4096])
@pytest.mark.parametrize("has_bias", [False, True])
def test_memory_is_a_share_of_the_workspace(k: int, has_bias: bool) -> None:
    """With 64 rows of logits in the workspace of 1 MiB, nothing else of a chunk's size exists.

    The largest is then a tile's values and indices for k = V: 4 rows, and 12 bytes where a logit has 4.
    """
    hidden, weight = torch.randn(512, 8), torch.randn(4096, 8)
    bias = torch.randn(4096) if has_bias else None
    case = Case(hidden[None], weight, bias, torch.randint(4096, (1, 512)), torch.zeros(1, 512))
    sizes = []

    def step(outputs: Any, **kwargs: Any) -> None:
        run_op(case, case.hidden, weight, bias, Execution(workspace_mib=1), outputs=outputs, **kwargs)

    sizes = [largest_allocation(lambda: step(())), largest_allocation(lambda: step(TOPK_STATISTICS, topk=k))]
    assert sizes == [2**20, 2**20]
    # The workspace set apart, by the function that looks at a chunk of it:
    chunk = torch.randn(64, 4096)
    transform = LogitTransform(bias=bias)
    tile = 4 * 4096 * 12
    assert largest_allocation(lambda: chunk_top_sums(chunk, torch.zeros(64).long(), transform, k)) <= tile


def test_lean_refuses_what_does_not_fit() -> None:
    """The k values of a block of rows at a time, in no more memory than the workspace."""
    case = make_case(dtype=FP32, batch=6, length=64, vocab=5001)
    with pytest.raises(ValueError, match=r"topk: got 5000.*for \d+ tokens.*lean.*workspace_mib holds, 1 MiB"):
        run(case, "lean", 5000)
    case = make_case(dtype=FP32, batch=6, length=64)
    run(case, "lean", 1003)
    run(case, "score", 1003)


def test_a_store_free_kernel_has_no_logits_to_look_at() -> None:
    from fastdpo.ops.head_call import HeadCall
    from fastdpo.ops.lean import forward_lean

    case = make_case(dtype=FP16, has_bias=False)
    hidden, labels = case.hidden.flatten(0, 1), case.labels.flatten()
    plan = make_plan("lean", len(labels), 64, 1003, lean_kernel="triton", workspace_mib=1)
    assert plan.score_slab == 0
    how = (LogitTransform(), plan, "triton", FP16, FP32, FP16)
    call = HeadCall(hidden, case.weight, None, None, False, labels, None, *how)
    with pytest.raises(ValueError, match=r"top-k.*another mode.*larger workspace_mib.*stores no logits"):
        forward_lean(call, (), 10)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_slabs_give_what_the_chunk_gives(scale: float) -> None:
    """In any cut of the vocabulary, also with slabs narrower than k."""
    torch.manual_seed(0)
    logits = torch.randn(7, 300, dtype=FP64)
    transform = LogitTransform(bias=torch.randn(300, dtype=FP64), scale=scale, softcap=2.0, temperature=0.7)
    whole = chunk_top_sums(logits, torch.zeros(7).long(), transform, 20)
    for width in (5, 64, 300):
        top = no_top(logits, 7, 20, transform)
        for first in range(0, 300, width):
            merge_top(top, logits[:, first : first + width], transform, first)
        for ours, want in zip(top_sums(top, transform), whole, strict=True):
            torch.testing.assert_close(ours, want)
