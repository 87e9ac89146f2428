"""LoRA on the head on a CUDA device: numbers, and equal bits of policy and reference at first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastdpo import Execution, linear_logprob
from fastdpo.ops.backends import unavailable_reason
from fastdpo.testing import assert_close_to_fp64, assert_logps_close, make_case
from tests.ops.adapter_cases import Operands, dense, head_of, operands

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def on_gpu(tensors: Operands) -> Operands:
    return Operands(*(None if t is None else t.detach().to(CUDA).requires_grad_() for t in tensors))


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["cache", "recompute"])
def test_numbers(backend: str, dtype: torch.dtype, mode: str) -> None:
    if reason := unavailable_reason(backend, CUDA):
        pytest.skip(reason)
    case = make_case(dtype=dtype, vocab=4001, hidden_size=80, device=CUDA, has_bias=False)
    tensors = on_gpu(operands(case, torch.float32))
    execution = Execution(mode=mode, backend=backend, workspace_mib=2)
    out = linear_logprob(tensors.hidden, head_of(case, tensors), case.labels, execution=execution)
    ours = torch.autograd.grad(out.logps, tensors.tensors, case.upstream)
    wide, narrow = tensors.to(torch.float64), tensors.to(dtype)
    truth, eager = dense(case, wide), dense(case, narrow)
    assert_logps_close(out.logps, truth.logps.detach(), dtype, hidden_size=80)
    exact = torch.autograd.grad(truth.logps, wide.tensors, case.upstream.double())
    plain = torch.autograd.grad(eager.logps, narrow.tensors, case.upstream.to(eager.logps.dtype))
    for name, mine, want, theirs in zip(
        ("hidden", "weight", "lora_a", "lora_b"), ours, exact, plain, strict=True
    ):
        rows = (-1, mine.shape[-1])
        assert_close_to_fp64(
            mine.reshape(rows), want.reshape(rows), theirs.to(mine.dtype).reshape(rows), name=name
        )


def test_an_adapter_of_zeros_changes_no_bit() -> None:
    case = make_case(dtype=torch.bfloat16, vocab=4001, hidden_size=80, device=CUDA)
    tensors = on_gpu(operands(case, torch.float32))
    tensors.lora_b.data.zero_()
    head = head_of(case, tensors)
    plain = linear_logprob(tensors.hidden, replace(head, adapter=None), case.labels)
    assert torch.equal(plain.logps, linear_logprob(tensors.hidden, head, case.labels).logps)
