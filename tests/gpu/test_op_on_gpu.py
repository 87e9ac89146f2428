"""The op on a CUDA device: numbers, bits, memory, synchronisation and sizes past 2^31.

Run by ``make gpu`` and ``make test-gpu``; skipped, with the reason, where there is no GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, TokenLayout, fused_dpo_loss, linear_logprob
from fastdpo.definitions.logprob import linear_logprob_reference
from fastdpo.ops.backends import unavailable_reason
from fastdpo.ops.scaling import scaled
from fastdpo.testing import (
    assert_close_to_fp64,
    assert_logps_close,
    assert_results_close,
    emulated_results,
    fp64_results,
    make_case,
    same_sign_case,
)
from fastdpo.testing.accuracy import capability_of, gradient_bound, logps_bound
from tests.ops.common import leaves, op_results, run_op

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BACKENDS = ["reference", "triton", "cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = unavailable_reason(request.param, CUDA)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.mark.promise(1, 2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["cache", "cache_partly", "recompute", "lean"])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "logit_scale": 2.5, "temperature": 0.6}])
def test_numbers(backend: str, mode: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    case = make_case(dtype=dtype, vocab=4001, hidden_size=80, device=CUDA, **options)  # type: ignore[arg-type]
    cache = 2 if mode == "cache_partly" else 64
    execution = Execution(
        mode=mode.removesuffix("_partly"), workspace_mib=2, cache_mib=cache, backend=backend
    )
    assert_results_close(op_results(case, execution), case)


@pytest.mark.parametrize("vocab", [2, 1000, 32000, 50257, 128256, 262208])
@pytest.mark.parametrize("mode", ["auto", "lean"])
def test_vocabularies(backend: str, vocab: int, mode: str) -> None:
    case = make_case(batch=3, length=40, vocab=vocab, hidden_size=64, device=CUDA)
    assert_results_close(op_results(case, Execution(backend=backend, mode=mode)), case)


@pytest.mark.parametrize("workspace_mib", [8, 64])
def test_lean_takes_what_its_workspace_holds(workspace_mib: int) -> None:
    """In 16 bits: partial sums of 2048 entries and no logits in 8 MiB; in 64 slabs of them, and D W."""
    if (reason := unavailable_reason("triton", CUDA)) is not None:
        pytest.skip(reason)
    num_tokens, vocab, hidden_size = 8192, 128256, 512
    hidden = torch.randn(num_tokens, hidden_size, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, device=CUDA, dtype=torch.bfloat16)
    labels = torch.randint(vocab, (num_tokens,), device=CUDA)
    execution = Execution(backend="triton", mode="lean", workspace_mib=workspace_mib)

    def peak(requires_grad: bool) -> float:
        h = hidden.detach().requires_grad_(requires_grad)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps = linear_logprob(h, weight, labels, execution=execution).logps
        if requires_grad:
            logps.sum().backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    for requires_grad in (False, True):
        peak(requires_grad)
    assert peak(False) <= workspace_mib + 8
    dhidden = 6 * num_tokens * hidden_size / 2**20  # bf16, and its fp32 sum or the kept D W
    assert peak(True) <= workspace_mib + dhidden + 32


@pytest.mark.parametrize("workspace_mib", [8, 64])
def test_lean_policy_is_its_reference(workspace_mib: int, backend: str) -> None:
    """Scored, frozen and trained: one schedule, so the same bits; and D W by slabs meets the rule."""
    case = make_case(dtype=torch.bfloat16, vocab=40001, hidden_size=256, device=CUDA, has_bias=False)
    execution = Execution(backend=backend, mode="lean", workspace_mib=workspace_mib)
    with torch.no_grad():
        scored = run_op(case, case.hidden, case.weight, None, execution).logps
    h, w, _ = leaves(case, weight=False)
    frozen = run_op(case, h, w, None, execution).logps
    (dhidden,) = torch.autograd.grad(frozen, h, case.upstream)
    trained = op_results(case, execution)
    assert torch.equal(frozen, scored) and torch.equal(trained.logps, scored)
    truth, eager = fp64_results(case), emulated_results(case)
    rows = (-1, dhidden.shape[-1])
    assert_close_to_fp64(
        dhidden.reshape(rows), truth.dhidden.reshape(rows), eager.dhidden.reshape(rows), name="dhidden"
    )


def test_bf16_logits(backend: str) -> None:
    case = make_case(batch=16, vocab=4001, device=CUDA)
    ours = op_results(case, Execution(backend=backend, logits_dtype="bf16"))
    truth = fp64_results(case)
    # The rounding of the other logits to bf16 is what is left: a few 1e-3 nats rms (README, numerics).
    assert (ours.logps.double() - truth.logps).square().mean().sqrt() < 2e-2
    assert ours.logps.max() <= 0


def _step_with_an_index(backend: str, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """Log-probabilities and the gradients that a mode is for, with the labelled positions given."""
    case = make_case(dtype=torch.bfloat16, device=CUDA, has_bias=False)
    index = (case.labels != case.ignore_index).flatten().nonzero().squeeze(1)
    execution = Execution(mode=mode, backend=backend, workspace_mib=1)

    def step() -> tuple[Tensor, ...]:
        h, w, _ = leaves(case, hidden=mode != "score", weight=mode not in ("score", "stash"))
        logps = run_op(case, h, w, None, execution, token_index=index).logps
        wanted = [leaf for leaf in (h, w) if leaf.requires_grad]
        grads = torch.autograd.grad(logps, wanted, case.upstream) if wanted else ()
        return (logps.detach(), *grads)

    return step


INDEX_MODES = ["score", "stash", "cache", "recompute", "lean"]


@pytest.mark.promise(37)
@pytest.mark.parametrize("mode", INDEX_MODES)
def test_no_synchronisation_with_a_given_index(backend: str, mode: str) -> None:
    step = _step_with_an_index(backend, mode)
    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, expected, again))


@pytest.mark.promise(39)
def test_same_bits_in_every_mode_and_run(backend: str) -> None:
    case = make_case(vocab=32000, device=CUDA)
    with torch.no_grad():
        scored = run_op(case, *leaves(case), Execution(backend=backend, workspace_mib=8)).logps
    first = op_results(case, Execution(backend=backend, workspace_mib=8))
    assert torch.equal(first.logps, scored)
    side = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):
            torch.randn(2048, 2048, device=CUDA) @ torch.randn(2048, 2048, device=CUDA)
        again = op_results(case, Execution(backend=backend, workspace_mib=8))
        for one, two in zip(first, again, strict=True):
            assert one is not None and two is not None and torch.equal(one, two)


@pytest.mark.promise(3)
def test_weight_gradient_does_not_drift(backend: str) -> None:
    case = same_sign_case(tokens=65536, vocab=1024, hidden_size=64, device=CUDA)
    truth = fp64_results(case)
    for cache_mib in (0, 1024):
        ours = op_results(case, Execution(backend=backend, workspace_mib=16, cache_mib=cache_mib))
        error = (ours.dweight.double() - truth.dweight).norm() / truth.dweight.norm()
        assert error < 3e-3  # D, g h and dweight rounded to bf16 once each: 2e-3
        assert_close_to_fp64(ours.dweight, truth.dweight, emulated_results(case).dweight)


@pytest.mark.promise(41)
def test_peak_memory_is_the_budgets_and_the_gradients(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference backend holds several copies of a chunk")
    num_tokens, vocab, hidden_size = 8192, 128256, 512
    hidden = torch.randn(num_tokens, hidden_size, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab, (num_tokens,), device=CUDA)
    execution = Execution(backend=backend, workspace_mib=256, cache_mib=256)

    def step() -> None:
        linear_logprob(hidden, weight, labels, execution=execution).logps.sum().backward()
        hidden.grad = weight.grad = None

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    # More than 4 groups sum dweight in fp32, and it is cast once: 6 bytes an element.
    outputs = (6 * vocab * hidden_size + 2 * num_tokens * hidden_size) / 2**20
    assert peak <= 256 + 256 + outputs + 64


@pytest.mark.promise(14)
def test_more_than_2_31_logits_in_one_chunk(backend: str) -> None:
    """Row offsets past 2^31: the last rows of the chunk are the ones an int32 would put elsewhere."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    if backend == "reference":
        pytest.skip("the reference backend would need several times the chunk")
    num_tokens, vocab = 8320, 262208
    assert num_tokens * vocab > 2**31
    hidden = torch.randn(num_tokens, 64, device=CUDA, dtype=torch.bfloat16)
    weight = (torch.randn(vocab, 64, device=CUDA) * 0.3).bfloat16()
    labels = torch.randint(vocab, (num_tokens,), device=CUDA)
    whole = linear_logprob(hidden, weight, labels, execution=Execution(workspace_mib=10240, backend=backend))
    for rows in (slice(0, 64), slice(num_tokens - 64, num_tokens)):
        truth = linear_logprob_reference(hidden[rows].double(), weight.double(), labels[rows])
        assert_logps_close(whole.logps[rows], truth.logps, torch.bfloat16, hidden_size=64)


