"""The same numbers in fresh processes and with other threads, and nothing left after a thousand steps."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch

from fastdpo import Execution, fused_dpo_loss, linear_logprob
from tests import ROOT

BITS = """
import hashlib, sys
import torch
from fastdpo import Execution, fused_dpo_loss, linear_logprob
torch.set_num_threads(int(sys.argv[1]))
draw = torch.Generator().manual_seed(0)
hidden = torch.randn(4, 60, 48, generator=draw).to(torch.bfloat16).requires_grad_()
weight = torch.randn(3001, 48, generator=draw).to(torch.bfloat16).requires_grad_()
labels = torch.randint(3001, (4, 60), generator=draw)
labels[:, :7] = -100
digest = hashlib.sha256()
for mode in ("cache", "recompute", "pairs", "lean"):
    if mode == "pairs":
        out = fused_dpo_loss(
            hidden, weight, labels, ref_logps=torch.zeros(4), execution=Execution(mode=mode, workspace_mib=1))
        results = (out.loss,)
    else:
        execution = Execution(mode=mode, workspace_mib=1)
        results = (linear_logprob(hidden, weight, labels, execution=execution).logps,)
    grads = torch.autograd.grad(sum(r.sum() for r in results), (hidden, weight))
    for tensor in (*results, *grads):
        digest.update(tensor.detach().float().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.promise(39)
@pytest.mark.slow  # four processes
def test_fresh_processes_give_the_same_bits_with_one_thread_and_with_two() -> None:
    """To the bit, with the same threads: with others MKL may sum in another order."""
    found = {
        threads: {
            subprocess.run(
                [sys.executable, "-c", BITS, threads],
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads},
            ).stdout
            for _ in range(2)
        }
        for threads in ("1", "2")
    }
    assert all(len(hashes) == 1 for hashes in found.values()), found


@pytest.mark.promise(40)
@pytest.mark.slow  # a thousand steps
@pytest.mark.parametrize("mode", ["cache", "pairs"])
def test_a_thousand_steps_leave_nothing(mode: str) -> None:
    """No tensor waits for a collection, and after one Python has as many objects as before."""
    hidden = torch.randn(2, 6, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (2, 6))

    def steps(count: int) -> tuple[int, int]:
        for _ in range(count):
            if mode == "pairs":
                loss = fused_dpo_loss(
                    hidden, weight, labels, ref_logps=torch.zeros(2), execution=execution
                ).loss
            else:
                loss = linear_logprob(hidden, weight, labels, execution=execution).logps.sum()
            loss.backward()
            hidden.grad = weight.grad = None
        del loss
        # Before a collection: a tensor in a circle would lie there until one comes.
        tensors = sum(type(item) is torch.Tensor for item in gc.get_objects())
        gc.collect()
        return tensors, sys.getallocatedblocks()

    execution = Execution(mode=mode)
    gc.collect()
    gc.disable()
    try:
        steps(20)
        first, last = steps(20), steps(1000)
    finally:
        gc.enable()
    assert last[0] == first[0]
    assert last[1] - first[1] < 500  # half an object a step
