"""What Triton makes of the divergence kernel: spills, registers, walks over a row, the order of sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.compile_divergence import CASES, CompileCase
from benchmarks.compiled import ARCHITECTURES, CompiledKernel

# Triton takes half a minute for an architecture; `test_triton_compiles.py` has a few that are quick.
pytestmark = pytest.mark.slow

REGISTERS_PER_SM = 65536
Kernels = dict[str, CompiledKernel]


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def kernels(request: pytest.FixtureRequest, compiled: Callable[[str, str], Kernels]) -> Kernels:
    return compiled("divergence", f"sm_{request.param}")


def test_nothing_spills_and_a_multiprocessor_has_several_blocks(kernels: Kernels) -> None:
    """Of what training asks for (TDPO and AlignDistil of a plain head) enough to hide memory's latency."""
    assert kernels.keys() == CASES.keys()
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0 and kernel.count(r"(LDL|STL)\b.*") == 0, (name, kernel)
        granted = -(-kernel.registers // 8) * 8
        blocks = REGISTERS_PER_SM // (granted * kernel.threads)
        case = CASES[name]
        is_plain = not case.is_heavy and case.vocab % 16 == 0 and "jsd" not in case.outputs
        assert blocks * kernel.threads >= (768 if is_plain else 512), (name, kernel.registers)
        assert kernel.shared_bytes <= 48 * 1024, name


def num_walks(case: CompileCase) -> int:
    """As the module's docstring counts them: every head by itself, the teachers' two, sums, D."""
    needs_sums = case.d == "none" or "reverse_kl" in case.outputs or "jsd" in case.outputs
    return (1 + case.num_teachers) + 2 * (case.num_teachers == 2) + needs_sums + (case.d != "none")


def test_a_row_is_walked_as_often_as_needed(kernels: Kernels) -> None:
    for name, kernel in kernels.items():
        assert kernel.facts["walks"] == num_walks(CASES[name]), name


def test_accesses_are_wide(kernels: Kernels) -> None:
    """16 bytes at once wherever rows allow it: all of the tiles' loads, and the stores of D."""
    for name, kernel in kernels.items():
        case = CASES[name]
        if case.vocab % 16:
            continue
        # Numbers of a row: the label, its logits and biases, coefficients.
        assert kernel.count(r"LDG\.E(\.EL)?(\.64)?(\.CONSTANT)?") <= 16, (name, kernel.instructions)
        assert kernel.count(r"STG\.E\.128") == (case.d != "none") + case.has_logps_d, name
        assert kernel.count(r"STG\.E\.U16.*") == 0, name


def test_a_barrier_where_d_lies_over_logits(kernels: Kernels) -> None:
    for name, kernel in kernels.items():
        assert kernel.facts["barriers"] == (CASES[name].d == "in place"), name


def test_sums_have_one_order(kernels: Kernels) -> None:
    """Layouts decide which thread adds what: none hangs on what is asked for, so that modes agree.

    A vocabulary that ends within a group of 16 bytes may have another.
    """
    even = [kernel.facts["reductions"] for name, kernel in kernels.items() if CASES[name].vocab % 16 == 0]
    found = {layout for by_shape in even for each in by_shape.values() for layout in each}
    assert len(found) == 1, found
