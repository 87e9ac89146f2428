"""The sequence kernel on a CUDA device: launches, synchronisation, graphs, streams, and blocks that race.

What it computes is tested in ``tests/kernels/test_sequence.py``, on a GPU too where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.kernels.sequence import SigmoidOutputs, SigmoidTerms
from fastdpo.ops.backends import load_sequence_kernels, unavailable_reason
from fastdpo.ops.sequence import sequence_sums, sigmoid_pairs

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def backend_or_skip(name: str) -> str:
    reason = unavailable_reason(name, CUDA)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    return backend_or_skip(request.param)


@pytest.fixture(params=["triton", "cuda"])
def kernel(request: pytest.FixtureRequest) -> str:
    """Those that take one launch."""
    return backend_or_skip(request.param)


def make_batch(num_pairs: int, longest: int = 600) -> tuple[Tensor, Tensor]:
    """Log-probabilities and offsets of answers of random lengths, some of them empty."""
    lengths = torch.randint(0, longest, (2 * num_pairs,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return -torch.rand(int(offsets[-1]), device=CUDA), offsets.to(CUDA)


def is_same(a: SigmoidOutputs, b: SigmoidOutputs) -> bool:
    return all(map(torch.equal, a, b))


def test_one_launch(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other kernel, no copy, no memset: small batches are bound by launches."""
    monkeypatch.undo()  # the poison of uninitialised memory is a launch
    values, offsets = make_batch(9)
    outputs = SigmoidOutputs(
        torch.empty(18, device=CUDA), torch.empty((), device=CUDA, dtype=torch.float64), values.clone()
    )
    kernels, terms = load_sequence_kernels(kernel), SigmoidTerms(beta=0.1, divisor=9.0)
    calls = (
        lambda: kernels.sequence_sums(values, offsets, outputs.sums),
        lambda: kernels.sigmoid_pairs(values, offsets, terms, outputs),
    )
    for call in calls:
        call()  # compiles, and makes the counter
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        assert len(names) == 1, names


def test_no_synchronisation(backend: str) -> None:
    values, offsets = make_batch(9)
    weights, mask = torch.rand_like(values), torch.rand_like(values) < 0.8
    leaf = values.clone().requires_grad_()
    beta, divisor = torch.full((9,), 0.2, device=CUDA), torch.tensor(9, device=CUDA)
    numbers: dict[str, Any] = {"margin": 0.5, "label_smoothing": 0.1, "pair_weights": 2.0}

    def run() -> None:
        sums = sequence_sums(leaf, offsets, weights=weights, mask=mask, backend=backend)
        torch.autograd.grad(sums.sum(), leaf)
        sigmoid_pairs(
            values,
            offsets,
            divisor=divisor,
            beta=beta,
            weights=weights,
            mask=mask,
            backend=backend,
            **numbers,
        )

    run()  # a first call may compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_pairs", [1, 2, 132, 3000])
def test_the_same_bits_every_time(kernel: str, num_pairs: int) -> None:
    """Blocks finish in any order; the last one must see the loss of every other, and leave the counter 0."""
    values, offsets = make_batch(num_pairs, longest=60)
    first = sigmoid_pairs(values, offsets, divisor=float(num_pairs), backend=kernel)
    truth = sigmoid_pairs(values.double(), offsets, divisor=float(num_pairs), backend="reference")
    # The truth's sums are not rounded: half an ulp each of sums of up to 60 nats, times beta.
    assert abs(first.loss.double() - truth.loss) <= 1e-6 * (1 + truth.loss)
    for _ in range(200):
        assert is_same(sigmoid_pairs(values, offsets, divisor=float(num_pairs), backend=kernel), first)


def test_sums_agree_between_both_kernels(kernel: str) -> None:
    values, offsets = make_batch(40, longest=5000)
    weights, mask = torch.rand_like(values), torch.rand_like(values) < 0.8
    for tokens in ({}, {"weights": weights}, {"mask": mask}, {"weights": weights, "mask": mask}):
        alone = sequence_sums(values, offsets, backend=kernel, **tokens)
        assert torch.equal(sigmoid_pairs(values, offsets, divisor=1.0, backend=kernel, **tokens).sums, alone)


def test_a_graph_can_be_replayed(kernel: str) -> None:
    """With other numbers in the same memory, and while eager calls use the same stream."""
    values, offsets = make_batch(50)
    sigmoid_pairs(values, offsets, divisor=50.0, backend=kernel)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = sigmoid_pairs(values, offsets, divisor=50.0, backend=kernel)
    for seed in range(5):
        torch.manual_seed(seed)
        values.copy_(-torch.rand_like(values))
        graph.replay()
        assert is_same(captured, sigmoid_pairs(values, offsets, divisor=50.0, backend=kernel))


def test_streams_and_graphs_do_not_disturb_each_other(kernel: str) -> None:
    """Two streams, and two graphs captured on one stream and replayed on both, all at the same time."""
    batches = [make_batch(400, longest=80), make_batch(300, longest=90)]
    calls = [
        lambda values=values, offsets=offsets: sigmoid_pairs(values, offsets, divisor=1.0, backend=kernel)
        for values, offsets in batches
    ]
    wanted = [call() for call in calls]
    capturing = torch.cuda.Stream()
    graphs, captured = [torch.cuda.CUDAGraph() for _ in calls], []
    for graph, call in zip(graphs, calls, strict=True):
        with torch.cuda.graph(graph, stream=capturing):
            captured.append(call())
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[SigmoidOutputs]] = [[], []]
    for _ in range(50):
        for i, (stream, call, graph) in enumerate(zip(streams, calls, graphs, strict=True)):
            with torch.cuda.stream(stream):
                results[i].append(call())
                graph.replay()
    torch.cuda.synchronize()
    for want, ours, of_graph in zip(wanted, results, captured, strict=True):
        assert all(is_same(result, want) for result in ours) and is_same(of_graph, want)


def test_offsets_past_2_31(kernel: str) -> None:
    """Tokens of the last answers lie beyond what 32 bits address."""
    size = (1 << 31) + 5000
    if torch.cuda.mem_get_info()[0] < 22 * size // 2:
        pytest.skip("needs 22 GiB of free memory")
    values = torch.zeros(size, device=CUDA)
    values[-4000:] = -1.0
    offsets = torch.tensor([0, 10, 20, size - 4000, size], device=CUDA)
    results = sigmoid_pairs(values, offsets, divisor=1.0, backend=kernel)
    assert results.sums.tolist() == [0.0, 0.0, 0.0, -4000.0]
    assert results.g[-4000:].unique().numel() == 1 and results.g[-1] != results.g[-4001]
