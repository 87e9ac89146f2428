"""``token_divergence`` and the top-k statistics on a CUDA device: numbers, bits, synchronisation, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdpo import Execution, linear_logprob, token_divergence
from fastdpo.definitions.logprob import linear_logprob_reference
from fastdpo.ops.backends import unavailable_reason
from fastdpo.testing import assert_logps_close, make_case
from fastdpo.types import TOPK_STATISTICS
from tests.ops.divergence_cases import (
    DIVERGENCES,
    HEADS,
    DivergenceCase,
    assert_divergence_right,
    make_divergence_case,
)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BACKENDS = ["triton", "reference"]


def on_cuda(head: str, dtype: torch.dtype, num_teachers: int = 1) -> DivergenceCase:
    return make_divergence_case(head, dtype, num_teachers=num_teachers, device="cuda")


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "outputs",
    [("forward_kl",), ("reverse_kl",), ("jsd",), DIVERGENCES, ("forward_kl", "logps", "ref_logps")],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences(backend: str, outputs: tuple[str, ...], dtype: torch.dtype, head: str) -> None:
    execution = Execution(workspace_mib=1, cache_mib=1, backend=backend)
    assert_divergence_right(on_cuda(head, dtype), outputs, execution)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_teachers(dtype: torch.dtype, backend: str) -> None:
    case = on_cuda("a cap on the policy", dtype, num_teachers=2)
    execution = Execution(workspace_mib=1, backend=backend)
    assert_divergence_right(case, ("reverse_kl", "l1_distance"), execution, value_factor=5.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outputs", [("forward_kl",), ("forward_kl", "logps", "ref_logps")], ids=str)
@pytest.mark.parametrize("needs_weight", [False, True])
def test_the_same_model_is_0_and_nothing_waits(
    needs_weight: bool, outputs: tuple[str, ...], backend: str
) -> None:
    """Values and gradients of equal streams, with the labelled positions given."""
    case = make_case(dtype=torch.bfloat16, softcap=20.0, has_bias=False, device="cuda")
    h, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(needs_weight)
    index = (case.labels != -100).flatten().nonzero()[:, 0]
    run = Execution(workspace_mib=1, backend=backend)
    settings: dict[str, Any] = {"token_index": index, "execution": run}

    def step() -> None:
        out = token_divergence(h, w, case.hidden, case.labels, outputs=outputs, **settings)
        assert out.forward_kl is not None
        out.forward_kl.sum().backward()
        results.append(out.forward_kl)
        if out.logps is not None and out.ref_logps is not None:
            results.append(out.logps - out.ref_logps)

    results: list[torch.Tensor] = []
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.count_nonzero() == 0 for value in results)
    assert h.grad is not None and h.grad.count_nonzero() == 0


@pytest.mark.parametrize("needs_weight", [False, True])
def test_memory(needs_weight: bool) -> None:
    """Beyond inputs and gradients: the workspace, the kept D W or D, and little else."""
    num_tokens, hidden_size, vocab = 2048, 256, 64000
    h, ref = torch.randn(2, num_tokens, hidden_size, device=CUDA, dtype=torch.bfloat16)
    w = torch.randn(vocab, hidden_size, device=CUDA, dtype=torch.bfloat16, requires_grad=needs_weight)
    h.requires_grad_()
    labels = torch.zeros(num_tokens, dtype=torch.long, device=CUDA)

    def step() -> None:
        out = token_divergence(h, w, ref, labels, execution=Execution(workspace_mib=64, cache_mib=32))
        assert out.forward_kl is not None
        out.forward_kl.sum().backward()

    step()
    h.grad = w.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    # dW and, of more than five groups, its fp32 sum
    gradients = h.numel() * 2 * 3 + (w.numel() * (2 + 4) if needs_weight else 0)
    assert peak < (64 + 32 + 16) * 2**20 + gradients


@pytest.mark.parametrize("mode", ["score", "stash", "cache"])
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("k", [1, 10, 1003])
def test_topk(k: int, backend: str, mode: str) -> None:
    if reason := unavailable_reason(backend, CUDA):
        pytest.skip(f"{backend}: {reason}")
    case = make_case(dtype=torch.bfloat16, softcap=25.0, temperature=0.8, device="cuda")
    hidden = case.hidden.clone().requires_grad_(mode != "score")
    weight = case.weight.clone().requires_grad_(mode == "cache")
    index = (case.labels != -100).flatten().nonzero()[:, 0]
    head = case.lm_head.__class__(weight, bias=case.bias, softcap=25.0, temperature=0.8)
    settings: dict[str, Any] = {
        "outputs": TOPK_STATISTICS,
        "topk": k,
        "token_index": index,
        "execution": Execution(mode=mode, backend=backend, workspace_mib=1),
    }
    linear_logprob(hidden, head, case.labels, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = linear_logprob(hidden, head, case.labels, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bias = None if case.bias is None else case.bias.double()
    truth = linear_logprob_reference(
        case.hidden.double(), case.weight.double(), case.labels, bias=bias, softcap=25.0, temperature=0.8,
        outputs=TOPK_STATISTICS, topk=k,
    )  # fmt: skip
    for name in TOPK_STATISTICS:
        assert_logps_close(
            getattr(out, name), getattr(truth, name), torch.bfloat16, hidden_size=64, name=name
        )


def test_topk_in_lean() -> None:
    """From fp32 operands, whose logits are stored; 16-bit ones go through a kernel that stores none."""
    if reason := unavailable_reason("triton", CUDA):
        pytest.skip(reason)
    case = make_case(dtype=torch.float32, device="cuda")
    settings: dict[str, Any] = {
        "outputs": TOPK_STATISTICS,
        "execution": Execution(mode="lean", workspace_mib=1),
    }
    out = linear_logprob(case.hidden, case.lm_head, case.labels, **settings)
    truth = linear_logprob_reference(
        case.hidden.double(), case.weight.double(), case.labels, outputs=TOPK_STATISTICS,
        bias=None if case.bias is None else case.bias.double(),
    )  # fmt: skip
    for name in TOPK_STATISTICS:
        assert_logps_close(getattr(out, name), getattr(truth, name), torch.float32, hidden_size=64, name=name)
    with pytest.raises(ValueError, match=r"top-k.*stores no logits"):
        linear_logprob(case.hidden.half(), case.weight.half(), case.labels, **settings)