@pytest.mark.promise(42)
def test_out_of_memory_leaves_the_next_call_right(backend: str) -> None:
    case = make_case(device=CUDA)
    expected = op_results(case, Execution(backend=backend))
    before = torch.cuda.memory_allocated()
    huge = torch.zeros(1, 1, device=CUDA).expand(2**20, 1)
    weight, labels = torch.randn(1024, 1, device=CUDA), torch.zeros(2**20, dtype=torch.long, device=CUDA)
    # The limit is looked at where memory is asked of the device, so none may lie in the cache: 256 MiB are
    # left, and the logits of a chunk are 2 GiB or more.
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            execution = Execution(backend=backend, workspace_mib=4096)
            linear_logprob(huge, weight, labels, execution=execution)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del huge, weight, labels
    gc.collect()  # the frames of the error
    again = op_results(case, Execution(backend=backend))
    assert torch.equal(again.logps, expected.logps) and torch.equal(again.dweight, expected.dweight)
    del again
    assert torch.cuda.memory_allocated() <= before + expected.dweight.numel() * 8 + 2**20


@pytest.mark.promise(33)
def test_autocast(backend: str) -> None:
    case = make_case(dtype=torch.bfloat16, has_bias=False, device=CUDA)
    w = case.weight.float().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = linear_logprob(case.hidden, w, case.labels, execution=Execution(backend=backend))
    (dweight,) = torch.autograd.grad(out.logps, w, case.upstream)
    assert dweight.dtype == torch.float32
    assert_close_to_fp64(dweight.bfloat16(), fp64_results(case).dweight, emulated_results(case).dweight)


