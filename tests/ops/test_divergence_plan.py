"""What the plan of ``token_divergence`` says is what the op does: products, what is kept, and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution
from fastdpo.kernels import matmul
from fastdpo.ops import divergence_chunks, divergence_library, divergence_plan
from fastdpo.ops.token_divergence import plan_divergences
from fastdpo.plan.schedule import MIB
from tests.ops.divergence_cases import make_divergence_case, run_divergence, weighted
from tests.ops.meta_gpu import LiveBytes
from tests.ops.test_gemm_passes import count_passes

TDPO = ("forward_kl", "logps", "ref_logps")
# Vectors of N numbers, and what rounds sizes up.
SMALL_BYTES = 4 * MIB


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("outputs", [("forward_kl",), TDPO, ("forward_kl", "jsd")], ids=str)
@pytest.mark.parametrize(
    ("needs", "execution", "mode"),
    [
        ("", Execution(), "score"),
        ("h", Execution(workspace_mib=1), "stash"),
        ("hw", Execution(), "cache"),
        ("hw", Execution(workspace_mib=1, cache_mib=1), "cache"),
        ("w", Execution(workspace_mib=1, cache_mib=1), "cache"),
        ("hw", Execution(workspace_mib=1, cache_mib=0), "recompute"),
    ],
)
def test_products_are_as_planned(
    needs: str, execution: Execution, mode: str, outputs: tuple[str, ...], num_teachers: int
) -> None:
    case = make_divergence_case("plain", num_teachers=num_teachers, length=200)
    teachers = tuple(  # of one hidden size for all, so that each product counts as one
        replace(t, hidden=torch.randn_like(case.policy.hidden), weight=torch.randn_like(case.policy.weight))
        for t in case.teachers
    )
    case = replace(case, teachers=teachers)
    h = case.policy.hidden.clone().requires_grad_("h" in needs)
    w = case.policy.weight.clone().requires_grad_("w" in needs)
    num_tokens = int(case.scored.sum())
    planned = plan_divergences(
        h,
        replace(case.policy.lm_head, weight=w),
        [(teacher.hidden, teacher.lm_head) for teacher in teachers],
        num_tokens,
        outputs=outputs,
        execution=execution,
    )
    has_several = "jsd" in outputs and mode != "score"
    assert planned.mode == ("recompute" if has_several else mode)
    if planned.mode == "cache":
        assert (planned.cached_rows == num_tokens) == (execution.cache_mib > 1)
    made: list[Any] = []
    sizes = (num_tokens, *reversed(case.policy.weight.shape))

    def forward() -> None:
        made.append(run_divergence(case, h, w, None, outputs, execution))

    assert count_passes(forward, *sizes) == planned.gemm_passes_forward
    if needs:
        loss = weighted(case, made[0], outputs)
        assert count_passes(loss.backward, *sizes) == pytest.approx(planned.gemm_passes_backward, abs=1e-12)


@pytest.fixture
def meta_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``tests.ops.meta_gpu``, for what asks for the device's kind on the way of divergences."""
    monkeypatch.undo()  # the poison of uninitialised memory is an operation of its own
    for module in (divergence_library, divergence_plan):
        monkeypatch.setattr(module, "operand_dtype", lambda compute, logits, device: compute)
    monkeypatch.setattr(divergence_plan, "num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(
        matmul, "has_wide_sums", lambda out, operand: out.dtype == torch.float32 and operand.itemsize == 2
    )


RUNS = (
    ("", 1024, "score"),
    ("h", 1024, "stash"),
    ("hw", 1024, "cache"),
    ("hw", 0, "recompute"),
    ("w", 256, "cache"),
)


# With both outputs each run has one teacher and two, one after the other.
@pytest.mark.usefixtures("meta_gpu")
@pytest.mark.parametrize(
    ("run", "outputs", "num_teachers"),
    [
        (run, outputs, 1 + (i + j) % 2)
        for i, run in enumerate(RUNS)
        for j, outputs in enumerate((("forward_kl",), TDPO))
    ],
    ids=str,
)
def test_peak_of_a_real_head(run: tuple[str, int, str], outputs: tuple[str, ...], num_teachers: int) -> None:
    """A plan has a share of the workspace for what is made beside a tile's logits; not all of it is used."""
    needs, cache_mib, mode = run
    num_tokens, hidden_size, vocab_size = 2048, 4096, 128256  # a batch, and Llama-3's head

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    tokens = torch.empty(num_tokens, device="meta", dtype=torch.int64)
    scalars = (1.0, None, 1.0, torch.bfloat16)
    options = divergence_library.DivergenceOptions(
        ",".join(outputs), True, 0.5, 0.0, 0.0, mode, "auto", 512, cache_mib, *scalars, *scalars, *scalars
    )
    teachers: list[Any] = [empty(num_tokens, hidden_size), empty(vocab_size, hidden_size), None]
    teachers += teachers if num_teachers == 2 else [None] * 3
    coefficients = torch.empty(2, num_tokens, device="meta") if num_teachers == 2 else None
    wants = {"needs_hidden": "h" in needs, "needs_weight": "w" in needs, "needs_bias": False}
    call = divergence_library._divergence_call(
        empty(num_tokens, hidden_size), empty(vocab_size, hidden_size), None, tokens, tokens, "tokens",
        (*teachers, coefficients), options, **wants,
    )  # fmt: skip
    plan = call.policy.plan
    with LiveBytes() as live:
        found, kept = divergence_chunks.forward_divergences(call)
        if needs:
            grads = tuple(None if grad is None else torch.zeros_like(grad) for grad in found)[:4]
            result = divergence_chunks.backward_divergences(call, kept, grads, **wants)
            del result
    unused = plan.workspace_bytes / (num_teachers + 2)
    assert live.peak <= plan.peak_bytes + SMALL_BYTES
    assert live.peak + unused >= 0.97 * plan.peak_bytes
