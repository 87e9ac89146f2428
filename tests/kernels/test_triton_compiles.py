"""What Triton makes of the row kernel: registers, spills, the width of memory accesses, the order of sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.compile_row import CASES, FP32, CompileCase
from benchmarks.compiled import ARCHITECTURES, CompiledKernel

REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_BLOCK = 48 * 1024  # what every GPU gives without asking

Kernels = dict[str, CompiledKernel]


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def kernels(request: pytest.FixtureRequest, compiled: Callable[[str, str], Kernels]) -> Kernels:
    """Which takes Triton most of a minute."""
    found = compiled("row", f"sm_{request.param}")
    assert found.keys() == CASES.keys()
    return found


@pytest.mark.promise(45)
@pytest.mark.slow
def test_nothing_spills(kernels: Kernels) -> None:
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0 and kernel.count(r"(LDL|STL)\b.*") == 0, (name, kernel)


@pytest.mark.promise(45)
@pytest.mark.slow
def test_blocks_fit_on_a_multiprocessor(kernels: Kernels) -> None:
    for name, kernel in kernels.items():
        blocks = kernel.facts["blocks_per_sm"]
        assert blocks * kernel.registers * kernel.threads <= REGISTERS_PER_SM, (name, kernel)
        assert kernel.shared_bytes <= SHARED_BYTES_PER_BLOCK, (name, kernel)


@pytest.mark.slow
def test_logits_are_read_16_bytes_at_a_time(kernels: Kernels) -> None:
    for name, kernel in kernels.items():
        case = CASES[name]
        assert kernel.count(r"LDG\..*\.128") > 0, (name, kernel)
        # The label, its logit, its exact logit, its bias and three coefficients; in each pass over a ragged
        # row, what is left after its whole groups.
        allowed = 2 + case.has_target + case.is_heavy + 3 * case.has_coeffs
        allowed += rest_accesses(case) * (1 + (case.d_dtype is not None)) * (1 + case.is_heavy)
        assert kernel.count(r"LDG\b(?!.*\.128).*") <= allowed, (name, kernel)


@pytest.mark.slow
def test_d_is_written_16_bytes_at_a_time(kernels: Kernels) -> None:
    for name, kernel in kernels.items():
        case = CASES[name]
        narrow = 6 if case.has_statistics else 2  # the row's outputs
        if case.d_dtype is None:
            assert kernel.count(r"STG\b.*") == narrow, (name, kernel)
        else:
            wide = kernel.count(r"STG\..*\.128")
            assert wide > 0 and kernel.d_store_bytes == 16, (name, kernel)
            assert kernel.count(r"STG\b.*") - wide <= narrow + rest_accesses(case), (name, kernel)


def rest_accesses(case: CompileCase) -> int:
    """What is left of a ragged row goes one to a group, of which a thread has one."""
    return 1 if case.vocab % 8 else 0


@pytest.mark.slow
def test_pass_two_has_tiles_on_their_way(kernels: Kernels) -> None:
    """Three go from step to step, or two beside coefficients: one at hand, the others not waited for yet."""
    for name, kernel in kernels.items():
        case = CASES[name]
        if case.d_dtype is not None and not name.startswith("one "):
            assert kernel.facts["tiles_carried"] == (2 if case.has_coeffs else 3), name


@pytest.mark.slow
def test_sums_are_taken_in_one_order_whatever_is_asked_for(kernels: Kernels) -> None:
    """Layouts decide which thread adds what; equal ones make logp and lse the same bits in every mode."""
    layouts: dict[Any, dict[str, list[str]]] = {}
    for name, kernel in kernels.items():
        case = CASES[name]
        reductions = kernel.facts["reductions"]  # those over an axis of one element add nothing
        found = {shape: each for shape, each in reductions.items() if not shape.endswith("x1")}
        assert len(found) == 2 and all(len(each) == 1 for each in found.values()), (name, found)
        assert layouts.setdefault((case.vocab, case.logits_dtype, case.is_heavy), found) == found, name
    assert len(layouts) < len(kernels)


@pytest.mark.slow
def test_in_place_every_store_of_d_waits_for_all_loads(kernels: Kernels) -> None:
    """Without the barrier a thread overwrites logits its neighbours have yet to read, now and then."""
    for name, kernel in kernels.items():
        case = CASES[name]
        assert (kernel.facts["tile_stores"] > 0) == (case.d_dtype is not None), (name, kernel)
        halves = 2 if case.d_dtype == FP32 else 1  # of a tile, stored one after the other
        assert halves * kernel.facts["barriers"] == case.in_place * kernel.facts["tile_stores"], (
            name,
            kernel,
        )


@pytest.mark.promise(45)
def test_two_of_them_in_seconds(compiled: Callable[[str, str], Kernels]) -> None:
    """All of the above, in one test: another process of pytest would only wait for the compiler."""
    kernels = compiled("few rows", "sm_90")
    assert len(kernels) == 2
    for check in (
        test_nothing_spills,
        test_blocks_fit_on_a_multiprocessor,
        test_logits_are_read_16_bytes_at_a_time,
        test_d_is_written_16_bytes_at_a_time,
        test_pass_two_has_tiles_on_their_way,
        test_sums_are_taken_in_one_order_whatever_is_asked_for,
        test_in_place_every_store_of_d_waits_for_all_loads,
    ):
        check(kernels)
