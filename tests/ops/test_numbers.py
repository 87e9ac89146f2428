"""Values and gradients of the op against fp64, for every mode, backend, dtype and option of the head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, linear_logprob
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
from tests.ops.common import backend_or_skip, dense_output, leaves, op_results, run_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One MiB holds 260 rows of 1003 fp32 logits: the 269 labelled tokens of `make_case` need two chunks.
MODES = {
    "cache": Execution(mode="cache", workspace_mib=1),
    "cache_partly": Execution(mode="cache", workspace_mib=1, cache_mib=1),
    "recompute": Execution(mode="recompute", workspace_mib=1),
    "one_chunk": Execution(),
}
OPTIONS = {
    "plain": {},
    "no_bias": {"has_bias": False},
    "softcap": {"softcap": 30.0},
    "scale": {"logit_scale": -0.4},
    "temperature": {"temperature": 1.7},
    "all": {"softcap": 20.0, "logit_scale": 2.5, "temperature": 0.6},
}


@pytest.mark.promise(1, 2, 20)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_mode_meets_the_rule(backend: str, mode: str, dtype: torch.dtype) -> None:
    backend_or_skip(backend)
    case = make_case(dtype=dtype)
    execution = Execution(**{**vars(MODES[mode]), "backend": backend})
    assert_results_close(op_results(case, execution), case)


@pytest.mark.promise(9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_head_option_meets_the_rule(options: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, **OPTIONS[options])  # type: ignore[arg-type]
    assert_results_close(op_results(case, MODES["cache_partly"]), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_frozen_head_meets_the_rule(dtype: torch.dtype, softcap: float | None) -> None:
    case = make_case(dtype=dtype, softcap=softcap)
    h, w, b = leaves(case, weight=False)
    out = run_op(case, h, w, b, Execution(mode="stash", workspace_mib=1))
    (dhidden,) = torch.autograd.grad(out.logps, (h,), case.upstream)
    truth, eager = fp64_results(case), eager_results(case)
    assert_logps_close(out.logps.detach(), truth.logps, dtype, hidden_size=case.hidden.shape[-1])
    assert_close_to_fp64(dhidden.flatten(0, 1), truth.dhidden.flatten(0, 1), eager.dhidden.flatten(0, 1))
    assert (dhidden[case.labels == case.ignore_index] == 0).all()


def test_frozen_hidden_gives_the_head_its_gradient() -> None:
    case = make_case(dtype=torch.float32)
    h, w, b = leaves(case, hidden=False)
    assert b is not None
    out = run_op(case, h, w, b)
    dweight, dbias = torch.autograd.grad(out.logps, (w, b), case.upstream)
    whole = op_results(case)
    assert torch.equal(dweight, whole.dweight)
    assert whole.dbias is not None and torch.equal(dbias, whole.dbias)


@pytest.mark.parametrize("mode", ["stash", "cache", "cache_partly", "recompute"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_through_lse(mode: str, softcap: float | None, dtype: torch.dtype) -> None:
    """A z-loss or a raw target logit (logp + lse) needs the gradient of lse, in every mode."""
    case = make_case(dtype=dtype, softcap=softcap)
    upstream = torch.stack((case.upstream, case.upstream.flip(0)))
    execution = Execution(mode="stash", workspace_mib=1) if mode == "stash" else MODES[mode]
    ours = _statistic_grads(case, upstream, ("lse",), execution, weight=mode != "stash")
    truth, eager = _dense_grads(case, upstream, ("lse",), weight=mode != "stash")
    for name, got in ours.items():
        assert_close_to_fp64(_flat(got), _flat(truth[name]), _flat(eager[name]), name=name)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradient_through_entropy(backend: str, softcap: float | None) -> None:
    backend_or_skip(backend)
    case = make_case(dtype=torch.float32, softcap=softcap, logit_scale=0.5, temperature=1.5)
    upstream = torch.stack((case.upstream, case.upstream.flip(0), case.upstream.flip(1)))
    execution = Execution(workspace_mib=1, backend=backend)
    ours = _statistic_grads(case, upstream, ("lse", "entropy"), execution, entropy_requires_grad=True)
    truth, eager = _dense_grads(case, upstream, ("lse", "entropy"))
    for name, got in ours.items():
        assert_close_to_fp64(_flat(got), _flat(truth[name]), _flat(eager[name]), name=name)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor


def _statistic_grads(
    case: Case,
    upstream: Tensor,
    names: tuple[str, ...],
    execution: Execution,
    weight: bool = True,
    **kwargs: bool,
) -> dict[str, Tensor]:
    h, w, b = leaves(case, weight=weight)
    out = run_op(case, h, w, b, execution, outputs=names, **kwargs)
    return _backward_of([out.logps, *(getattr(out, name) for name in names)], upstream, h, w, b)


def _dense_grads(
    case: Case, upstream: Tensor, names: tuple[str, ...], weight: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The definition's gradients in fp64, and plain torch's in the case's own dtype."""
    results = []
    for dtype in (torch.float64, case.hidden.dtype):
        h, w, b = (None if t is None else t.detach().to(dtype).requires_grad_() for t in leaves(case))
        assert h is not None and w is not None
        out = dense_output(case, h, w, b, names)
        terms = [out.logps, *(getattr(out, name) for name in names)]
        results.append(_backward_of(terms, upstream, h, w if weight else h, b if weight else None))
    return results[0], results[1]


