"""Mode ``lean`` with a frozen head: D W slab by slab in the forward pass, rescaled as the logsumexp grows.

Both kinds of slabs: plain torch's, and a row kernel's, for which a slab is a vocabulary of its own. The
latter is a GPU's; here the C++ kernel stands for it, on a GPU's products where 16 bits matter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, LMHead, TokenLayout, fused_dpo_loss, linear_logprob
from fastdpo.ops import lean_backward, lean_merge, lean_slabs, library
from fastdpo.plan.plan import Plan
from fastdpo.testing import (
    Case,
    assert_close_to_fp64,
    assert_logps_close,
    emulated_results,
    fp64_results,
    make_case,
)
from fastdpo.types import TOKEN_STATISTICS, TOPK_STATISTICS
from tests.ops.common import backend_or_skip, dense_output, leaves, run_op
from tests.ops.gpu_products import Seen, gpu_products
from tests.ops.test_gemm_passes import count_passes
from tests.ops.test_numbers import OPTIONS, _dense_grads, _flat

__all__ = ["gpu_products"]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LEAN = Execution(mode="lean", workspace_mib=1)
KINDS = ["torch", "rows"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What makes the slabs, in at least three of them and more than one block of rows."""
    take(request.param, monkeypatch)
    return str(request.param)


