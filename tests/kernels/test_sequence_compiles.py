"""What the compilers make of the sequence kernels: spills, registers, the order of sums, the ticket."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.compiled import ARCHITECTURES, CompiledKernel
from tests.kernels.test_cuda_compiles import CUDA_ARCHITECTURES

# Ten seconds for each architecture and for the machine code of the extension, which `test_triton_compiles.py`
# and `test_cuda_compiles.py` have something quick of.
pytestmark = pytest.mark.slow

REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_BLOCK = 48 * 1024  # what every GPU gives without asking
# kTeamThreads and kPairThreads of csrc/cuda/sequence.cuh
CUDA_THREADS = {"sequence_sums_kernel": 256, "sigmoid_pairs_kernel": 512}

Kernels = dict[str, CompiledKernel]


@pytest.fixture(params=CUDA_ARCHITECTURES)
def cuda(request: pytest.FixtureRequest, compiled: Callable[[str, str], Kernels]) -> Kernels:
    found = compiled("library", request.param)
    return {name: kernel for name, kernel in found.items() if kernel.family == "sequence"}


def test_cuda_spills_nothing_and_fills_a_multiprocessor(cuda: Kernels) -> None:
    assert cuda.keys() == CUDA_THREADS.keys()
    for name, threads in CUDA_THREADS.items():
        kernel = cuda[name]
        assert kernel.spilled_bytes == 0 and kernel.count(r"(LDL|STL)(\..*)?") == 0, name
        # A thousand threads hide the latency of the loads: most answers are only a few tokens a thread.
        granted = -(-kernel.registers // 8) * 8
        assert REGISTERS_PER_SM // (granted * threads) * threads >= 1024, (name, kernel.registers)


def test_cuda_takes_one_ticket_and_reads_losses_past_l1(cuda: Kernels) -> None:
    for name, kernel in cuda.items():
        is_pairs = name == "sigmoid_pairs_kernel"
        atomics = {key: number for key, number in kernel.instructions.items() if key.startswith("ATOM")}
        assert sum(atomics.values()) == is_pairs and all("INC" in key for key in atomics), atomics
        assert kernel.count(r"RED\b(?!UX).*") == 0, name
        assert kernel.count(r"MEMBAR\..*GPU") == 2 * is_pairs, name
        assert bool(kernel.count(r"LDG\.E\.64\.STRONG\.GPU")) == is_pairs, name


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def triton(request: pytest.FixtureRequest, compiled: Callable[[str, str], Kernels]) -> Kernels:
    return compiled("sequence", f"sm_{request.param}")


def test_triton_spills_nothing_and_fills_a_multiprocessor(triton: Kernels) -> None:
    for name, kernel in triton.items():
        assert kernel.spilled_bytes == 0 and kernel.count(r"(LDL|STL)\b.*") == 0, name
        granted = -(-kernel.registers // 8) * 8
        assert REGISTERS_PER_SM // (granted * kernel.threads) * kernel.threads >= 1024, (
            name,
            kernel.registers,
        )
        assert kernel.shared_bytes <= SHARED_BYTES_PER_BLOCK, name


@pytest.mark.promise(17)
def test_triton_compiles_once_for_batches_of_every_size(triton: Kernels) -> None:
    for name, kernel in triton.items():
        assert kernel.facts["kernels"] == 1, name


def test_triton_adds_in_one_order_with_and_without_a_loss(triton: Kernels) -> None:
    """Layouts decide which thread adds what; equal ones give the sums of both kernels the same bits."""
    layouts = {name: kernel.facts["reductions"] for name, kernel in triton.items()}
    assert all(len(each) == 1 for each in layouts.values()), layouts
    assert len({each[0] for each in layouts.values()}) == 1, layouts


def test_triton_takes_one_ticket_that_orders_memory(triton: Kernels) -> None:
    """What a program wrote before its ticket, the last one reads, past L1."""
    for name, kernel in triton.items():
        is_pairs, tickets = "pairs" in name, kernel.facts["tickets"]
        assert len(tickets) == is_pairs, (name, tickets)
        assert all(".gpu.acq_rel.add" in ticket for ticket in tickets), tickets
        assert bool(kernel.count(r"LDG\.E\.64\.STRONG\.GPU")) == is_pairs, name
