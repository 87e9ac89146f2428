"""The plan of mode ``lean``: blocks of rows and slabs of the vocabulary that fill the workspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdpo import explain_plan
from fastdpo.kernels import lean_triton
from fastdpo.kernels.lean_triton import lean_logprobs
from fastdpo.ops import lean_backward, library
from fastdpo.ops.lean import forward_lean
from fastdpo.ops.lean_slabs import lean_kernel
from fastdpo.plan.call import make_plan
from fastdpo.plan.lean import is_store_free, lean_blocks, make_lean_plan
from fastdpo.plan.modes import LEAN_STASH
from fastdpo.plan.schedule import MIB
from tests.ops.meta_gpu import LiveBytes, make_call, meta_gpu, run_call

__all__ = ["meta_gpu"]

BF16, FP32 = torch.bfloat16, torch.float32


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
@pytest.mark.parametrize(("kernel", "operand"), [("triton", 2), ("rows", 2), ("torch", 4), ("torch", 8)])
def test_blocks_fill_the_workspace_and_stay_inside(
    num_tokens: int, hidden_size: int, vocab: int, workspace_mib: int, kernel: str, operand: int
) -> None:
    kwargs: dict[str, Any] = {
        "kernel": kernel,
        "operand_bytes": operand,
        "workspace_mib": workspace_mib,
        "num_multiprocessors": 132 * (operand == 2),
    }
    plan = make_lean_plan(num_tokens, hidden_size, vocab, **kwargs)
    assert 1 <= plan.row_block <= num_tokens and 1 <= plan.slab <= vocab
    assert 1 <= plan.score_rows <= num_tokens and 0 <= plan.score_slab <= vocab
    assert plan.workspace_bytes <= workspace_mib * MIB
    is_whole = plan.row_block == num_tokens and plan.slab == vocab
    assert is_whole or plan.workspace_bytes > 0.4 * workspace_mib * MIB
    # Neither forward nor backward slabs hang on who needs a gradient.
    for needs in ({"needs_hidden": False}, {"keeps_product": True}, {"needs_weight": True}):
        other = make_lean_plan(num_tokens, hidden_size, vocab, **needs, **kwargs)
        assert (other.row_block, other.slab) == (plan.row_block, plan.slab)
        assert (other.score_rows, other.score_slab) == (plan.score_rows, plan.score_slab)
        assert needs != {"needs_hidden": False} or other.kept_bytes == 0


@pytest.mark.parametrize(
    ("workspace_mib", "rows", "is_stored"),
    [(512, 1024, True), (64, 768, True), (40, 512, True), (36, 8192, False), (16, 5504, False)],
)
def test_logits_are_stored_where_slabs_are_wide(workspace_mib: int, rows: int, is_stored: bool) -> None:
    """Llama-3-8B on an H200: two products for a frozen head down to 40 MiB; below that Triton stores none."""
    plan = make_lean_plan(
        16384, 4096, 128256, workspace_mib=workspace_mib, keeps_product=True, num_multiprocessors=132
    )
    assert plan.score_rows == rows and (plan.score_slab >= 8192) == is_stored
    assert is_stored or plan.score_slab == 0
    assert plan.gemm_passes_forward + plan.gemm_passes_backward == (2 if is_stored else 3)
    assert plan.kept_bytes == (16384 * 4096 * 2 if is_stored else plan.row_block * 4096 * 4)
    assert is_stored != is_store_free("triton", 4096, 128256, 2, False, workspace_mib)
    for num_tokens in (1, 100, 600, 100_000):  # of no matter how many tokens: an op's fake does not know
        other = make_lean_plan(num_tokens, 4096, 128256, workspace_mib=workspace_mib, num_multiprocessors=132)
        assert (other.score_slab > 0) == is_stored
    # A row kernel without such a companion takes what there is.
    of_cuda = make_lean_plan(
        16384, 4096, 128256, kernel="rows", workspace_mib=workspace_mib, num_multiprocessors=132
    )
    assert of_cuda.score_slab >= 1024
    text = str(
        explain_plan(16384, 4096, 128256, mode="lean", workspace_mib=workspace_mib, num_multiprocessors=132)
    )
    assert ("no logits stored" in text) != is_stored and f"forward {rows} rows" in text
    assert ("D W for the backward pass" in text) == is_stored


def test_a_workspace_without_room_for_one_product_is_refused() -> None:
    with pytest.raises(ValueError, match="workspace_mib"):
        lean_blocks(1, 1 << 20, 8, operand_bytes=4, workspace_mib=1)


def test_both_plans_agree() -> None:
    sizes: dict[str, Any] = {"needs_weight": True, "workspace_mib": 64, "num_multiprocessors": 132}
    plan = make_plan("lean", 4096, 4096, 128256, lean_kernel="triton", **sizes)
    lean_plan = make_lean_plan(4096, 4096, 128256, **sizes)
    assert (plan.chunk_rows, plan.leading_dim) == (lean_plan.row_block, lean_plan.slab)
    assert plan.gemm_passes == 4 and plan.workspace_bytes <= 64 * MIB
    assert (plan.score_rows, plan.score_slab) == (lean_plan.score_rows, lean_plan.score_slab)
    kernels = {"triton": "triton", "cuda": "rows", "cpu": "torch", "reference": "torch"}
    assert {backend: lean_kernel(backend, BF16) for backend in kernels} == kernels
    assert lean_kernel("triton", FP32) == "torch"


@pytest.mark.parametrize(("num_tokens", "vocab"), [(16384, 128256), (65536, 262144), (5, 1 << 24)])
@pytest.mark.parametrize("workspace_mib", [1, 2])
def test_partial_sums_fit_the_workspace(num_tokens: int, vocab: int, workspace_mib: int) -> None:
    """Of a forward pass that stores no logits, up to 6 fp32 sums for each row and 2048 entries of V."""
    plan = make_lean_plan(num_tokens, 64, vocab, workspace_mib=workspace_mib)
    assert 1 <= plan.score_rows <= num_tokens and plan.score_slab == 0
    sums = plan.score_rows * -(-vocab // 2048) * 6 * 4
    assert sums < plan.workspace_bytes <= workspace_mib * MIB
    in_torch = make_lean_plan(
        num_tokens, 64, vocab, kernel="torch", operand_bytes=4, workspace_mib=workspace_mib
    )
    assert (in_torch.score_rows, in_torch.score_slab) == (in_torch.row_block, in_torch.slab)


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
@pytest.mark.parametrize(
    ("statistics", "index_kind"),
    [((), "found"), (("entropy", "log_sum_sq_probs", "mean_logit"), "tokens")],
    ids=str,
)
def test_memory_of_the_pass_that_stores_no_logits(
    monkeypatch: pytest.MonkeyPatch, statistics: tuple[str, ...], index_kind: str
) -> None:
    """Counted on meta tensors: the workspace, what is summed beside it, and vectors of N."""
    pytest.importorskip("triton")
    kernel = FakeKernel()
    monkeypatch.setattr(lean_triton, "lean_logprobs", lean_logprobs)  # itself, down to its launch
    monkeypatch.setattr(lean_triton, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(lean_triton, "_lean_kernel", kernel)
    num_tokens, hidden_size, vocab = 16384, 64, 131072
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


@pytest.mark.usefixtures("meta_gpu")
@pytest.mark.parametrize(
    ("backend", "num_tokens", "hidden_size", "vocab", "workspace_mib"),
    [
        ("triton", 4096, 512, 65536, 48),
        ("cuda", 4096, 512, 65536, 48),
        ("cuda", 1024, 512, 65536, 12),
        ("reference", 200, 64, 2000, 1),  # many small operations: a small one
    ],
)
@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_memory_of_slabs(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    num_tokens: int,
    hidden_size: int,
    vocab: int,
    workspace_mib: int,
    needs: str,
) -> None:
    """Of stored logits, with D W made from them and without: workspace, gradients, and vectors of N."""
    monkeypatch.setattr(library, "resolve_backend", lambda *args: backend)
    if backend == "cuda":  # whose backward pass is plain torch's
        monkeypatch.setattr(lean_backward, "_load_slab_gradient", lambda call: lambda *args, **kwargs: None)
    mode = LEAN_STASH if needs == "hidden" else "lean"
    call = make_call(
        mode, num_tokens, hidden_size, vocab, workspace_mib=workspace_mib, needs_weight=needs == "weight"
    )
    assert 0 < call.plan.score_slab < vocab and call.plan.workspace_bytes <= workspace_mib * MIB
    assert call.plan.keeps_product == (needs == "hidden")
    vectors = 32 * num_tokens * 4
    with LiveBytes() as live:
        result = run_call(call)
    del result
    assert live.peak <= call.plan.peak_bytes + vectors
