"""What Triton makes of the row kernel: registers, spills, the width of memory accesses, the order of sums."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.kernels.triton_compile import BF16, CASES, FP16, FP32, CompileCase, Compiled
from tests.kernels.triton_processes import compile_reports

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100)
REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_BLOCK = 48 * 1024  # what every GPU gives without asking

Reports = dict[str, Compiled]


@pytest.fixture(scope="module")
def all_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Reports]:
    found = compile_reports("tests.kernels.triton_compile", ARCHS, tmp_path_factory.mktemp("triton"))
    return {
        arch: {name: Compiled(**report) for name, report in reports.items()}
        for arch, reports in found.items()
    }


@pytest.fixture(params=ARCHS, ids="sm_{}".format)
def reports(request: pytest.FixtureRequest, all_reports: dict[int, Reports]) -> Reports:
    return all_reports[request.param]


def count(compiled: Compiled, pattern: str) -> int:
    return sum(n for name, n in compiled.instructions.items() if re.fullmatch(pattern, name))


def test_nothing_spills(reports: Reports) -> None:
    for name, compiled in reports.items():
        assert compiled.stack_bytes == 0 and count(compiled, r"(LDL|STL)\b.*") == 0, (name, compiled)


def test_blocks_fit_on_a_multiprocessor(reports: Reports) -> None:
    for name, compiled in reports.items():
        blocks = compiled.blocks_per_sm
        assert blocks * compiled.registers * compiled.threads <= REGISTERS_PER_SM, (name, compiled)
        assert compiled.shared_bytes <= SHARED_BYTES_PER_BLOCK, (name, compiled)


def test_logits_are_read_16_bytes_at_a_time(reports: Reports) -> None:
    for name, case in CASES.items():
        compiled = reports[name]
        assert count(compiled, r"LDG\..*\.128") > 0, (name, compiled)
        # The label, its logit, its exact logit, its bias and three coefficients; in each pass over a ragged
        # row, what is left after its whole groups.
        allowed = 2 + case.has_target + case.is_heavy + 3 * case.has_coeffs
        allowed += rest_accesses(case) * (1 + (case.d_dtype is not None)) * (1 + case.is_heavy)
        assert count(compiled, r"LDG\b(?!.*\.128).*") <= allowed, (name, compiled)


def test_d_is_written_as_wide_as_logits_are_read(reports: Reports) -> None:
    for name, case in CASES.items():
        compiled = reports[name]
        narrow = 6 if case.has_statistics else 2  # the row's outputs
        if case.d_dtype is None:
            assert count(compiled, r"STG\b.*") == narrow, (name, compiled)
        else:
            width = "64" if case.logits_dtype == FP32 and case.d_dtype in (BF16, FP16) else "128"
            wide = count(compiled, rf"STG\..*\.{width}")
            assert wide > 0, (name, compiled)
            assert count(compiled, r"STG\b.*") - wide <= narrow + rest_accesses(case), (name, compiled)


def rest_accesses(case: CompileCase) -> int:
    """What is left of a ragged row goes one to a group; a thread has the groups of 8 logits."""
    width = 4 if case.logits_dtype == FP32 else 8
    return 8 // width if case.vocab % width else 0


def test_sums_are_taken_in_one_order_whatever_is_asked_for(reports: Reports) -> None:
    """Layouts decide which thread adds what; equal ones make logp and lse the same bits in every mode."""
    layouts: dict[Any, dict[str, list[str]]] = {}
    for name, case in CASES.items():
        reductions = reports[name].reductions  # those over an axis of one element add nothing
        found = {shape: each for shape, each in reductions.items() if not shape.endswith("x1")}
        assert len(found) == 2 and all(len(each) == 1 for each in found.values()), (name, found)
        assert layouts.setdefault((case.vocab, case.logits_dtype, case.is_heavy), found) == found, name
    assert len(layouts) < len(CASES)


def test_in_place_every_store_of_d_waits_for_all_loads(reports: Reports) -> None:
    """Without the barrier a thread overwrites logits its neighbours have yet to read, now and then."""
    for name, case in CASES.items():
        compiled = reports[name]
        assert (compiled.num_tile_stores > 0) == (case.d_dtype is not None), (name, compiled)
        assert compiled.num_barriers == case.in_place * compiled.num_tile_stores, (name, compiled)
