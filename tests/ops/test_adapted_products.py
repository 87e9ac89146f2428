"""LoRA on the head as a GPU makes it: its share of the logits from bf16 parts, whatever TF32 is set to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdpo import Execution, linear_logprob
from fastdpo.kernels.matmul import exact_operands
from fastdpo.ops import adapted
from fastdpo.testing import assert_close_to_fp64, assert_logps_close, make_case
from fastdpo.types import HeadAdapter
from tests.ops.adapter_cases import Operands, dense, head_of, operands
from tests.ops.common import backend_or_skip
from tests.ops.gpu_products import Seen, gpu_products

__all__ = ["gpu_products"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tf32(value: Tensor) -> Tensor:
    """Rounded to the 11 bits that TF32 keeps."""
    bits = value.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(("dtype", "factor"), [(BF16, 3), (FP16, 5), (FP32, 6)], ids=str)
@pytest.mark.parametrize("rank", [5, 64])
def test_operands_of_16_bits_give_the_product_of_fp32_ones(
    rank: int, dtype: torch.dtype, factor: int
) -> None:
    """To the roundings of an fp32 sum, where bf16 operands are off by 3e-2 and TF32 ones by 5e-3."""
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(64, rank, generator=generator) * 3 / rank**0.5
    weight = torch.randn(500, rank, generator=generator).to(dtype)
    left, right = exact_operands(rows, weight)
    assert left.dtype == right.dtype == BF16
    assert left.shape[1] == right.shape[1] == -(-factor * rank // 8) * 8
    truth = rows.double() @ weight.double().T

    def error(product: Tensor) -> float:
        return float((product.double() - truth).abs().max())

    ours = error(left.float() @ right.float().T)
    assert ours <= 2**-21 * float((rows.abs() @ weight.float().abs().T).max())
    assert error(tf32(rows) @ tf32(weight.float()).T) > 100 * ours  # and bf16 is worse yet


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)], ids=str
)
@pytest.mark.parametrize("mode", ["cache", "recompute"])
def test_numbers(mode: str, dtype: torch.dtype, adapter_dtype: torch.dtype, gpu_products: Seen) -> None:
    backend_or_skip("cpu")
    case = make_case(dtype=dtype, has_bias=False)
    tensors = operands(case, adapter_dtype)
    execution = Execution(mode=mode, workspace_mib=1)
    out = linear_logprob(tensors.hidden, head_of(case, tensors), case.labels, execution=execution)
    ours = torch.autograd.grad(out.logps, tensors.tensors, case.upstream)
    assert {operand for _, operand, _, _ in gpu_products} <= {BF16, dtype}  # none of fp32: TF32 has no say
    wide, narrow = tensors.to(torch.float64), tensors.to(dtype)
    truth, eager = dense(case, wide), dense(case, narrow)
    assert_logps_close(out.logps, truth.logps.detach(), dtype)
    exact = torch.autograd.grad(truth.logps, wide.tensors, case.upstream.double())
    plain = torch.autograd.grad(eager.logps, narrow.tensors, case.upstream.to(eager.logps.dtype))
    for name, mine, want, theirs in zip(("h", "w", "a", "b"), ours, exact, plain, strict=True):
        rows = (-1, mine.shape[-1])
        theirs = theirs.to(mine.dtype)
        assert_close_to_fp64(mine.reshape(rows), want.reshape(rows), theirs.reshape(rows), name=name)


def test_states_of_an_fp32_adapter_under_tf32(gpu_products: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that rounds fp32 operands to 11 bits: u from 16-bit hidden states loses nothing by it."""
    case = make_case(dtype=BF16, has_bias=False)
    tensors = operands(case, FP32)
    adapter = HeadAdapter(tensors.lora_a, tensors.lora_b, 1.0)
    rounded = F.linear(tf32(tensors.hidden.float()), tf32(tensors.lora_a))
    truth = F.linear(tensors.hidden.double(), tensors.lora_a.double())

    class OnTensorCores:
        """``torch.nn.functional`` whose products round as TF32 does, gradients as they are."""

        dropout = staticmethod(F.dropout)

        @staticmethod
        def linear(rows: Tensor, weight: Tensor) -> Tensor:
            return F.linear(rows + (tf32(rows) - rows).detach(), weight + (tf32(weight) - weight).detach())

    monkeypatch.setattr(adapted, "F", OnTensorCores)
    states = adapted._low_rank_states(tensors.hidden, adapter, FP32, FP32)
    scale = truth.abs().max()
    assert (states.double() - truth).abs().max() < 1e-6 * scale
    assert (rounded.double() - truth).abs().max() > 1e-4 * scale
    upstream = torch.randn(states.shape)
    ours = torch.autograd.grad(states, (tensors.hidden, tensors.lora_a), upstream)
    wide = tensors.to(torch.float64)
    states = F.linear(wide.hidden, wide.lora_a)
    for mine, want in zip(
        ours, torch.autograd.grad(states, (wide.hidden, wide.lora_a), upstream.double()), strict=True
    ):
        assert (mine.double() - want).norm() < 3e-3 * want.norm()


def test_an_adapter_of_zeros_changes_no_bit(gpu_products: Seen) -> None:
    backend_or_skip("cpu")
    case = make_case(dtype=BF16)
    tensors = operands(case, FP32)
    tensors.lora_b.data.zero_()
    head = head_of(case, tensors)
    plain = linear_logprob(tensors.hidden, replace(head, adapter=None), case.labels)
    assert torch.equal(plain.logps, linear_logprob(tensors.hidden, head, case.labels).logps)
    assert any(name == "addmm" for name, *_ in gpu_products)


def test_nothing_is_split_on_a_cpu() -> None:
    """Whose fp32 products are fp32: the operands stay (M, r) and (V, r)."""
    case = make_case(dtype=BF16, has_bias=False)
    tensors: Operands = operands(case, FP32)
    states = adapted._low_rank_states(
        tensors.hidden, HeadAdapter(tensors.lora_a, tensors.lora_b, 2.0), FP32, FP32
    )
    assert torch.equal(states, 2.0 * F.linear(tensors.hidden.float(), tensors.lora_a))
