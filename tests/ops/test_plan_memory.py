"""What the plan says of memory is what the op takes, at sizes of real heads, on meta tensors."""

from __future__ import annotations

import pytest
import torch

from fastdpo import explain_plan
from fastdpo.plan.schedule import MIB
from tests.ops.meta_gpu import LiveBytes, make_call, meta_gpu, run_call

__all__ = ["meta_gpu"]

LLAMA = (16384, 4096, 128256)  # N, H, V
# Vectors of N numbers, and what rounds sizes up.
SMALL_BYTES = 4 * MIB


@pytest.mark.promise(41)
@pytest.mark.usefixtures("meta_gpu")
@pytest.mark.parametrize(
    ("mode", "cache_mib", "pair_length", "gib"),
    [
        ("score", 1024, 512, 0.5),
        ("stash", 1024, 512, 0.65),
        # 4 groups, summed in bf16; no more with pairs of any other length. Chunks of 1024 rows: 0.24 GiB
        # above those of 512, which `workspace_mib=256` gives back (tests/plan/test_plan.py).
        ("pairs", 1024, 512, 2.65),
        ("pairs", 1024, 700, 2.65),
        # 6 groups: the sum is fp32, and D and logits are gone before it is cast.
        ("pairs", 768, 512, 3.35),
        ("pairs", 256, 1500, 3.8),  # all pairs recomputed
        ("cache", 1024, 512, 4.1),
        ("recompute", 1024, 512, 3.1),
    ],
)
def test_peak_of_the_headline_size(mode: str, cache_mib: int, pair_length: int, gib: float) -> None:
    needs = {"needs_hidden": mode != "score", "needs_weight": mode not in ("score", "stash")}
    call = make_call(mode, *LLAMA, cache_mib=cache_mib, pair_length=pair_length, **needs)
    with LiveBytes() as live:
        result = run_call(call)
    del result
    assert live.peak <= call.plan.peak_bytes + SMALL_BYTES
    assert live.peak >= 0.97 * call.plan.peak_bytes
    assert live.peak <= gib * 1024 * MIB


@pytest.mark.usefixtures("meta_gpu")
@pytest.mark.parametrize("mode", ["score", "stash", "cache", "recompute", "pairs", "lean"])
def test_a_bf16_copy_of_an_fp32_weight(mode: str) -> None:
    """Under autocast on a GPU: V x H x 2 bytes, there in the forward pass and again in the backward pass."""
    needs = {"needs_hidden": mode != "score", "needs_weight": mode not in ("score", "stash")}
    call = make_call(mode, *LLAMA, weight_dtype=torch.float32, **needs)
    _, hidden_size, vocab_size = LLAMA
    copy_bytes = 0 if mode == "lean" else 2 * hidden_size * vocab_size
    assert call.plan.weight_copy_bytes == copy_bytes
    assert (f"weight copy   {copy_bytes / MIB:.1f} MiB" in str(call.plan)) == (mode != "lean")
    with LiveBytes() as live:
        result = run_call(call)
    del result
    assert live.peak <= call.plan.peak_bytes + SMALL_BYTES
    assert mode == "lean" or live.peak >= 0.97 * call.plan.peak_bytes
    explained = explain_plan(
        *LLAMA, mode=mode, weight_bytes=4, hidden_requires_grad=mode != "score", num_multiprocessors=132,
        weight_requires_grad=needs["needs_weight"],
        pair_lengths=[512] * 32 if mode == "pairs" else None,
    )  # fmt: skip
    assert explained == call.plan


def test_a_cpu_converts_slab_by_slab() -> None:
    assert explain_plan(100, 16, 1000, operand_bytes=4, weight_bytes=2).weight_copy_bytes == 0