def _backward_of(
    terms: list[Tensor], upstream: Tensor, h: Tensor, w: Tensor, b: Tensor | None
) -> dict[str, Tensor]:
    total = sum(
        ((term * up.to(term.dtype)).sum() for term, up in zip(terms, upstream, strict=True)), h.new_zeros(())
    )
    named = {"dhidden": h, "dweight": w, "dbias": b}
    wanted = {name: leaf for name, leaf in named.items() if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_statistics(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 runs on the reference backend only")
    backend_or_skip(backend)
    case = make_case(dtype=dtype, softcap=25.0, temperature=0.8)
    h, w, b = leaves(case)
    out = run_op(case, h, w, b, Execution(backend=backend, workspace_mib=1), outputs=TOKEN_STATISTICS)
    truth = dense_output(case, h.double(), w.double(), None if b is None else b.double(), TOKEN_STATISTICS)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logit"):
        got, want = getattr(out, name).detach(), getattr(truth, name).detach()
        assert_logps_close(got, want, dtype, hidden_size=case.hidden.shape[-1], name=name)
    assert out.is_top1 is not None and torch.equal(out.is_top1, truth.is_top1)
    assert out.topk_mass is None and out.topk_entropy is None


def test_what_is_not_asked_for_is_none() -> None:
    case = make_case(dtype=torch.float32)
    out = run_op(case, *leaves(case))
    assert all(value is None for value in out[1:])


@pytest.mark.parametrize(
    "execution", [Execution(mode="stash"), Execution(), Execution(workspace_mib=1)], ids=str
)
def test_what_lies_behind_rows_of_16_bits_is_in_no_sum(execution: Execution) -> None:
    """Memory that nobody wrote is NaN here, and so is what lies behind the rows of hidden."""
    case = make_case(dtype=torch.bfloat16, vocab=1003, hidden_size=40)
    wide = torch.full((*case.hidden.shape[:-1], 64), torch.nan, dtype=torch.bfloat16)
    wide[..., :40] = case.hidden
    weight = case.weight.detach().requires_grad_(execution.mode == "auto")
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for hidden in (case.hidden, wide[..., :40]):
            hidden = hidden.detach().requires_grad_()
            run = replace(execution, logits_dtype="bf16")
            logps = linear_logprob(hidden, weight, case.labels, execution=run).logps
            wanted = (hidden, weight) if weight.requires_grad else (hidden,)
            results.append((logps.detach(), *torch.autograd.grad(logps.sum(), wanted)))
    finally:
        torch.use_deterministic_algorithms(False)
    for plain, strided in zip(*results, strict=True):
        assert plain.isfinite().all() and torch.equal(plain, strided)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bf16_logits_keep_the_label_exact(backend: str) -> None:
    """Opt-in rounding: where the label dominates, its own rounding cancels, so half of eager's error goes.

    Elsewhere the rounding of the other logits is left, which eager has as well.
    """
    backend_or_skip(backend)
    case = make_case(dtype=torch.bfloat16, batch=40)
    truth = fp64_results(case)
    ours = op_results(case, Execution(logits_dtype="bf16", backend=backend, workspace_mib=1))
    eager = eager_results(case)

    def rms(logps: Tensor, where: Tensor) -> float:
        return (logps.double() - truth.logps)[where].square().mean().sqrt().item()

    labelled = case.labels != case.ignore_index
    assert rms(ours.logps, labelled) < rms(eager.logps, labelled)
    confident = labelled & (truth.logps > -0.7)  # the label holds half the mass
    assert confident.sum() > 50
    assert rms(ours.logps, confident) < 0.5 * rms(eager.logps, confident)
    assert ours.logps.max() <= 0
    for name in ("dhidden", "dweight"):
        flat = [getattr(result, name).flatten(0, -2) for result in (ours, truth, eager)]
        assert_close_to_fp64(*flat, name=name)


@pytest.mark.parametrize("cache_mib", [0, 1, 64])
def test_weight_gradient_does_not_drift(cache_mib: int) -> None:
    """Terms of one sign: a sum rounded to bf16 after every chunk would be off by several per cent."""
    case = same_sign_case(tokens=8192, vocab=256)
    ours = op_results(case, Execution(workspace_mib=1, cache_mib=cache_mib))
    truth = fp64_results(case)
    error = (ours.dweight.double() - truth.dweight).norm() / truth.dweight.norm()
    # Three roundings to bf16 (D, g h, dweight), each 2^-9 / sqrt(3) rms, make 2e-3.
    assert error < 3e-3
    assert_close_to_fp64(ours.dweight, truth.dweight, emulated_results(case).dweight)


def test_grad_weight_out_receives_the_gradient() -> None:
    case = make_case(dtype=torch.bfloat16, has_bias=False)
    h, w, _ = leaves(case)
    total = torch.full(w.shape, 2.0)
    out = run_op(case, h, w, None, MODES["cache_partly"], grad_weight_out=total)
    out.logps.backward(case.upstream, retain_graph=True)
    assert w.grad is None and h.grad is not None
    plain = fp64_results(case).dweight
    assert_close_to_fp64((total - 2.0).to(torch.bfloat16), plain, eager_results(case).dweight)
    out.logps.backward(case.upstream)
    assert torch.allclose(total - 2.0, 2 * plain.float(), atol=2e-2)
