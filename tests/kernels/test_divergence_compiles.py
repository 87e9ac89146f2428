"""What Triton makes of the divergence kernel: spills, registers, walks over a row, the order of sums."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.divergence_compile import CASES, CompileCase, Compiled
from tests.kernels.triton_processes import compile_reports

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100)
REGISTERS_PER_SM = 65536
Reports = dict[str, Compiled]


@pytest.fixture(scope="module")
def all_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Reports]:
    found = compile_reports("tests.kernels.divergence_compile", ARCHS, tmp_path_factory.mktemp("triton"))
    return {
        arch: {name: Compiled(**report) for name, report in reports.items()}
        for arch, reports in found.items()
    }


@pytest.fixture(params=ARCHS, ids="sm_{}".format)
def reports(request: pytest.FixtureRequest, all_reports: dict[int, Reports]) -> Reports:
    return all_reports[request.param]


def count(compiled: Compiled, pattern: str) -> int:
    return sum(n for name, n in compiled.instructions.items() if re.fullmatch(pattern, name))


def test_nothing_spills_and_a_multiprocessor_has_several_blocks(reports: Reports) -> None:
    """Of what training asks for (TDPO and AlignDistil of a plain head) enough to hide memory's latency."""
    assert reports.keys() == CASES.keys()
    for name, compiled in reports.items():
        assert compiled.stack_bytes == 0 and count(compiled, r"(LDL|STL)\b.*") == 0, (name, compiled)
        granted = -(-compiled.registers // 8) * 8
        blocks = REGISTERS_PER_SM // (granted * compiled.threads)
        case = CASES[name]
        is_plain = not case.is_heavy and case.vocab % 16 == 0 and "jsd" not in case.outputs
        assert blocks * compiled.threads >= (768 if is_plain else 512), (name, compiled.registers)
        assert compiled.shared_bytes <= 48 * 1024, name


def num_walks(case: CompileCase) -> int:
    """As the module's docstring counts them: every head by itself, the teachers' two, sums, D."""
    needs_sums = case.d == "none" or "reverse_kl" in case.outputs or "jsd" in case.outputs
    return (1 + case.num_teachers) + 2 * (case.num_teachers == 2) + needs_sums + (case.d != "none")


def test_a_row_is_walked_as_often_as_needed(reports: Reports) -> None:
    for name, compiled in reports.items():
        assert compiled.num_walks == num_walks(CASES[name]), name


def test_accesses_are_wide(reports: Reports) -> None:
    """16 bytes at once wherever rows allow it: all of the tiles' loads, and the stores of D."""
    for name, compiled in reports.items():
        case = CASES[name]
        if case.vocab % 16:
            continue
        # Numbers of a row: the label, its logits and biases, coefficients.
        assert count(compiled, r"LDG\.E(\.EL)?(\.64)?(\.CONSTANT)?") <= 16, (name, compiled.instructions)
        assert count(compiled, r"STG\.E\.128") == (case.d != "none") + case.has_logps_d, name
        assert count(compiled, r"STG\.E\.U16.*") == 0, name


def test_a_barrier_where_d_lies_over_logits(reports: Reports) -> None:
    for name, compiled in reports.items():
        assert compiled.num_barriers == (CASES[name].d == "in place"), name


def test_sums_have_one_order(reports: Reports) -> None:
    """Layouts decide which thread adds what: none hangs on what is asked for, so that modes agree.

    A vocabulary that ends within a group of 16 bytes may have another.
    """
    layouts = {name: compiled.reductions for name, compiled in reports.items() if CASES[name].vocab % 16 == 0}
    found = {layout for by_shape in layouts.values() for each in by_shape.values() for layout in each}
    assert len(found) == 1, layouts