def take(kind: str, monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    if kind == "rows":
        backend_or_skip("cpu")
    for module in (lean_backward, lean_merge, lean_slabs, library):
        monkeypatch.setattr(module, "lean_kernel", lambda backend, dtype: kind)
    plans: list[Plan] = []
    make_plan = library.make_plan

    def in_slabs(*args: Any, **kwargs: Any) -> Plan:
        plan = make_plan(*args, **kwargs)
        narrow = min(plan.score_slab, -(-plan.vocab_size // 3 // 8) * 8)
        plans.append(replace(plan, score_rows=min(plan.score_rows, 100), score_slab=narrow))
        return plans[-1]

    monkeypatch.setattr(library, "make_plan", in_slabs)
    return plans


def frozen_grads(case: Case, upstream: Tensor, outputs: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """Log-probabilities and dhidden; ``upstream`` (1 + number of outputs, ...)."""
    h, w, b = leaves(case, weight=False)
    out = run_op(case, h, w, b, LEAN, outputs=outputs)
    total = sum(
        (getattr(out, name) * up.to(out.logps.dtype)).sum()
        for name, up in zip(("logps", *outputs), upstream, strict=True)
    )
    return out.logps.detach(), torch.autograd.grad(total, h)[0]  # type: ignore[arg-type]


def assert_right(case: Case, logps: Tensor, dhidden: Tensor) -> None:
    truth, eager = fp64_results(case), emulated_results(case)
    assert_logps_close(logps, truth.logps, case.hidden.dtype)
    assert_close_to_fp64(_flat(dhidden), _flat(truth.dhidden), _flat(eager.dhidden), name="dhidden")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_head_option(kind: str, options: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, **OPTIONS[options])  # type: ignore[arg-type]
    assert_right(case, *frozen_grads(case, case.upstream[None]))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_with_a_gradient_through_lse(kind: str, softcap: float | None) -> None:
    case = make_case(dtype=FP32, softcap=softcap, temperature=0.8)
    upstream = torch.stack((case.upstream, case.upstream.flip(0)))
    _, ours = frozen_grads(case, upstream, ("lse",))
    truth, eager = (of["dhidden"] for of in _dense_grads(case, upstream, ("lse",)))
    assert_close_to_fp64(_flat(ours), _flat(truth), _flat(eager))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("parts", [1, 3])
def test_on_a_gpus_products(
    parts: int, softcap: float | None, dtype: torch.dtype, gpu_products: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16-bit D in the front of fp32 logits, fp32 sums over the slabs, rounded once to where they are kept."""
    plans = take("rows", monkeypatch)
    monkeypatch.setattr(Plan, "slab_parts", lambda plan, rows, slab: parts)
    case = make_case(dtype=dtype, softcap=softcap, has_bias=False)
    assert_right(case, *frozen_grads(case, case.upstream[None]))
    assert plans[-1].keeps_product and plans[-1].operand_bytes == 2
    assert {result for _, _, result, _ in gpu_products} == {FP32}
    assert any(name == "bmm" for name, *_ in gpu_products) == (parts > 1)


def test_nearly_certain_labels(kind: str) -> None:
    """Alone in its slab, and certain up to 1e-12: what is left is the others' share, and not 1 less p."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1003, 64, generator=generator)
    bias = torch.zeros(1003)
    bias[1:336] = -torch.inf
    labels = torch.zeros(1, 96, dtype=torch.int64)
    sharpness = torch.linspace(0.05, 0.6, 96)[None, :, None]
    hidden = weight[labels] * sharpness + 0.02 * torch.randn(1, 96, 64, generator=generator)
    case = Case(hidden, weight, bias, labels, torch.ones(1, 96))
    logps, ours = frozen_grads(case, case.upstream[None])
    truth = fp64_results(case)
    assert (truth.logps.exp() > 1 - 1e-9).sum() > 10
    assert_logps_close(logps, truth.logps, FP32)
    # Row by row, and relative to the row's own gradient: 1 - p in fp32 would be off by 6e-8 of W's rows.
    error = (ours.double() - truth.dhidden).norm(dim=-1)
    assert (error <= 2e-5 * truth.dhidden.norm(dim=-1)).all()


def test_masked_vocabulary(kind: str) -> None:
    """A bias of -inf masks whole slabs, the first among them, and one label in a masked slab."""
    case = make_case(dtype=FP32)
    assert case.bias is not None
    case.bias[:340] = -torch.inf
    case.bias[700:720] = -torch.inf
    scored = case.labels != case.ignore_index
    case.labels[scored & (case.labels < 340)] += 340
    case.labels[scored & (case.labels >= 700) & (case.labels < 720)] = 999
    assert_right(case, *frozen_grads(case, case.upstream[None]))
    row = tuple(scored.nonzero()[5].tolist())
    case.labels[row] = 3
    logps, dhidden = frozen_grads(case, case.upstream[None])
    assert logps[row] == -torch.inf and dhidden.isfinite().all()
    truth = fp64_results(case)
    assert torch.allclose(dhidden[row].double(), truth.dhidden[row], rtol=1e-4, atol=1e-6)


def test_bad_rows_stay_alone(kind: str) -> None:
    """NaN in a hidden state, and a label out of range: their log-probabilities, and only NaN's gradient."""
    case = make_case(dtype=FP32, has_bias=False, softcap=20.0)
    clean_logps, clean = frozen_grads(case, case.upstream[None])
    rows = (case.labels != -100).nonzero()
    bad, outside = tuple(rows[7].tolist()), tuple(rows[9].tolist())
    case.hidden[bad][3] = torch.nan
    case.labels[outside] = 1003
    logps, dhidden = frozen_grads(case, case.upstream[None])
    assert logps[bad].isnan() and logps[outside].isnan() and dhidden[bad].isnan().all()
    assert dhidden[outside].isfinite().all()
    others = torch.ones_like(case.labels, dtype=torch.bool)
    others[bad] = others[outside] = False
    assert torch.equal(logps[others], clean_logps[others])
    assert torch.equal(dhidden[others], clean[others])


def test_all_logits_masked_is_nan(kind: str) -> None:
    case = make_case(dtype=FP32)
    assert case.bias is not None
    case.bias.fill_(-torch.inf)
    logps, dhidden = frozen_grads(case, case.upstream[None])
    scored = case.labels != case.ignore_index
    assert logps[scored].isnan().all() and dhidden[scored].isnan().all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_statistics(kind: str, dtype: torch.dtype) -> None:
    """Beside D W, and without; of a row kernel's slabs they are merged, the k largest logits too."""
    case = make_case(dtype=dtype, softcap=25.0, temperature=0.8)
    names = (*TOKEN_STATISTICS, *TOPK_STATISTICS)
    h, w, b = leaves(case, weight=False)
    out = run_op(case, h, w, b, LEAN, outputs=names)
    truth = dense_output(case, h.double(), w.double(), None if b is None else b.double(), names)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logit", *TOPK_STATISTICS):
        assert_logps_close(getattr(out, name).detach(), getattr(truth, name).detach(), dtype, name=name)
    assert out.is_top1 is not None and torch.equal(out.is_top1, truth.is_top1)


def test_statistics_of_a_masked_slab(kind: str) -> None:
    case = make_case(dtype=FP32)
    assert case.bias is not None
    case.bias[336:672] = -torch.inf
    case.labels[(case.labels >= 336) & (case.labels < 672)] = 2
    names = ("entropy", "log_sum_sq_probs", "is_top1")
    out = run_op(case, case.hidden, case.weight, case.bias, LEAN, outputs=names)
    truth = dense_output(case, case.hidden.double(), case.weight.double(), case.bias.double(), names)
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        assert_logps_close(getattr(out, name), getattr(truth, name), FP32, name=name)
    assert out.is_top1 is not None and torch.equal(out.is_top1, truth.is_top1)


def test_no_bit_depends_on_who_needs_a_gradient(kind: str) -> None:
    """Frozen, trained, scored and with statistics: the same log-probabilities; twice the same gradient."""
    case = make_case(dtype=FP32)
    with torch.no_grad():
        scored = run_op(case, case.hidden, case.weight, case.bias, LEAN).logps
    logps, dhidden = frozen_grads(case, case.upstream[None])
    again, repeated = frozen_grads(case, case.upstream[None])
    assert torch.equal(logps, scored) and torch.equal(again, scored) and torch.equal(dhidden, repeated)
    trained = run_op(case, *leaves(case), LEAN, outputs=("lse", "is_top1"))
    assert torch.equal(trained.logps.detach(), scored)


def test_a_policy_that_is_its_reference_has_the_loss_ln_2(kind: str) -> None:
    """Both in one call, and the reference by itself before."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(120, 32, generator=generator).requires_grad_()
    weight = torch.randn(1003, 32, generator=generator)
    index = torch.arange(120)
    layout = TokenLayout(index, torch.randint(1003, (120,), generator=generator), index // 10, (10,) * 12)
    for head in (weight, LMHead(weight.clone(), temperature=1.0)):
        out = fused_dpo_loss(
            hidden, weight, None, layout=layout, ref_hidden=hidden.detach(), ref_lm_head=head, execution=LEAN
        )
        assert out.chosen_rewards.count_nonzero() == 0 and out.rejected_rewards.count_nonzero() == 0
        assert abs(out.loss.item() - 0.6931471805599453) < 1e-7


def test_two_products(kind: str) -> None:
    case = make_case(dtype=FP32, has_bias=False)
    h, w, _ = leaves(case, weight=False)
    num_tokens = int((case.labels != case.ignore_index).sum())

    def step() -> None:
        out = run_op(case, h, w, None, LEAN)
        out.logps.backward(case.upstream, retain_graph=True)

    assert count_passes(step, num_tokens, *reversed(case.weight.shape)) == 2


def test_a_differentiable_entropy_makes_the_logits_again(kind: str) -> None:
    case = make_case(dtype=FP32, has_bias=False)
    upstream = torch.stack((case.upstream, case.upstream.flip(0)))
    h, w, _ = leaves(case, weight=False)
    num_tokens = int((case.labels != case.ignore_index).sum())
    found = []

    def step() -> None:
        out = run_op(case, h, w, None, LEAN, outputs=("entropy",), entropy_requires_grad=True)
        found.append(torch.autograd.grad((out.logps, out.entropy), h, tuple(upstream))[0])

    assert count_passes(step, num_tokens, *reversed(case.weight.shape)) == 3
    truth, eager = (of["dhidden"] for of in _dense_grads(case, upstream, ("entropy",)))
    assert_close_to_fp64(_flat(found[0]), _flat(truth), _flat(eager))


def test_rows_that_predict_several_tokens(kind: str) -> None:
    """Their gradients add up, a second backward pass finds what the first did, and nothing labelled is 0."""
    hidden = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(301, 16, generator=torch.Generator().manual_seed(1))
    index, targets = torch.tensor([3, 3, 0, 4]), torch.tensor([1, 200, 300, 4])
    layout = TokenLayout(index, targets, torch.zeros_like(index))
    logps = linear_logprob(hidden, weight, layout, execution=LEAN).logps
    grads = [torch.autograd.grad(logps.sum(), hidden, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    wide = hidden.detach().double().requires_grad_()
    z = (wide @ weight.double().T)[index].log_softmax(-1).gather(1, targets[:, None]).sum()
    assert torch.allclose(grads[0].double(), torch.autograd.grad(z, wide)[0], atol=1e-5)
    nothing = torch.full((6,), -100)
    (grad,) = torch.autograd.grad(linear_logprob(hidden, weight, nothing, execution=LEAN).logps.sum(), hidden)
    assert grad.count_nonzero() == 0
