"""The plan of mode ``lean``: blocks of rows and slabs of the vocabulary that fill the workspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdpo.ops import library
from fastdpo.ops.lean import forward_lean
from fastdpo.ops.lean_slabs import logit_bytes
from fastdpo.plan import make_plan
from fastdpo.plan_lean import lean_blocks, make_lean_plan
from fastdpo.schedule import MIB
from tests.ops.meta_gpu import LiveBytes, make_call, meta_gpu, run_call

__all__ = ["meta_gpu"]


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "vocab", "workspace_mib"),
    [
        (16384, 4096, 128256, 512),
        (16384, 4096, 128256, 64),
        (262144, 8192, 256000, 512),
        (4096, 4096, 128256, 1),
        (1, 4096, 1 << 24, 1),
        (3, 8, 7, 1),
    ],
)
@pytest.mark.parametrize(("logit", "operand"), [(4, 2), (6, 4), (12, 8)])
def test_blocks_fill_the_workspace_and_stay_inside(
    num_tokens: int, hidden_size: int, vocab: int, workspace_mib: int, logit: int, operand: int
) -> None:
    kwargs: dict[str, Any] = {
        "logit_bytes": logit,
        "operand_bytes": operand,
        "workspace_mib": workspace_mib,
    }
    plan = make_lean_plan(num_tokens, hidden_size, vocab, **kwargs)
    assert 1 <= plan.row_block <= num_tokens and 1 <= plan.slab <= vocab
    assert plan.workspace_bytes <= workspace_mib * MIB
    is_whole = plan.row_block == num_tokens and plan.slab == vocab
    assert is_whole or plan.workspace_bytes > 0.4 * workspace_mib * MIB
    frozen = make_lean_plan(num_tokens, hidden_size, vocab, needs_weight=False, needs_hidden=False, **kwargs)
    assert (frozen.row_block, frozen.slab) == (plan.row_block, plan.slab)
    assert frozen.sum_bytes == 0


def test_a_workspace_without_room_for_one_product_is_refused() -> None:
    with pytest.raises(ValueError, match="workspace_mib"):
        lean_blocks(1, 1 << 20, 8, operand_bytes=4, workspace_mib=1)


def test_both_plans_agree() -> None:
    plan = make_plan("lean", 4096, 4096, 128256, needs_weight=True, workspace_mib=64)
    lean_plan = make_lean_plan(4096, 4096, 128256, needs_weight=True, workspace_mib=64)
    assert (plan.chunk_rows, plan.leading_dim) == (lean_plan.row_block, lean_plan.slab)
    assert plan.gemm_passes == 4 and plan.workspace_bytes <= 64 * MIB
    assert logit_bytes("triton", torch.bfloat16) == 4 and logit_bytes("reference", torch.float64) == 12


@pytest.mark.parametrize(("num_tokens", "vocab"), [(16384, 128256), (65536, 262144), (5, 1 << 24)])
@pytest.mark.parametrize("workspace_mib", [1, 16, 512])
def test_partial_sums_fit_the_workspace(num_tokens: int, vocab: int, workspace_mib: int) -> None:
    """Of a forward pass that stores no logits, up to 6 fp32 sums for each row and 2048 entries of V."""
    plan = make_lean_plan(num_tokens, 64, vocab, workspace_mib=workspace_mib)
    assert 1 <= plan.score_rows <= num_tokens
    sums = plan.score_rows * -(-vocab // 2048) * 6 * 4
    assert sums < plan.workspace_bytes <= workspace_mib * MIB
    in_torch = make_lean_plan(num_tokens, 64, vocab, logit_bytes=6, workspace_mib=workspace_mib)
    assert in_torch.score_rows == 0


def test_partial_sums_of_one_row_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="workspace_mib: sums of one row over"):
        make_lean_plan(1, 1, 1 << 26, workspace_mib=1)


class FakeKernel:
    """Stands for a Triton kernel on meta tensors."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.launches += 1

        return launch


@pytest.mark.usefixtures("meta_gpu")
@pytest.mark.parametrize("statistics", [(), ("entropy", "log_sum_sq_probs", "mean_logit")])
@pytest.mark.parametrize("index_kind", ["tokens", "found"])
def test_memory_of_the_pass_that_stores_no_logits(
    monkeypatch: pytest.MonkeyPatch, statistics: tuple[str, ...], index_kind: str
) -> None:
    """Counted on meta tensors: the workspace, what is summed beside it, and vectors of N."""
    pytest.importorskip("triton")
    from fastdpo.kernels import lean_triton, slab_triton

    kernel = FakeKernel()
    monkeypatch.setattr(library, "resolve_backend", lambda *args: "triton")
    monkeypatch.setattr(lean_triton, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(lean_triton, "_lean_kernel", kernel)
    monkeypatch.setattr(slab_triton, "slab_gradient", lambda *args, **kwargs: None)
    num_tokens, hidden_size, vocab = 65536, 64, 262144
    call = make_call(
        "lean", num_tokens, hidden_size, vocab, workspace_mib=16, needs_weight=True, index_kind=index_kind
    )
    vectors = 8 * num_tokens * 4  # outputs, labels, coefficients
    with LiveBytes() as live:
        forward_lean(call, statistics)
    assert kernel.launches == -(-num_tokens // call.plan.score_rows) > 1
    assert live.peak <= call.plan.workspace_bytes + vectors <= 16 * MIB + vectors
    with LiveBytes() as live:
        run_call(call)
    assert live.peak <= call.plan.peak_bytes + vectors
