"""LoRA on the head: the logits of W + s B A, values and gradients, without that sum and without logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, LMHead, TokenLayout, fused_dpo_loss, fused_preference_loss, linear_logprob
from fastdpo.ops.checks import as_head
from fastdpo.ops.library import INDEX_KINDS, PER_TOKEN
from fastdpo.testing import Case, assert_close_to_fp64, assert_logps_close, make_case
from fastdpo.types import TOKEN_STATISTICS
from tests.ops.adapter_cases import RANK, SCALE, Operands, dense, head_of, operands
from tests.ops.common import backend_or_skip
from tests.ops.test_gemm_passes import count_passes
from tests.ops.test_memory import largest_allocation


def objective(out: Any, case: Case, *, lse: bool, entropy: bool) -> Tensor:
    upstream = case.upstream.to(out.logps.dtype)
    total = (out.logps * upstream).sum()
    if lse:
        total = total + (out.lse * upstream.flip(0)).sum()
    return total + 0.3 * (out.entropy * upstream.flip(1)).sum() if entropy else total


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["cache", "lse", "recompute", "entropy"])
def test_numbers(dtype: torch.dtype, adapter_dtype: torch.dtype, how: str, backend: str) -> None:
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("the CPU kernels have no float64")
    backend_or_skip(backend)
    case = make_case(dtype=dtype)
    tensors = operands(case, adapter_dtype)
    uses = {"lse": how != "cache", "entropy": how == "entropy"}
    statistics = ("lse", "entropy")
    execution = Execution(
        mode="recompute" if how == "recompute" else "auto", backend=backend, workspace_mib=1
    )
    out = linear_logprob(
        tensors.hidden,
        head_of(case, tensors),
        case.labels,
        ignore_index=case.ignore_index,
        outputs=statistics,
        entropy_requires_grad=uses["entropy"],
        execution=execution,
    )
    ours = torch.autograd.grad(objective(out, case, **uses), tensors.tensors)
    wide, narrow = tensors.to(torch.float64), tensors.to(dtype)
    truth_out, eager_out = dense(case, wide, statistics), dense(case, narrow, statistics)
    assert_logps_close(out.logps, truth_out.logps.detach(), dtype, hidden_size=case.hidden.shape[-1])
    truth = torch.autograd.grad(objective(truth_out, case, **uses), wide.tensors)
    eager = torch.autograd.grad(objective(eager_out, case, **uses), narrow.tensors)
    names = ["hidden", "weight", "bias", "lora_a", "lora_b"]
    if tensors.bias is None:
        names.remove("bias")
    for name, mine, exact, plain in zip(names, ours, truth, eager, strict=True):
        if dtype == torch.float64:  # eager is the truth itself, so there is no unit to measure in
            assert (mine - exact).norm() <= 1e-13 * exact.norm(), name
            continue
        rows = (-1, mine.shape[-1]) if mine.dim() > 1 else (-1,)
        assert_close_to_fp64(
            mine.reshape(rows), exact.reshape(rows), plain.to(mine.dtype).reshape(rows), name=name
        )


def run(case: Case, tensors: Operands, execution: Execution | None = None, **options: Any) -> list[Tensor]:
    """The log-probabilities and the gradients."""
    out = linear_logprob(
        tensors.hidden,
        head_of(case, tensors),
        case.labels,
        ignore_index=case.ignore_index,
        execution=execution,
        **options,
    )
    return [out.logps, *torch.autograd.grad((out.logps * case.upstream).sum(), tensors.tensors)]


def test_every_way_to_give_the_tokens_is_the_same() -> None:
    case = make_case(dtype=torch.float32)
    tensors = operands(case)
    found = run(case, tensors)
    index = (case.labels.flatten() != case.ignore_index).nonzero().squeeze(1)
    given = run(case, tensors, token_index=index)
    assert all(torch.equal(x, y) for x, y in zip(found, given, strict=True))
    layout = TokenLayout(index, case.labels.flatten()[index], torch.zeros_like(index))
    out = linear_logprob(tensors.hidden, head_of(case, tensors), layout)
    assert torch.equal(out.logps, found[0].flatten()[index])


def test_a_row_that_predicts_two_tokens_gets_both_gradients() -> None:
    case = make_case(dtype=torch.float32)
    tensors = operands(case)
    twice = TokenLayout(torch.tensor([3, 3, 4]), torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.long))
    head = head_of(case, tensors)
    whole = torch.autograd.grad(linear_logprob(tensors.hidden, head, twice).logps.sum(), tensors.tensors)
    parts = []
    for row, target in ((3, 1), (3, 2), (4, 3)):
        one = TokenLayout(torch.tensor([row]), torch.tensor([target]), torch.tensor([0]))
        total = linear_logprob(tensors.hidden, head, one).logps.sum()
        parts.append(torch.autograd.grad(total, tensors.tensors))
    for mine, *single in zip(whole, *parts, strict=True):
        torch.testing.assert_close(mine, sum(single), rtol=1e-5, atol=1e-5)


def test_modes_and_calls_give_the_same_bits() -> None:
    case = make_case(dtype=torch.float32)
    tensors = operands(case)
    kept = run(case, tensors, Execution(workspace_mib=1))
    again = run(case, tensors, Execution(workspace_mib=1))
    assert all(torch.equal(x, y) for x, y in zip(kept, again, strict=True))
    recomputed = run(case, tensors, Execution(mode="recompute", workspace_mib=1))
    assert torch.equal(kept[0], recomputed[0])
    with torch.no_grad():
        scored = linear_logprob(tensors.hidden, head_of(case, tensors), case.labels)
    assert torch.equal(kept[0], scored.logps)


def test_an_adapter_of_zeros_changes_no_bit() -> None:
    case = make_case(dtype=torch.bfloat16)
    tensors = operands(case, torch.float32)
    tensors.lora_b.data.zero_()
    plain = linear_logprob(tensors.hidden, replace(head_of(case, tensors), adapter=None), case.labels)
    adapted = linear_logprob(tensors.hidden, head_of(case, tensors), case.labels)
    assert torch.equal(plain.logps, adapted.logps)


@pytest.mark.parametrize(
    ("trained", "cache_mib", "passes"),
    [("adapter", 64, 2), ("adapter", 0, 3), ("adapter and weight", 64, 3), ("nothing", 64, 1)],
)
def test_passes(trained: str, cache_mib: int, passes: int) -> None:
    """A product of rank r is r / H of a pass, for the logits, du and dB; u is made of all rows."""
    case = make_case(dtype=torch.float32, has_bias=False)
    tensors = operands(case)
    tensors.weight.requires_grad_(trained == "adapter and weight")
    if trained == "nothing":
        tensors = Operands(*(None if t is None else t.detach() for t in tensors))
    num_tokens = int((case.labels != case.ignore_index).sum())
    vocab, hidden_size = case.weight.shape

    def step() -> None:
        out = linear_logprob(
            tensors.hidden,
            head_of(case, tensors),
            case.labels,
            execution=Execution(cache_mib=cache_mib, workspace_mib=1),
        )
        if trained != "nothing":
            out.logps.backward(case.upstream)

    narrow = (1 if trained == "nothing" else 3 + (cache_mib == 0)) * RANK / hidden_size
    products_of_u = (1 if trained == "nothing" else 3) * RANK * case.labels.numel() / (num_tokens * vocab)
    counted = count_passes(step, num_tokens, hidden_size, vocab)
    assert counted == pytest.approx(passes + narrow + products_of_u, rel=1e-12)


def test_nothing_of_the_weights_size_is_allocated() -> None:
    case = make_case(batch=2, length=16, hidden_size=64, vocab=5000, dtype=torch.float32, has_bias=False)
    tensors = operands(case)
    tensors.weight.requires_grad_(False)
    trained = [t for t in tensors.tensors if t.requires_grad]
    execution = Execution(workspace_mib=1, cache_mib=0)

    def fused() -> None:
        out = linear_logprob(tensors.hidden, head_of(case, tensors), case.labels, execution=execution)
        torch.autograd.grad(out.logps, trained, case.upstream)

    def merged() -> None:
        torch.autograd.grad(dense(case, tensors).logps, trained, case.upstream)

    weight_bytes = case.weight.numel() * 4
    assert largest_allocation(merged) >= weight_bytes > 2**20 >= largest_allocation(fused)


def test_autocast_rounds_the_adapter_as_it_rounds_the_weight() -> None:
    case = make_case(dtype=torch.float32, has_bias=False)
    tensors = operands(case)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_logprob(tensors.hidden, head_of(case, tensors), case.labels)
    grads = torch.autograd.grad(cast.logps, tensors.tensors, case.upstream)
    assert {grad.dtype for grad in grads} == {torch.float32}
    low = tensors.to(torch.bfloat16)
    rounded = linear_logprob(low.hidden, head_of(case, low), case.labels)
    assert torch.equal(cast.logps, rounded.logps)
    for name, mine, theirs in zip(
        ("hidden", "weight", "lora_a", "lora_b"),
        grads,
        torch.autograd.grad(rounded.logps, low.tensors, case.upstream),
        strict=True,
    ):  # the same up to the rounding of results that autocast keeps in fp32
        assert (mine - theirs.float()).norm() <= 2**-8 * mine.norm(), name


@pytest.mark.parametrize("compute", [torch.float64, torch.bfloat16], ids=str)
def test_compute_dtype(compute: torch.dtype) -> None:
    case = make_case(dtype=torch.float32, has_bias=False)
    tensors = operands(case)
    out = linear_logprob(
        tensors.hidden, head_of(case, tensors), case.labels, execution=Execution(compute_dtype=compute)
    )
    same = tensors.to(compute)
    assert torch.equal(out.logps, linear_logprob(same.hidden, head_of(case, same), case.labels).logps)


def test_dropout_drops_entries_on_their_way_into_the_adapter_only() -> None:
    case = make_case(dtype=torch.float64, has_bias=False)
    tensors = operands(case)
    torch.manual_seed(1)
    out = linear_logprob(tensors.hidden, head_of(case, tensors, 0.5), case.labels)
    ours = torch.autograd.grad(out.logps, tensors.tensors, case.upstream.double())
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(tensors.hidden.detach(), 0.5) != 0
    wide = tensors.to(torch.float64)
    low = (wide.hidden * kept * 2) @ wide.lora_a.T @ wide.lora_b.T
    logits = case.logit_scale * (wide.hidden @ wide.weight.T + SCALE * low)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    log_p = (logits / case.temperature).log_softmax(-1)
    scored = case.labels != case.ignore_index
    logps = log_p.gather(-1, case.labels.clamp(min=0)[..., None])[..., 0] * scored
    truth = torch.autograd.grad(logps, wide.tensors, case.upstream.double())
    assert torch.allclose(out.logps, logps, rtol=0, atol=1e-12)
    for mine, exact in zip(ours, truth, strict=True):
        assert (mine - exact).norm() <= 1e-12 * exact.norm()


def test_the_most_likely_tokens_are_those_of_the_adapted_head() -> None:
    case = make_case(dtype=torch.float64, has_bias=False)
    tensors = operands(case)
    outputs = ("topk_mass", "topk_entropy")
    adapted = LMHead(tensors.weight, adapter=(tensors.lora_a, tensors.lora_b, SCALE))
    merged = tensors.weight + SCALE * tensors.lora_b @ tensors.lora_a
    ours, plain, bare = (
        linear_logprob(tensors.hidden, head, case.labels, outputs=outputs, topk=3)
        for head in (adapted, merged, tensors.weight)
    )
    for name in outputs:
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-10, atol=1e-12)
        assert not torch.allclose(getattr(ours, name), getattr(bare, name), rtol=1e-3)


def test_nothing_labelled_gives_zeros() -> None:
    case = make_case(dtype=torch.float32)
    case = replace(case, labels=torch.full_like(case.labels, case.ignore_index))
    assert not any(value.any() for value in run(case, operands(case)))


# Every kind and every mode twice; tests/ops/test_library.py has their pairs, of the code that both ops share.
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, "cache") for kind in INDEX_KINDS),
        *(("given", "score"), ("tokens", "score"), ("found", "recompute"), ("repeated", "recompute")),
    ],
)
def test_opcheck(kind: str, mode: str) -> None:
    case = make_case(batch=2, length=12, hidden_size=8, vocab=20, dtype=torch.float32)
    tensors = operands(case)
    if mode == "score":
        tensors = Operands(*(None if t is None else t.detach() for t in tensors))
    labels = case.labels.flatten()
    index = None if kind == "found" else (labels != -100).nonzero().squeeze(1)
    if index is not None and kind in PER_TOKEN:
        labels = labels[index]
    states = torch.randn(case.labels.numel(), RANK, requires_grad=mode != "score")
    hidden = tensors.hidden.detach().flatten(0, 1).requires_grad_(mode != "score")
    args = (
        hidden, tensors.weight, tensors.bias, states, tensors.lora_b, labels, index, kind, torch.float32,
        -100, ",".join(TOKEN_STATISTICS), 3, False, False,
        0.7, 5.0, 1.3, mode, "auto", torch.float32, torch.float32, 1, 64,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastdpo.adapted_logprob.default, args)


def test_compile_without_a_graph_break() -> None:
    torch._dynamo.reset()
    case = make_case(dtype=torch.float32, has_bias=False)
    tensors = operands(case)

    def loss(h: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (linear_logprob(h, LMHead(w, adapter=(a, b, SCALE)), case.labels).logps * case.upstream).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*tensors.tensors), tensors.tensors) for f in (loss, compiled)]
    torch._dynamo.reset()
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_second_derivative_raises() -> None:
    case = make_case(dtype=torch.float32)
    tensors = operands(case)
    out = linear_logprob(tensors.hidden, head_of(case, tensors), case.labels)
    (first,) = torch.autograd.grad(out.logps.sum(), tensors.lora_b, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), tensors.hidden)


def test_the_pair_loss_takes_an_adapter() -> None:
    case = make_case(batch=4, dtype=torch.float32, has_bias=False)
    tensors = operands(case)
    head = head_of(case, tensors)
    plain = replace(head, adapter=None)
    with pytest.raises(ValueError, match="ref_lm_head: got None with an adapter on lm_head"):
        fused_dpo_loss(tensors.hidden, head, case.labels, ref_hidden=case.hidden)
    with pytest.raises(ValueError, match="ref_lm_head: got None with an adapter on lm_head"):
        fused_preference_loss(
            tensors.hidden,
            head,
            case.labels,
            ref_hidden=case.hidden,
            loss_type="bco",
            is_desirable=torch.tensor([True, False, True, False]),
            reward_shift=torch.zeros(()),
        )
    out = fused_dpo_loss(tensors.hidden, head, case.labels, ref_hidden=case.hidden, ref_lm_head=plain)
    ours = torch.autograd.grad(out.loss, tensors.tensors)
    wide = tensors.to(torch.float64)
    merged = LMHead(
        wide.weight + SCALE * wide.lora_b @ wide.lora_a,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=head.temperature,
    )
    unmerged = replace(merged, weight=wide.weight.detach())
    truth = fused_dpo_loss(
        wide.hidden, merged, case.labels, ref_hidden=case.hidden.double(), ref_lm_head=unmerged
    )
    exact = torch.autograd.grad(truth.loss, wide.tensors)
    assert out.loss.item() == pytest.approx(truth.loss.item(), abs=1e-5)
    for mine, want in zip(ours, exact, strict=True):
        assert (mine - want).norm() <= 2**-13 * want.norm()


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        (Execution(mode="stash"), "execution.mode.*with an adapter"),
        (Execution(mode="lean"), "execution.mode.*with an adapter"),
        (Execution(mode="pairs"), "execution.mode.*with an adapter"),
        (Execution(mode="score"), "no backward pass"),
        (Execution(logits_dtype="bf16"), "logits_dtype.*with an adapter"),
    ],
)
def test_what_is_not_supported_says_so(execution: Execution, message: str) -> None:
    case = make_case(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        run(case, operands(case), execution)


def test_who_does_not_compute_an_adapter_refuses_it() -> None:
    case = make_case(dtype=torch.float32)
    with pytest.raises(ValueError, match="lm_head.adapter: LoRA on the head is not supported here"):
        as_head(head_of(case, operands(case)))


def test_a_gradient_buffer_and_a_workspace_without_a_row_are_refused() -> None:
    case = make_case(dtype=torch.float32)
    tensors = operands(case)
    with pytest.raises(ValueError, match="grad_weight_out.*with an adapter"):
        run(case, tensors, grad_weight_out=torch.zeros_like(case.weight))
    vocab = 2**18 + 1  # a row of logits of more than 1 MiB
    weight, lora_b = torch.zeros(vocab, 2), torch.zeros(vocab, 1)
    head = LMHead(weight, adapter=(torch.zeros(1, 2), lora_b, 1.0))
    with pytest.raises(ValueError, match="workspace_mib.*lean"):
        linear_logprob(
            torch.zeros(1, 2), head, torch.zeros(1, dtype=torch.long), execution=Execution(workspace_mib=1)
        )
    with pytest.raises(ValueError, match="labels"):
        bad = replace(case, labels=case.labels + case.weight.shape[0])
        run(bad, tensors, check_labels=True)
