"""Where the ops put logits and D: rows that start at multiples of 16 bytes, also if V is odd.

``csrc/cuda/row_dispatch.cuh`` decides by that at run time, Triton when it compiles, and cuBLAS wants it of
the leading dimension of 16-bit operands for its fast kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, TokenLayout, fused_dpo_loss, linear_logprob
from fastdpo.ops import head_call
from fastdpo.plan import make_plan
from fastdpo.schedule import MIB, leading_dim
from tests.ops.meta_gpu import make_call, meta_gpu, run_call

__all__ = ["meta_gpu"]

VOCAB = 1003


@pytest.fixture
def seen_d(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every D, and every matrix of logits, that a row kernel is given."""
    seen: list[Tensor] = []
    load = head_call.load_row_kernel

    def load_spy(name: str) -> Any:
        kernel = load(name)

        def spy(logits: Tensor, *args: Any, d_out: Tensor | None = None, **kwargs: Any) -> None:
            seen.extend([logits] if d_out is None else [logits, d_out])
            kernel(logits, *args, d_out=d_out, **kwargs)

        return spy

    monkeypatch.setattr(head_call, "load_row_kernel", load_spy)
    return seen


def assert_aligned(matrices: list[Tensor]) -> None:
    assert matrices
    for matrix in matrices:
        assert matrix.stride(1) == 1
        assert matrix.data_ptr() % 16 == 0
        assert matrix.stride(0) * matrix.element_size() % 128 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["stash", "cache", "recompute", "pairs"])
def test_rows_are_aligned_for_an_odd_vocabulary(seen_d: list[Tensor], mode: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(40, 8).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, 8).to(dtype).requires_grad_(mode != "stash")
    labels = torch.randint(VOCAB, (40,))
    # 16-bit operands on a CPU only with 16-bit logits.
    logits_dtype = "bf16" if dtype == torch.bfloat16 else None
    execution = Execution(mode=mode, logits_dtype=logits_dtype, workspace_mib=1, cache_mib=1)  # type: ignore[arg-type]
    if mode == "pairs":
        layout = TokenLayout(torch.arange(40), labels, torch.arange(40) // 10, (10,) * 4)
        loss = fused_dpo_loss(
            hidden, weight, None, layout=layout, ref_logps=torch.zeros(4), execution=execution
        ).loss
    else:
        loss = linear_logprob(hidden, weight, labels, execution=execution).logps.sum()
    loss.backward()
    assert any(matrix.dtype == dtype for matrix in seen_d)
    assert_aligned(seen_d)


@pytest.mark.usefixtures("meta_gpu")
@pytest.mark.parametrize("mode", ["cache", "pairs"])
@pytest.mark.parametrize("vocab", [50257, 128257])
def test_padded_d_is_in_the_plan(mode: str, vocab: int) -> None:
    call = make_call(mode, 8192, 64, vocab, cache_mib=256)
    d = head_call.empty_d(call, call.plan.cached_rows or call.plan.group_rows)
    assert d.shape[1] == vocab and d.stride(0) == leading_dim(vocab) > vocab
    assert d.untyped_storage().nbytes() == call.plan.kept_bytes <= 256 * MIB
    run_call(call)


def test_a_budget_of_unpadded_rows_does_not_hold_them() -> None:
    """Rows of V = 513 take 576 elements each."""
    fits = make_plan("cache", 4096, 8, 512, operand_bytes=2, workspace_mib=1, cache_mib=4)
    padded = make_plan("cache", 4096, 8, 513, operand_bytes=2, workspace_mib=1, cache_mib=4)
    assert fits.cached_rows == 4096 and padded.cached_rows < 4096
    assert padded.kept_bytes == padded.cached_rows * 576 * 2 <= 4 * MIB
