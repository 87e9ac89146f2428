"""Mode ``lean`` end to end: the rule's numbers from slabs of the vocabulary, in a bounded workspace.

Plain torch's slabs run here, under the backends ``reference`` and ``cpu``. The Triton kernels run on a GPU,
or under Triton's interpreter in a process of its own (see ``tests/kernels/test_lean_kernel.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo import Execution, linear_logprob
from fastdpo.ops import library
from fastdpo.plan.lean import (
    TORCH_LOGIT_BYTES,
    lean_blocks,
    make_lean_plan,
)
from fastdpo.plan.modes import resolve_mode
from fastdpo.plan.schedule import MIB, holds_a_chunk_row
from fastdpo.testing import (
    Case,
    assert_close_to_fp64,
    assert_logps_close,
    assert_results_close,
    eager_results,
    emulated_results,
    fp64_results,
    make_case,
    same_sign_case,
)
from fastdpo.types import TOKEN_STATISTICS
from tests.kernels.triton_processes import run_interpreted
from tests.ops.common import backend_or_skip, dense_output, leaves, op_results, run_op
from tests.ops.test_gemm_passes import count_passes
from tests.ops.test_numbers import OPTIONS, _dense_grads, _flat, _statistic_grads

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if IS_INTERPRETED else ["reference", "cpu"]
# The interpreter's dot is wrong for bf16.
DTYPES = [torch.float32, torch.float16, *([] if IS_INTERPRETED else [torch.bfloat16])]
FP32, BF16 = torch.float32, torch.bfloat16
# MiB of workspace and V, for the 269 labelled tokens of `make_case`.
CUTS = [(1, 1003), (4, 3001), (512, 1003)]


def lean(backend: str = "auto", workspace_mib: int = 1, **kwargs: Any) -> Execution:
    """One MiB cuts the 269 labelled tokens of `make_case` into blocks, and its 1003 entries into slabs."""
    if IS_INTERPRETED:
        backend = "triton"
    return Execution(mode="lean", backend=backend, workspace_mib=workspace_mib, **kwargs)


def labelled(case: Case) -> int:
    return int((case.labels != case.ignore_index).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("workspace_mib", "vocab"), CUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_meet_the_rule(
    backend: str, workspace_mib: int, vocab: int, dtype: torch.dtype
) -> None:
    backend_or_skip(backend)
    case = make_case(dtype=dtype, vocab=vocab)
    assert_results_close(op_results(case, lean(backend, workspace_mib)), case)


def test_the_cases_above_are_cut_into_blocks_and_slabs_slabs_alone_and_not_at_all() -> None:
    cuts = []
    for workspace_mib, vocab in CUTS:
        rows, slab = lean_blocks(
            269, 64, vocab, logit_bytes=TORCH_LOGIT_BYTES, operand_bytes=4, workspace_mib=workspace_mib
        )
        cuts.append((rows < 269, slab < vocab))
    assert cuts == [(True, True), (False, True), (False, False)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_head_option_meets_the_rule(options: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, **OPTIONS[options])  # type: ignore[arg-type]
    assert_results_close(op_results(case, lean()), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_one_gradient_alone(needs: str, dtype: torch.dtype) -> None:
    """A frozen head makes D W in the forward pass, a frozen hidden state needs no dhidden."""
    case = make_case(dtype=dtype, softcap=20.0)
    both = op_results(case, lean())
    h, w, b = leaves(case, hidden=needs == "hidden", weight=needs == "weight")
    out = run_op(case, h, w, b, lean())
    assert torch.equal(out.logps.detach(), both.logps)
    wanted = (h,) if needs == "hidden" else (w, b)
    grads = torch.autograd.grad(out.logps, wanted, case.upstream)
    if needs == "hidden":
        assert_close_to_fp64(
            _flat(grads[0]), _flat(fp64_results(case).dhidden), _flat(emulated_results(case).dhidden)
        )
        return
    for got, want in zip(grads, (both.dweight, both.dbias), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_through_lse(softcap: float | None, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, softcap=softcap)
    upstream = torch.stack((case.upstream, case.upstream.flip(0)))
    ours = _statistic_grads(case, upstream, ("lse",), lean())
    truth, eager = _dense_grads(case, upstream, ("lse",))
    for name, got in ours.items():
        assert_close_to_fp64(_flat(got), _flat(truth[name]), _flat(eager[name]), name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradient_through_entropy(backend: str, softcap: float | None) -> None:
    """From the forward pass's entropy: it needs no more than the others here."""
    backend_or_skip(backend)
    case = make_case(dtype=FP32, softcap=softcap, logit_scale=0.5, temperature=1.5)
    upstream = torch.stack((case.upstream, case.upstream.flip(0), case.upstream.flip(1)))
    ours = _statistic_grads(case, upstream, ("lse", "entropy"), lean(backend), entropy_requires_grad=True)
    truth, eager = _dense_grads(case, upstream, ("lse", "entropy"))
    for name, got in ours.items():
        assert_close_to_fp64(_flat(got), _flat(truth[name]), _flat(eager[name]), name=name)


