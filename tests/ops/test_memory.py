"""Memory on the CPU, measured as the peak resident set of a process of its own, and counted by shape."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from fastdpo import Execution
from fastdpo.testing import make_case
from tests.ops.common import leaves, run_op

MEASURE = r"""
import json, re, sys, torch
from fastdpo import Execution, linear_logprob
from fastdpo.definitions.logprob import linear_logprob_reference
torch.set_num_threads(2)
path, num_tokens, vocab = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hidden = torch.randn(num_tokens, 16, requires_grad=True)
weight = torch.randn(vocab, 16, requires_grad=True)
labels = torch.randint(vocab, (num_tokens,))
execution = Execution(workspace_mib=16, cache_mib=16)
def step(tokens):
    if path == "fused":
        logps = linear_logprob(hidden[:tokens], weight, labels[:tokens], execution=execution).logps
    else:
        logps = (hidden[:tokens] @ weight.T).log_softmax(-1).gather(1, labels[:tokens, None])
    logps.sum().backward()
def peak_kib():  # not ru_maxrss: a child's starts at the peak of its parent
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
step(8)
before = peak_kib()
step(num_tokens)
print(json.dumps((peak_kib() - before) / 1024))
"""


def peak_growth_mib(path: str, num_tokens: int, vocab: int) -> float:
    """By how much a step raises the peak resident set over that of a tiny step, in MiB."""
    command = [sys.executable, "-c", MEASURE, path, str(num_tokens), str(vocab)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return float(json.loads(done.stdout))


@pytest.mark.promise(41)
@pytest.mark.slow  # three processes, and logits of 512 MiB twice
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """16 times the logits (32 MiB to 512 MiB in fp32) leave the fused peak within its two 16 MiB budgets."""
    small, large = peak_growth_mib("fused", 512, 16384), peak_growth_mib("fused", 4096, 32768)
    dense = peak_growth_mib("dense", 4096, 32768)
    logits_mib = 4096 * 32768 * 4 / 2**20
    assert dense > 1.9 * logits_mib  # the logits and their log-softmax: the measurement does see them
    # Workspace and cache, the outputs, and what allocators and BLAS keep for themselves.
    assert large < 32 + 48
    assert large - small < 48


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest single allocation during ``run()``, inside the op as well."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    records = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in records if event.name() == "[memory]")


@pytest.mark.parametrize("weight", [False, True])
def test_no_allocation_of_the_batchs_logits(weight: bool) -> None:
    case = make_case(batch=32, dtype=torch.float32, has_bias=False)
    h, w, _ = leaves(case, weight=weight)
    logits_bytes = int((case.labels != -100).sum()) * case.weight.shape[0] * 4

    def run(execution: Execution) -> None:
        run_op(case, h, w, None, execution).logps.backward(case.upstream)

    assert largest_allocation(lambda: run(Execution(workspace_mib=1, cache_mib=0))) <= 2**20
    # With room for all of them they are one allocation: what is counted is what happens.
    assert largest_allocation(lambda: run(Execution(workspace_mib=64, cache_mib=0))) >= logits_bytes


@pytest.mark.promise(29)
def test_a_frozen_weight_costs_no_gradient_memory() -> None:
    """Nothing of the weight's size is allocated when the head is frozen."""
    case = make_case(batch=2, length=16, hidden_size=64, vocab=5000, dtype=torch.float32, has_bias=False)
    sizes = {}
    for needs_weight in (False, True):
        h, w, _ = leaves(case, weight=needs_weight)
        logps = run_op(case, h, w, None).logps
        sizes[needs_weight] = largest_allocation(lambda logps=logps: logps.backward(case.upstream))
    assert sizes[True] >= case.weight.numel() * 4 > sizes[False]
