"""Blocks: chunks whose D stays in the workspace until one product takes it. A GPU's schedule, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, LMHead, TokenLayout, fused_dpo_loss, linear_logprob
from fastdpo.ops import library
from fastdpo.plan import call as plan
from fastdpo.plan.plan import Plan
from fastdpo.testing import assert_close_to_fp64

TOKENS, HIDDEN, VOCAB = 3000, 16, 250
PAIRS = 12
HEAD = {"logit_scale": 0.9, "softcap": 5.0}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans of the calls that follow, as of a GPU whose blocks are two chunks where they are many."""
    seen: list[Plan] = []
    make_plan = library.make_plan
    whole = plan.chunk_and_block_rows

    def in_blocks(num_tokens: int, *sizes: int, **device: int) -> tuple[int, int]:
        rows, _ = whole(num_tokens, *sizes, **device)
        return (rows, rows) if rows == num_tokens else (512, 1024)

    def recorded(*args: object, **kwargs: object) -> Plan:
        seen.append(make_plan(*args, **kwargs))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(library, "num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(library, "make_plan", recorded)
    monkeypatch.setattr(plan, "chunk_and_block_rows", in_blocks)
    return seen


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, labels, torch.randn(TOKENS, generator=generator)


def step(
    mode: str,
    dtype: torch.dtype = torch.float32,
    *,
    outputs: tuple[str, ...] = (),
    topk: bool = False,
    workspace_mib: int = 1,
) -> list[Tensor]:
    """Log-probabilities, the top-k mass where asked for, and the gradients; 64 MiB hold all logits."""
    hidden, weight, labels, upstream = (t.to(dtype) if t.is_floating_point() else t for t in make_inputs())
    hidden.requires_grad_()
    weight.requires_grad_(mode != "stash")
    execution = Execution(mode=mode, workspace_mib=workspace_mib, cache_mib=1)  # type: ignore[arg-type]
    wanted = (*outputs, *(("topk_mass",) if topk else ()))
    out = linear_logprob(
        hidden, LMHead(weight, **HEAD), labels, outputs=wanted, execution=execution,
        entropy_requires_grad="entropy" in outputs,
    )  # fmt: skip
    loss = (out.logps * upstream).sum()
    for name in outputs:
        loss = loss + (getattr(out, name) * upstream.flip(0)).sum()
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    grads = torch.autograd.grad(loss, leaves)
    return [out.logps.detach(), *([out.topk_mass] if topk else []), *grads]


def plain(mode: str, **kwargs: object) -> tuple[list[Tensor], list[Tensor]]:
    """The truth in fp64, and fp32 in one chunk."""
    sizes = {"workspace_mib": 64, **kwargs}
    return step(mode, torch.float64, **sizes), step(mode, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["stash", "cache", "recompute"])
@pytest.mark.parametrize("outputs", [(), ("lse",)])
def test_gradients_of_blocks(plans: list[Plan], mode: str, outputs: tuple[str, ...]) -> None:
    logps, mass, *grads = step(mode, outputs=outputs, topk=True)
    plan = plans[-1]
    assert plan.block_rows >= 2 * plan.chunk_rows and len(plan.blocks()) > 1
    assert mode != "cache" or 0 < plan.cached_rows < TOKENS
    truth, eager = plain(mode, outputs=outputs, topk=True)
    torch.testing.assert_close(logps.double(), truth[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mass.double(), truth[1], atol=1e-5, rtol=0)
    for gradients in zip(grads, truth[2:], eager[2:], strict=True):
        assert_close_to_fp64(*gradients)


def test_gradients_of_blocks_with_an_entropy(plans: list[Plan]) -> None:
    _, *grads = step("recompute", outputs=("entropy",))
    assert plans[-1].block_rows >= 2 * plans[-1].chunk_rows
    truth, eager = plain("recompute", outputs=("entropy",))
    for gradients in zip(grads, truth[1:], eager[1:], strict=True):
        assert_close_to_fp64(*gradients)


@pytest.mark.usefixtures("plans")
def test_logits_are_the_same_bits_in_every_mode() -> None:
    hidden, weight, labels, _ = make_inputs()
    score = linear_logprob(hidden, LMHead(weight, **HEAD), labels, execution=Execution(workspace_mib=1)).logps
    for mode in ("stash", "cache", "recompute"):
        assert torch.equal(step(mode)[0], score)


@pytest.mark.parametrize("cache_mib", [1, 3])
def test_pairs_and_their_reference(plans: list[Plan], cache_mib: int) -> None:
    """Also where a pair is longer than a group, and with the reference scored beside a block in `stash`."""
    hidden, weight, labels, _ = make_inputs()
    lengths = [0] * (2 * PAIRS)  # one pair of 1300 tokens, and short ones
    lengths[0], lengths[PAIRS] = 900, 400
    for pair in range(1, PAIRS):
        lengths[pair], lengths[PAIRS + pair] = 54, 100
    lengths[-1] += TOKENS - sum(lengths)
    assert sum(lengths) == TOKENS and min(lengths) >= 0
    sequence = torch.repeat_interleave(torch.arange(2 * PAIRS), torch.tensor(lengths))
    layout = TokenLayout(torch.arange(TOKENS), labels, sequence, lengths)

    def grads(mode: str, dtype: torch.dtype, workspace_mib: int) -> tuple[Tensor, list[Tensor]]:
        h = hidden.to(dtype).requires_grad_()
        w = weight.to(dtype).requires_grad_(mode != "stash")
        execution = Execution(mode=mode, workspace_mib=workspace_mib, cache_mib=cache_mib)  # type: ignore[arg-type]
        out = fused_dpo_loss(
            h, LMHead(w, **HEAD), None, layout=layout, ref_hidden=hidden.to(dtype) * 0.9, execution=execution
        )
        leaves = [leaf for leaf in (h, w) if leaf.requires_grad]
        return out.loss.detach(), list(torch.autograd.grad(out.loss, leaves))

    truth, eager = (grads("recompute", dtype, 64) for dtype in (torch.float64, torch.float32))
    for mode in ("pairs", "stash"):
        plans.clear()
        loss, ours = grads(mode, torch.float32, 1)
        assert plans[0].mode == mode and plans[0].block_rows >= 2 * plans[0].chunk_rows
        if mode == "pairs":
            assert any(group.is_recomputed for group in plans[0].groups) == (cache_mib == 1)
        assert abs(loss.double() - truth[0]) < 1e-5
        for gradients in zip(ours, truth[1], eager[1], strict=False):
            assert_close_to_fp64(*gradients)


def test_exact_logits_of_labels_in_blocks_of_bf16_logits(plans: list[Plan]) -> None:
    """They are taken from the rows of the chunk at hand, wherever in the workspace its logits are."""
    hidden, weight, labels, _ = make_inputs()
    h, w = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    execution = Execution(mode="stash", workspace_mib=1, logits_dtype="bf16")
    logps = linear_logprob(h, w, labels, execution=execution).logps
    assert plans[-1].block_rows >= 2 * plans[-1].chunk_rows and len(plans[-1].blocks()) > 1
    exact = linear_logprob(h.detach().double(), w.double(), labels).logps
    # A label's logit of another row is off by several nats; bf16 moves a logsumexp by 2^-8 of its logits.
    assert (logps.double() - exact).abs().max() < 0.1
