"""What a call must not do: copy large matrices, keep memory after a failure, drift over many tokens."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, TokenLayout, fused_dpo_loss, linear_logprob
from fastdpo.ops import gradients, library
from fastdpo.ops.head_call import LogitChunks
from fastdpo.ops.lean_slabs import SlabWorkspace
from fastdpo.plan import call as plan
from fastdpo.plan.modes import LEAN_STASH
from fastdpo.plan.plan import Plan
from fastdpo.testing import assert_close_to_fp64, emulated_results, fp64_results, same_sign_case
from tests.ops.meta_gpu import MODES as ALL_MODES
from tests.ops.meta_gpu import make_call, meta_gpu, run_call

__all__ = ["meta_gpu"]

HIDDEN, VOCAB, TOKENS = 16, 8192, 96
# A chunk holds 32 rows of logits, a group of D too.
SMALL = {"workspace_mib": 1, "cache_mib": 1}
MODES = ("score", "stash", "cache", "recompute", "pairs")  # those that store rows of logits


def make_step(
    mode: str, dtype: torch.dtype = torch.float32, vocab: int = VOCAB
) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass of 12 pairs of 4 and 4 tokens: the loss and its gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(vocab, HIDDEN, generator=generator).to(dtype)
    index = torch.arange(TOKENS)
    sequence = index // 4 % 2 * (TOKENS // 8) + index // 8
    labels = torch.randint(vocab, (TOKENS,), generator=generator)
    layout = TokenLayout(index, labels, sequence, (4,) * (TOKENS // 4))
    public = "lean" if mode == LEAN_STASH else mode
    execution = Execution(mode=public, **SMALL)  # type: ignore[arg-type]
    ref_logps = torch.full((TOKENS // 4,), -30.0)

    def step() -> tuple[Tensor, ...]:
        h = hidden.detach().requires_grad_(mode != "score")
        w = weight.detach().requires_grad_(mode not in ("score", "stash", LEAN_STASH))
        out = fused_dpo_loss(h, w, None, layout=layout, ref_logps=ref_logps, execution=execution)
        leaves = [leaf for leaf in (h, w) if leaf.requires_grad]
        return (out.loss.detach(), *(torch.autograd.grad(out.loss, leaves) if leaves else ()))

    return step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab", [VOCAB, VOCAB - 1])
def test_no_hidden_copy_or_zero_fill_of_a_large_matrix(
    mode: str, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of (C, V) and (V, H) matrices only products and row kernels write; seen by the profiler, op by op."""
    monkeypatch.undo()  # the poison of uninitialised memory is a fill
    step = make_step(mode, vocab=vocab)
    step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        step()
    large = 8 * VOCAB  # fewer elements than a chunk has, or than dweight
    names = ("copy_", "_to_copy", "clone", "cat", "fill_", "zero_", "mul", "mul_", "add", "add_")
    writers = {f"aten::{name}" for name in names}
    guilty = [
        (event.name, event.input_shapes)
        for event in profile.events()
        if event.name in writers
        and any(torch.Size(shape).numel() > large for shape in event.input_shapes if shape)
    ]
    assert not guilty
    assert any(event.name == "aten::mm" for event in profile.events())  # the profiler does see inside the op


@pytest.mark.promise(37)
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("index_kind", ["tokens", "repeated"])
@pytest.mark.parametrize("has_lse", [False, True])
@pytest.mark.usefixtures("meta_gpu")
def test_nothing_asks_for_a_value_of_the_device(mode: str, index_kind: str, has_lse: bool) -> None:
    """On meta tensors, which have none: ``.item()``, ``bool()``, ``.tolist()`` or a size by data raises."""
    is_frozen = mode in ("score", "stash", LEAN_STASH)
    needs = {"needs_weight": not is_frozen, "needs_hidden": mode != "score"}
    # Of lean three slabs of the vocabulary, whose logits are stored.
    vocab, workspace_mib = (20000, 24) if mode in ("lean", LEAN_STASH) else (5000, 8)
    call = make_call(
        mode, 3000, 64, vocab, index_kind=index_kind, workspace_mib=workspace_mib, cache_mib=8,
        pair_length=300, has_reference=True, **needs,
    )  # fmt: skip
    assert vocab == 5000 or vocab / 3 <= call.plan.score_slab < vocab
    run_call(call, has_lse=has_lse and mode != "pairs", statistics=("entropy",))


