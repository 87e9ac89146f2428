"""Where the ops put logits and D: rows that start at multiples of 16 bytes, also if V is odd.

``csrc/cuda/row_dispatch.cuh`` decides by that at run time, Triton when it compiles, and cuBLAS wants it of
the leading dimension of 16-bit operands for its fast kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, TokenLayout, fused_dpo_loss, linear_logprob, token_divergence
from fastdpo.ops import divergence_chunks, divergence_library, head_call
from fastdpo.ops.gradients import DGroup
from fastdpo.plan.call import make_plan
from fastdpo.plan.plan import Plan
from fastdpo.plan.schedule import MIB, leading_dim
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


@pytest.fixture
def seen_divergence_d(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every matrix of logits and every D that the divergences' rows are given, and every D of a product."""
    seen: list[Tensor] = []
    load, add_group = divergence_chunks.load_divergence_kernel, divergence_chunks.Gradients.add_group

    def load_spy(backend: str) -> Any:
        kernel = load(backend)

        def spy(logits: Tensor, teachers: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> None:
            made = (kwargs["d_out"], kwargs["logps_d_out"])
            seen.extend([logits, *teachers, *(d for d in made if d is not None)])
            kernel(logits, teachers, *args, **kwargs)

        return spy

    def spy_group(self: Any, group: DGroup, *args: Any) -> None:
        seen.append(group.d)
        add_group(self, group, *args)

    monkeypatch.setattr(divergence_chunks, "load_divergence_kernel", load_spy)
    monkeypatch.setattr(divergence_chunks.Gradients, "add_group", spy_group)
    return seen


@pytest.mark.parametrize("outputs", [("jsd",), ("forward_kl", "logps")], ids=str)
@pytest.mark.parametrize("mode", ["stash", "cache", "recompute"])
def test_rows_of_divergences_are_aligned(
    seen_divergence_d: list[Tensor], mode: str, outputs: tuple[str, ...]
) -> None:
    """Also where two D's are kept, and made one for the products."""
    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(VOCAB, 8, requires_grad=mode != "stash")
    execution = Execution(mode=mode, workspace_mib=1, cache_mib=1)  # type: ignore[arg-type]
    labels = torch.randint(VOCAB, (40,))
    out = token_divergence(hidden, weight, torch.randn(40, 8), labels, outputs=outputs, execution=execution)
    sum(getattr(out, name).sum() for name in outputs).backward()
    assert_aligned(seen_divergence_d)


@pytest.mark.parametrize("cache_mib", [1, 64])
@pytest.mark.parametrize("outputs", [("jsd",), ("forward_kl", "logps")], ids=str)
def test_kept_d_of_divergences_is_in_the_plan(
    outputs: tuple[str, ...], cache_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two D's share the budget, padding included; 400 rows of 1003, padded to 1024, are 1.56 MiB a D."""
    kept: list[tuple[int, Plan]] = []
    forward = divergence_library.forward_divergences

    def spy(call: Any) -> Any:
        results, tensor = forward(call)
        kept.append((tensor.untyped_storage().nbytes(), call.policy.plan))
        return results, tensor

    monkeypatch.setattr(divergence_library, "forward_divergences", spy)
    hidden, weight = torch.randn(400, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    token_divergence(
        hidden, weight, torch.randn(400, 8), torch.randint(VOCAB, (400,)), outputs=outputs,
        execution=Execution(mode="cache", workspace_mib=1, cache_mib=cache_mib),
    )  # fmt: skip
    ((num_bytes, plan),) = kept
    assert 0 < plan.cached_rows <= 400 and (plan.cached_rows == 400) == (cache_mib == 64)
    row_bytes = leading_dim(VOCAB) * 4 * (2 if "logps" in outputs else 1)
    assert num_bytes == plan.kept_bytes == plan.cached_rows * row_bytes <= cache_mib * MIB


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
