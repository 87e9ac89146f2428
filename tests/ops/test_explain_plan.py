"""``explain_plan`` is what runs: its plan beside the one the op made, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, LMHead, TokenLayout, explain_plan, fused_dpo_loss, linear_logprob
from fastdpo.ops import library
from fastdpo.plan.plan import Plan
from fastdpo.types import BACKENDS, MODES
from tests.ops.meta_gpu import make_call, meta_gpu

__all__ = ["meta_gpu"]

TOKENS, HIDDEN, VOCAB = 96, 16, 4097
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    seen: list[Plan] = []
    make_plan = library.make_plan

    def recorded(*args: Any, **kwargs: Any) -> Plan:
        seen.append(make_plan(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(library, "make_plan", recorded)
    return seen


def explained(mode: str, dtype: torch.dtype, **kwargs: Any) -> Plan:
    """On a CPU, where 16-bit operands are upcast."""
    itemsize = dtype.itemsize
    sizes = {"workspace_mib": 1, "cache_mib": 1, **kwargs}
    return explain_plan(
        kwargs.pop("num_tokens", TOKENS), HIDDEN, sizes.pop("vocab", VOCAB), mode=mode,
        operand_bytes=max(itemsize, 4), logits_bytes=max(itemsize, 4), hidden_bytes=itemsize,
        weight_bytes=itemsize, **sizes,
    )  # fmt: skip


def make_inputs(dtype: torch.dtype, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(TOKENS, HIDDEN).to(dtype), torch.randn(vocab, HIDDEN).to(dtype)
    return hidden, weight, torch.randn(vocab).to(dtype), torch.randint(vocab, (TOKENS,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", ["h", "w", "b", "hw", "hwb", "hb"])
@pytest.mark.parametrize("mode", ["auto", "cache", "recompute", "lean"])
def test_gradients_of_linear_logprob(plans: list[Plan], mode: str, needs: str, dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = make_inputs(dtype)
    for name, leaf in zip("hwb", (hidden, weight, bias), strict=True):
        leaf.requires_grad_(name in needs)
    execution = Execution(mode=mode, workspace_mib=1, cache_mib=1)  # type: ignore[arg-type]
    linear_logprob(hidden, LMHead(weight, bias=bias), labels, execution=execution).logps.sum().backward()
    gradients = {
        "hidden_requires_grad": "h" in needs,
        "weight_requires_grad": "w" in needs,
        "bias_requires_grad": "b" in needs,
    }
    assert explained(mode, dtype, **gradients) == plans[-1]  # the backward pass's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(plans: list[Plan], dtype: torch.dtype) -> None:
    hidden, weight, _, labels = make_inputs(dtype)
    linear_logprob(hidden, weight, labels, execution=Execution(workspace_mib=1, cache_mib=1))
    assert explained("auto", dtype, hidden_requires_grad=False) == plans[-1]


@pytest.mark.parametrize("needs", [True, False])
def test_a_row_that_does_not_fit_is_lean_in_both(plans: list[Plan], needs: bool) -> None:
    hidden, weight, _, labels = make_inputs(torch.float32, 300_000)
    hidden.requires_grad_(needs)
    logps = linear_logprob(hidden, weight, labels, execution=Execution(workspace_mib=1)).logps
    if needs:
        logps.sum().backward()
    plan = explain_plan(TOKENS, HIDDEN, 300_000, operand_bytes=4, hidden_requires_grad=needs, workspace_mib=1)
    assert plan.mode == "lean"
    ours = plans[-1]
    assert (plan.mode, plan.chunk_rows, plan.leading_dim) == (ours.mode, ours.chunk_rows, ours.leading_dim)
    assert plan.workspace_bytes == ours.workspace_bytes and (not needs or plan == ours)


@pytest.mark.parametrize("cache_mib", [1, 4])
def test_pairs(plans: list[Plan], cache_mib: int) -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    index = torch.arange(TOKENS)
    layout = TokenLayout(index, labels, index // 4 % 2 * (TOKENS // 8) + index // 8, (4,) * (TOKENS // 4))
    fused_dpo_loss(
        hidden.requires_grad_(), weight.requires_grad_(), None, layout=layout,
        ref_logps=torch.zeros(TOKENS // 4), execution=Execution(workspace_mib=1, cache_mib=cache_mib),
    ).loss.backward()  # fmt: skip
    lengths = [8] * (TOKENS // 8)
    assert plans[0].mode == "pairs"
    wanted = explained(
        "auto", torch.float32, weight_requires_grad=True, pair_lengths=lengths, cache_mib=cache_mib
    )
    assert wanted == plans[0]


def test_a_mode_or_backend_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name, known in (("mode", MODES), ("backend", BACKENDS)):
        options: dict[str, Any] = {name: "xx"}
        with pytest.raises(ValueError, match=f"{name}: got 'xx', wanted one of {', '.join(known)}"):
            explain_plan(TOKENS, HIDDEN, VOCAB, **options)
    assert capsys.readouterr().out == ""


def test_lean_takes_no_bf16_logits() -> None:
    with pytest.raises(ValueError, match="logits_bytes: got 2 with mode 'lean'"):
        explain_plan(4, 4, 300_000, logits_bytes=2, mode="lean")
    with pytest.raises(ValueError, match=r"logits_dtype.*lean"):
        linear_logprob(
            torch.randn(4, 4).bfloat16(), torch.randn(9, 4).bfloat16(), torch.zeros(4, dtype=torch.int64),
            execution=Execution(mode="lean", logits_dtype="bf16"),
        )  # fmt: skip


@pytest.mark.usefixtures("meta_gpu")
@pytest.mark.parametrize("mode", ["stash", "cache", "recompute", "pairs", "lean"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_on_a_gpu(mode: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its chunks and blocks, and with its kernels or without in mode `lean`."""
    monkeypatch.setattr(library, "resolve_backend", lambda *args: backend)
    sizes = (16384, 4096, 128256)
    weight = mode != "stash"
    call = make_call(mode, *sizes, needs_weight=weight, needs_hidden=True, workspace_mib=64)
    lengths = [512] * 32 if mode == "pairs" else None
    plan = explain_plan(
        *sizes, mode=mode, backend="auto" if backend == "triton" else backend, weight_requires_grad=weight,
        pair_lengths=lengths, workspace_mib=64, num_multiprocessors=132,
    )  # fmt: skip
    assert plan == call.plan