def test_meta_tensors_refuse_to_give_a_value() -> None:
    """What the test above rests on."""
    value = torch.ones((), device="meta")
    for ask in (
        value.item,
        value.tolist,
        lambda: bool(value),
        lambda: float(value),
        value.reshape(1).nonzero,
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.promise(42)
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("when", [0, 1, 2])
def test_out_of_memory_in_the_middle(monkeypatch: pytest.MonkeyPatch, mode: str, when: int) -> None:
    """It is raised, the next call is right to the last bit, and nothing of the failed one stays alive."""
    step = make_step(mode)
    expected = step()
    # What makes logits in a workspace: of chunks, or of slabs of the vocabulary.
    is_lean = mode in ("lean", LEAN_STASH)
    owner: Any = SlabWorkspace if is_lean else LogitChunks
    name = "logits" if is_lean else "fill"
    right = getattr(owner, name)
    seen: list[Any] = []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(seen) == when:
            seen.append(weakref.ref(self._logits))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        seen.append(None)
        return right(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        step()
    gc.collect()  # the traceback that pytest kept is a cycle
    assert seen[-1]() is None
    assert all(map(torch.equal, step(), expected))


@pytest.mark.parametrize("mode", ["cache", "recompute", "lean"])
def test_grad_weight_out_of_65536_tokens_does_not_drift(mode: str) -> None:
    """As the returned gradient: more than 5 groups are summed in fp32 and added to a bf16 tensor once."""
    case = same_sign_case(tokens=65536, vocab=96, hidden_size=16)
    truth, eager = fp64_results(case).dweight, emulated_results(case).dweight
    w = case.weight.clone().requires_grad_()
    out = torch.zeros_like(case.weight)
    execution = Execution(mode=mode, workspace_mib=1, cache_mib=1)  # type: ignore[arg-type]
    logps = linear_logprob(case.hidden, w, case.labels, execution=execution, grad_weight_out=out).logps
    logps.backward(case.upstream)
    assert w.grad is None and out.dtype == torch.bfloat16
    assert (out.double() - truth).norm() / truth.norm() < 2.2e-3  # one rounding: 1.7e-3
    assert_close_to_fp64(out, truth, eager)
    # What it held before is added to, by the same one rounding.
    before = out.clone()
    logps = linear_logprob(case.hidden, w, case.labels, execution=execution, grad_weight_out=out).logps
    logps.backward(case.upstream)
    assert (out.double() - before.double() - truth).norm() / truth.norm() < 4e-3  # roundings of 2 x dweight


@pytest.mark.parametrize("has_out", [False, True])
@pytest.mark.parametrize("num_groups", [2, 3, 4, 5])
def test_few_groups_summed_in_bf16(num_groups: int, has_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of one sign, where every partial sum is rounded at its largest: below the 3e-3 of NOTES."""
    case = same_sign_case(tokens=8192, vocab=96, hidden_size=16)
    monkeypatch.setattr(plan, "chunk_and_block_rows", lambda n, *sizes, **device: (-(-n // num_groups),) * 2)
    seen: list[Plan] = []
    make_plan = library.make_plan
    monkeypatch.setattr(library, "make_plan", lambda *a, **k: seen.append(make_plan(*a, **k)) or seen[-1])
    sums: list[torch.dtype] = []
    product = gradients.add_weight_grad
    monkeypatch.setattr(
        gradients,
        "add_weight_grad",
        lambda total, *a, **k: sums.append(total.dtype) or product(total, *a, **k),
    )
    w = case.weight.clone().requires_grad_()
    out = torch.zeros_like(case.weight) if has_out else None
    execution = Execution(mode="recompute")
    logps = linear_logprob(case.hidden, w, case.labels, execution=execution, grad_weight_out=out).logps
    logps.backward(case.upstream)
    assert seen[-1].weight_grad_groups == num_groups and sums == [torch.bfloat16] * num_groups
    truth = fp64_results(case).dweight
    ours = w.grad if out is None else out
    assert ours is not None
    assert (ours.double() - truth).norm() / truth.norm() < 3e-3
    assert_close_to_fp64(ours, truth, emulated_results(case).dweight)


@pytest.mark.promise(3)
@pytest.mark.parametrize("mode", ["cache", "recompute", "pairs"])
def test_weight_gradient_of_65536_tokens_does_not_drift(mode: str) -> None:
    """Products of one sign in bf16, of which a bf16 sum would lose half: within 3e-3 of fp64 all the same."""
    case = same_sign_case(tokens=65536, vocab=96, hidden_size=16)
    w = case.weight.clone().requires_grad_()
    execution = Execution(mode=mode, workspace_mib=1, cache_mib=1)
    if mode == "pairs":
        truth = _pairs_dweight(
            case.hidden.double(), case.weight.double().requires_grad_(), case.labels, Execution()
        )
        ours = _pairs_dweight(case.hidden, w, case.labels, execution)
        eager = truth.to(case.weight.dtype)
    else:
        truth, eager = fp64_results(case).dweight, emulated_results(case).dweight
        logps = linear_logprob(case.hidden, w, case.labels, execution=execution).logps
        (ours,) = torch.autograd.grad(logps, w, case.upstream)
    assert (ours.double() - truth).norm() / truth.norm() < 3e-3
    if mode != "pairs":
        assert_close_to_fp64(ours, truth, eager)


def _pairs_dweight(hidden: Tensor, weight: Tensor, labels: Tensor, execution: Execution) -> Tensor:
    """dweight of a loss that pushes every answer the same way: -logps of the chosen, no rejected tokens."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = labels.reshape(-1)
    num_pairs = 128
    index = torch.arange(len(targets))
    layout = TokenLayout(index, targets, index * num_pairs // len(targets))
    lengths = (*layout.sequence_ids.bincount(minlength=num_pairs).tolist(), *(0,) * num_pairs)
    layout = TokenLayout(index, targets, layout.sequence_ids, lengths)
    loss = fused_dpo_loss(rows, weight, None, layout=layout, loss_type="sft", execution=execution).loss
    return torch.autograd.grad(loss, weight)[0]
