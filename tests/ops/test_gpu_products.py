"""D W as a GPU makes it: fp32 sums whatever the result, in parts of the vocabulary, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdpo import Execution, TokenLayout, fused_dpo_loss
from fastdpo.kernels.matmul import SlabbedWeight, hidden_grad_into
from fastdpo.ops import library
from fastdpo.plan.plan import Plan
from fastdpo.testing import assert_close_to_fp64, emulated_results, fp64_results, make_case
from tests.ops.common import backend_or_skip, leaves, run_op
from tests.ops.gpu_products import Seen, gpu_products

__all__ = ["gpu_products"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("out_dtype", [FP32, None], ids=["fp32", "own"])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_d_w_in_parts(parts: int, out_dtype: Any, dtype: torch.dtype, gpu_products: Seen) -> None:
    """From the front of rows that are twice as far apart; 1003 entries leave 3 to 11 over."""
    generator = torch.Generator().manual_seed(parts)
    rows = torch.randn(37, 2 * 1008, generator=generator).to(dtype)
    d, weight = rows[:, :1003], torch.randn(1003, 24, generator=generator).to(dtype)
    out = torch.empty(37, 24, dtype=out_dtype or dtype)
    hidden_grad_into(out, d, SlabbedWeight(weight, dtype, dtype), parts)
    truth = d.double() @ weight.double()
    rounding = torch.finfo(out.dtype).eps / 2 if out_dtype is None else 0.0
    assert ((out.double() - truth).abs() <= rounding * truth.abs() + 1e-4).all()
    assert {result for _, _, result, _ in gpu_products} == {FP32}
    wanted = [("mm", (37, 24))]
    if parts > 1:
        wanted = [("bmm", (parts, 37, 24)), ("addmm", (37, 24))]
    assert [(name, shape) for name, _, _, shape in gpu_products] == wanted


@pytest.fixture
def three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where tiles are few: at the sizes of a test nothing is worth it."""
    monkeypatch.setattr(library, "num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(Plan, "hidden_parts", lambda plan, rows: 3)
    monkeypatch.setattr(Plan, "hidden_piece", lambda plan, rows: 100)


@pytest.mark.usefixtures("three_parts")
@pytest.mark.parametrize("mode", ["stash", "cache", "recompute"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_a_gpus_products(mode: str, backend: str, gpu_products: Seen) -> None:
    """With D in the front of fp32 logits, compact, and recomputed; no sum over the vocabulary in 16 bits."""
    backend_or_skip(backend)
    case = make_case(dtype=BF16, vocab=1003, has_bias=False, softcap=20.0)
    h, w, _ = leaves(case, weight=mode != "stash")
    out = run_op(case, h, w, None, Execution(mode=mode, backend=backend, workspace_mib=1))
    wanted = [leaf for leaf in (h, w) if leaf.requires_grad]
    ours = torch.autograd.grad(out.logps, wanted, case.upstream)
    truth, eager = fp64_results(case), emulated_results(case)
    for name, mine in zip(("dhidden", "dweight"), ours, strict=False):
        assert_close_to_fp64(mine, getattr(truth, name), getattr(eager, name), name=name)
    hidden_size = case.hidden.shape[-1]
    sums = [result for name, _, result, shape in gpu_products if name == "bmm" and shape[-1] == hidden_size]
    assert sums and set(sums) == {FP32}


@pytest.mark.usefixtures("three_parts")
def test_pairs_of_a_gpus_products(gpu_products: Seen) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(160, 24, generator=generator).bfloat16()
    weight = torch.randn(1003, 24, generator=generator).bfloat16()
    index = torch.arange(160)
    labels = torch.randint(1003, (160,), generator=generator)
    layout = TokenLayout(index, labels, index // 20, (20,) * 8)

    def grads(dtype: torch.dtype, mode: str) -> tuple[torch.Tensor, ...]:
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        execution = Execution(mode=mode, workspace_mib=1)
        loss = fused_dpo_loss(h, w, None, layout=layout, ref_logps=torch.zeros(8), execution=execution).loss
        return torch.autograd.grad(loss, (h, w))

    ours, truth = grads(BF16, "pairs"), grads(torch.float64, "cache")
    assert any(name == "bmm" for name, *_ in gpu_products)
    eager = tuple(grad.to(BF16) for grad in truth)
    for mine, exact, plain in zip(ours, truth, eager, strict=True):
        assert_close_to_fp64(mine, exact, plain)