@pytest.mark.parametrize("mode", INDEX_MODES)
def test_a_step_can_be_captured_with_a_given_index(backend: str, mode: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch indexing synchronises")
    step = _step_with_an_index(backend, mode)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's own streams have to be warm before a capture
        for _ in range(2):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(map(torch.equal, expected, captured))


@pytest.mark.promise(43)
def test_a_second_device(backend: str) -> None:
    """Kernels run where their tensors are, whatever the current device is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make_case(device=CUDA)
    execution = Execution(backend=backend, workspace_mib=1)
    expected = op_results(case, execution)
    elsewhere = op_results(make_case(device=torch.device("cuda:1")), execution)
    assert torch.cuda.current_device() == 0
    for one, two in zip(expected, elsewhere, strict=True):
        assert one is None or torch.equal(one, two.to(CUDA))  # type: ignore[union-attr]


@pytest.mark.promise(14)
def test_a_head_of_more_than_2_31_weights(backend: str) -> None:
    """V x H past 2^31: the last rows of the head are the ones an int32 would take from elsewhere."""
    vocab, hidden_size, num_tokens = 262208, 8256, 256
    assert vocab * hidden_size > 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    generator = torch.Generator(CUDA).manual_seed(0)
    weight = torch.empty(vocab, hidden_size, device=CUDA, dtype=torch.bfloat16)
    weight.normal_(std=3 / hidden_size**0.5, generator=generator)
    hidden = torch.randn(num_tokens, hidden_size, device=CUDA, generator=generator).bfloat16()
    labels = torch.arange(vocab - num_tokens, vocab, device=CUDA)
    execution = Execution(backend=backend)
    with torch.no_grad():
        ours = linear_logprob(hidden, weight, labels, execution=execution).logps
    rows = slice(num_tokens - 8, num_tokens)
    logits = torch.cat([hidden[rows].double() @ part.double().T for part in weight.split(32768)], dim=1)
    truth = logits.log_softmax(1).gather(1, labels[rows, None]).squeeze(1)
    assert_logps_close(ours[rows], truth, torch.bfloat16, hidden_size=hidden_size)
    weight.requires_grad_()
    logps = linear_logprob(hidden, weight, labels, execution=execution).logps
    (dweight,) = torch.autograd.grad(logps.sum(), weight)
    # Each label is a row of its own at the head's end: there its token's state, less every token's share.
    probs = torch.cat([hidden.float() @ part.float().T for part in weight.detach().split(32768)], dim=1)
    probs = probs.softmax(1)[:, -num_tokens:]
    wanted = hidden.float() - probs.T @ hidden.float()
    allowed = gradient_bound(
        torch.bfloat16, hidden_size=hidden_size, vocab_size=vocab, num_tokens=num_tokens,
        capability=capability_of(CUDA),
    )  # fmt: skip
    assert (dweight[-num_tokens:].float() - wanted).norm() <= allowed * wanted.norm()


def test_tf32_is_as_good_as_is_said(backend: str) -> None:
    """Where torch allows it, products of fp32 are TF32's: within its bound, and by no more off than that."""
    torch.backends.cuda.matmul.allow_tf32 = True  # taken back by the fixture
    case = make_case(dtype=torch.float32, vocab=4096, hidden_size=512, has_bias=False, device=CUDA)
    ours, truth = op_results(case, Execution(backend=backend)), fp64_results(case)
    settings: dict[str, Any] = {"capability": capability_of(CUDA), "tf32": True}
    assert (ours.logps - truth.logps).abs().max() <= logps_bound(512, torch.float32, **settings)
    sizes = {"hidden_size": 512, "vocab_size": 4096, "num_tokens": case.labels.numel()}
    bound = gradient_bound(torch.float32, **sizes, **settings)
    for got, want in ((ours.dhidden, truth.dhidden), (ours.dweight, truth.dweight)):
        assert (got - want).norm() <= bound * want.norm()


def _pairs_step(backend: str, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """One pass of `fused_dpo_loss` on 24 pairs, in several chunks and groups, with a reference."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (48,), generator=generator).tolist()
    num_tokens, vocab, hidden_size = sum(lengths), 8192, 128
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).bfloat16().to(CUDA)
    weight = (torch.randn(vocab, hidden_size, generator=generator) * 3 / hidden_size**0.5).bfloat16().to(CUDA)
    targets = torch.randint(vocab, (num_tokens,), generator=generator).to(CUDA)
    sequence = torch.arange(48).repeat_interleave(torch.tensor(lengths)).to(CUDA)
    layout = TokenLayout(torch.arange(num_tokens, device=CUDA), targets, sequence, tuple(lengths))
    execution = Execution(mode=mode, backend=backend, workspace_mib=8, cache_mib=4)

    def step() -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        out = fused_dpo_loss(h, w, None, layout=layout, ref_hidden=hidden, execution=execution)
        return (out.loss.detach(), out.chosen_rewards, *torch.autograd.grad(out.loss, (h, w)))

    return step


@pytest.mark.promise(37)
@pytest.mark.parametrize("mode", ["cache", "pairs"])
def test_pairs_without_synchronisation(backend: str, mode: str) -> None:
    """With a layout that has its lengths, loss and gradients need nothing from the device; reward 0."""
    if backend == "reference":
        pytest.skip("plain torch indexing synchronises")
    step = _pairs_step(backend, mode)
    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, expected, again))
    assert expected[0].item() == torch.tensor(2.0).log().item() and not expected[1].any()


def test_pairs_equal_the_cache(backend: str) -> None:
    """The same loss, and gradients that differ by the roundings of dweight's groups."""
    loss, _, dhidden, dweight = _pairs_step(backend, "pairs")()
    want_loss, _, want_dhidden, want_dweight = _pairs_step(backend, "cache")()
    assert torch.equal(loss, want_loss)
    assert (dhidden.double() - want_dhidden.double()).norm() <= 2**-8 * want_dhidden.double().norm()
    assert (dweight.double() - want_dweight.double()).norm() <= 2**-7 * want_dweight.double().norm()


def test_a_whole_step_of_pairs_can_be_captured(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch indexing synchronises")
    step = _pairs_step(backend, "pairs")
    for _ in range(2):
        expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(map(torch.equal, expected, captured))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.125, 1 / 3])
def test_scaling_by_the_incoming_gradient(dtype: torch.dtype, factor: float) -> None:
    """Rounded once; by 1 the bits stay, and nothing waits for the device."""
    tensor = torch.randn(1000003, device=CUDA).to(dtype)
    wanted = (tensor.double() * torch.tensor(factor).double().item()).to(dtype)
    scale = torch.tensor(factor, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = scaled(tensor.clone(), scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result, wanted, rtol=torch.finfo(dtype).eps, atol=0)
    if factor == 1.0:
        assert torch.equal(result, tensor)