@pytest.mark.skipif(IS_INTERPRETED, reason="fp64 runs on the reference backend only")
def test_gradients_in_fp64_by_finite_differences() -> None:
    """logps, lse and entropy together, with a cap, a bias and an ignored token, against gradcheck."""
    torch.manual_seed(1)
    h = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3])

    def results(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        execution = Execution(mode="lean")
        out = linear_logprob(
            h, w, labels, outputs=("lse", "entropy"), entropy_requires_grad=True, execution=execution
        )
        assert out.lse is not None and out.entropy is not None
        return out.logps, out.lse, out.entropy

    assert torch.autograd.gradcheck(results, (h, w))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_statistics(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 runs on the reference backend only")
    backend_or_skip(backend)
    case = make_case(dtype=dtype, softcap=25.0, temperature=0.8)
    h, w, b = leaves(case)
    out = run_op(case, h, w, b, lean(backend), outputs=TOKEN_STATISTICS)
    truth = dense_output(case, h.double(), w.double(), None if b is None else b.double(), TOKEN_STATISTICS)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logit"):
        got, want = getattr(out, name).detach(), getattr(truth, name).detach()
        assert_logps_close(got, want, dtype, hidden_size=case.hidden.shape[-1], name=name)
    assert out.is_top1 is not None and torch.equal(out.is_top1, truth.is_top1)


def test_no_bit_depends_on_gradients_or_statistics() -> None:
    """A policy that equals its reference gets exactly its log-probabilities."""
    case = make_case(dtype=FP32)
    with torch.no_grad():
        reference = run_op(case, case.hidden, case.weight, case.bias, lean())
    policy = run_op(case, *leaves(case), lean(), outputs=TOKEN_STATISTICS)
    assert torch.equal(reference.logps, policy.logps.detach())


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens(num_tokens: int) -> None:
    """None at all gives gradients of zero, of the right shapes; so do labels that are all ignored."""
    case = (
        make_case(batch=1, length=num_tokens, hidden_size=24, vocab=301, dtype=FP32) if num_tokens else None
    )
    if case is not None:
        assert_results_close(op_results(case, lean()), case)
    empty = make_case(batch=1, length=4, hidden_size=24, vocab=301, dtype=FP32)
    empty.labels.fill_(empty.ignore_index)
    results = op_results(empty, lean())
    assert results.dbias is not None
    for value in results:
        assert value is not None and value.count_nonzero() == 0


@pytest.mark.parametrize("vocab", [1, 2, 63, 65])
def test_small_vocabularies(vocab: int) -> None:
    # At V = 2 the rounding of lse alone comes near what the rule allows: a third of all seeds are beyond it.
    case = make_case(vocab=vocab, hidden_size=16, dtype=FP32, seed=2)
    assert_results_close(op_results(case, lean()), case)


def test_masked_vocabulary() -> None:
    """A bias of -inf masks tokens, whole slabs of them."""
    case = make_case(dtype=FP32)
    assert case.bias is not None
    keep = torch.zeros(1003, dtype=torch.bool)
    keep[torch.cat((torch.arange(5), case.labels[case.labels != -100]))] = True
    keep[300:800] = False
    case.bias[~keep] = -torch.inf
    case.labels[(case.labels >= 300) & (case.labels < 800)] = 2
    assert_results_close(op_results(case, lean()), case)


def test_a_bad_row_stays_alone() -> None:
    """NaN in one token's hidden state: its logp and dhidden; every other row keeps its bits."""
    case = make_case(dtype=FP32, has_bias=False)
    clean = op_results(case, lean())
    row = (case.labels != -100).nonzero()[7]
    case.hidden[row[0], row[1], 3] = torch.nan
    dirty = op_results(case, lean())
    others = torch.ones_like(case.labels, dtype=torch.bool)
    others[row[0], row[1]] = False
    assert dirty.logps[~others].isnan().all() and dirty.dhidden[~others].isnan().all()
    assert torch.equal(dirty.logps[others], clean.logps[others])
    assert torch.equal(dirty.dhidden[others], clean.dhidden[others])


def test_labels_out_of_range_give_nan() -> None:
    case = make_case(dtype=FP32)
    clean = op_results(case, lean())
    row = (case.labels != -100).nonzero()[7]
    case.labels[row[0], row[1]] = 1003
    case.upstream[row[0], row[1]] = 0.0
    dirty = op_results(case, lean())
    assert dirty.logps.isnan().sum() == 1 and dirty.logps[row[0], row[1]].isnan()
    assert dirty.dweight.isfinite().all() and dirty.logps.shape == clean.logps.shape


@pytest.mark.parametrize("workspace_mib", [1, 512])
@pytest.mark.parametrize("total_dtype", [torch.float32, None], ids=["fp32", "own"])
def test_grad_weight_out_receives_the_gradient(total_dtype: torch.dtype | None, workspace_mib: int) -> None:
    dtype = torch.float16 if IS_INTERPRETED else BF16
    case = make_case(dtype=dtype, has_bias=False)
    h, w, _ = leaves(case)
    total = torch.full(w.shape, 2.0, dtype=total_dtype or dtype)
    out = run_op(case, h, w, None, lean(workspace_mib=workspace_mib), grad_weight_out=total)
    out.logps.backward(case.upstream, retain_graph=True)
    assert w.grad is None and h.grad is not None
    truth = fp64_results(case).dweight
    if total_dtype is not None:
        assert_close_to_fp64((total - 2.0).to(dtype), truth, eager_results(case).dweight)
    else:  # 2 + dweight, rounded once
        assert ((total.double() - 2.0 - truth).abs() <= torch.finfo(dtype).eps * (2 + truth.abs())).all()
    out.logps.backward(case.upstream)
    assert torch.allclose(total.double() - 2.0, 2 * truth, atol=2e-2 if total_dtype else 1e-1)


@pytest.mark.skipif(IS_INTERPRETED, reason="takes minutes to interpret 8192 rows")
def test_weight_gradient_does_not_drift() -> None:
    """Terms of one sign over many blocks of rows: each row of dweight is rounded once."""
    dtype = torch.float16 if IS_INTERPRETED else BF16
    case = same_sign_case(tokens=8192, vocab=256, dtype=dtype)
    ours = op_results(case, lean())
    truth = fp64_results(case)
    # On a CPU the operands are fp32: one rounding to the gradient's dtype is all.
    error = (ours.dweight.double() - truth.dweight).norm() / truth.dweight.norm()
    assert error < torch.finfo(dtype).eps / 2
    assert_close_to_fp64(ours.dweight, truth.dweight, emulated_results(case).dweight)


def test_large_loss_scales_do_not_overflow_fp16() -> None:
    """The row's own coefficients are divided out of D: 2^16, or 2^-16, changes dhidden by just that."""
    case = make_case(dtype=torch.float16, has_bias=False)
    up = torch.stack((case.upstream, case.upstream.flip(0)))
    plain = _statistic_grads(case, up, ("lse",), lean())
    for scale in (2.0**8, 2.0**-8):
        scaled = _statistic_grads(case, scale * up, ("lse",), lean())
        for name, got in scaled.items():
            assert torch.allclose(got.double() / scale, plain[name].double(), rtol=2e-3, atol=2e-5), name


@pytest.mark.skipif(IS_INTERPRETED, reason="its forward pass makes no product that torch could count")
@pytest.mark.parametrize("workspace_mib", [1, 512])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("needs", "passes"), [("nothing", 1), ("hidden", 2), ("both", 4), ("weight", 3)])
def test_gemm_passes(needs: str, passes: int, dtype: torch.dtype, workspace_mib: int) -> None:
    case = make_case(dtype=dtype, has_bias=False)
    h, w, _ = leaves(case, hidden=needs in ("hidden", "both"), weight=needs in ("weight", "both"))

    def run() -> None:
        out = run_op(case, h, w, None, lean(workspace_mib=workspace_mib))
        if needs != "nothing":
            out.logps.backward(case.upstream)

    assert count_passes(run, labelled(case), *reversed(case.weight.shape)) == passes
    plan = make_lean_plan(
        labelled(case), 64, 1003, needs_hidden=h.requires_grad, needs_weight=w.requires_grad, operand_bytes=4,
        keeps_product=needs == "hidden", kernel="torch",
    )  # fmt: skip
    assert plan.gemm_passes_forward + plan.gemm_passes_backward == passes


class _Allocations(TorchDispatchMode):
    """The largest tensor that any operation returns, in bytes, leaving out ``besides``."""

    def __init__(self, besides: set[int]) -> None:
        super().__init__()
        self.largest, self._besides = 0, besides

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.nbytes() not in self._besides:
                self.largest = max(self.largest, storage.nbytes())
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@pytest.mark.skipif(not IS_INTERPRETED, reason="the forward pass that stores no logits is Triton's")
@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_values_of_blocks_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the partial sums of all rows do not fit: the same bits from several launches."""
    case = make_case(dtype=dtype, vocab=131)
    h, w, b = leaves(case)
    whole = run_op(case, h, w, b, lean(), outputs=("entropy",))
    make_plan = library.make_plan
    monkeypatch.setattr(library, "make_plan", lambda *a, **k: replace(make_plan(*a, **k), score_rows=128))
    cut = run_op(case, h, w, b, lean(), outputs=("entropy",))
    assert int((case.labels != -100).sum()) > 128
    assert torch.equal(cut.logps, whole.logps) and torch.equal(cut.entropy, whole.entropy)


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize(("num_tokens", "vocab"), [(512, 4096), (2048, 4096), (512, 16384), (1, 1 << 18)])
def test_no_tensor_passes_the_workspace(num_tokens: int, vocab: int, weight: bool) -> None:
    """Whatever N and V are, nothing but inputs, their gradients and dhidden's sum is larger than 1 MiB.

    The last case's single row of logits fills the workspace: no other mode could run it with a gradient.
    """
    if IS_INTERPRETED:
        pytest.skip("takes minutes to interpret")
    hidden = torch.randn(1, num_tokens, 8, requires_grad=True)
    head = torch.randn(vocab, 8, requires_grad=weight)
    labels = torch.randint(vocab, (1, num_tokens))
    own = {hidden.untyped_storage().nbytes(), head.untyped_storage().nbytes()}
    recorder = _Allocations(own)
    with recorder:
        logps = linear_logprob(hidden, head, labels, execution=lean()).logps
        logps.sum().backward()
    assert 0 < recorder.largest <= MIB
    assert num_tokens * vocab * 4 > recorder.largest or num_tokens == 1


def test_a_workspace_too_small_for_a_chunk_runs_lean() -> None:
    """One MiB does not hold a row of 300000 logits: `auto` then takes slabs, with and without gradients."""
    assert not holds_a_chunk_row(300_000, 4, 1) and holds_a_chunk_row(262_144, 4, 1)
    for needs in (
        {"needs_hidden": True, "needs_weight": True},
        {"needs_hidden": False, "needs_weight": False},
    ):
        assert resolve_mode("auto", holds_a_row=False, **needs) == "lean"
        assert resolve_mode("lean", **needs) == "lean"
    case = make_case(batch=1, length=3, hidden_size=4, vocab=300_000, dtype=FP32, has_bias=False)
    backend = "triton" if IS_INTERPRETED else "auto"
    if not IS_INTERPRETED:
        assert_results_close(op_results(case, Execution(workspace_mib=1, backend=backend)), case)
    with pytest.raises(ValueError, match="workspace_mib"):
        op_results(case, Execution(mode="cache", workspace_mib=1, backend=backend))


@pytest.mark.skipif(IS_INTERPRETED, reason="bf16 does not run interpreted")
def test_bf16_logits_are_refused() -> None:
    case = make_case(dtype=BF16)
    with pytest.raises(ValueError, match=r"logits_dtype.*lean"):
        op_results(case, lean(logits_dtype="bf16"))


@pytest.mark.skipif(IS_INTERPRETED or torch.cuda.is_available(), reason="Triton runs in this process")
@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    # Every other test of fp32 takes the same path as under `reference`.
    run_interpreted(__file__, at_least=9, chosen="float16 and (values or plain or all or alone or lse)")
