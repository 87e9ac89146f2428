"""What Triton makes of the kernels of mode ``lean``: tensor cores, registers, spills, shared memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.lean_compile import CASES, FP32, SLAB_CASES, Compiled
from tests.kernels.triton_processes import compile_reports

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100)
REGISTERS_PER_SM = 65536
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # sm_80's table serves sm_86 and sm_89 too
TENSOR_CORES = {80: r"HMMA\..*", 90: r"HGMMA\..*", 100: r"UTC\w*MMA.*"}
ANY_TENSOR_CORES = r"(HMMA|HGMMA|UTC\w*MMA)\b.*"


@pytest.fixture(scope="module", params=ARCHS, ids="sm_{}".format)
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def reports(arch: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    found = compile_reports("tests.kernels.lean_compile", (arch,), tmp_path_factory.mktemp("triton"))
    return {name: Compiled(**report) for name, report in found[arch].items()}


def count(compiled: Compiled, pattern: str) -> int:
    return sum(n for name, n in compiled.instructions.items() if re.fullmatch(pattern, name))


def test_nothing_spills(reports: dict[str, Compiled]) -> None:
    assert reports.keys() == CASES.keys() | SLAB_CASES.keys()
    for name, compiled in reports.items():
        assert compiled.stack_bytes == 0 and count(compiled, r"(LDL|STL)\b.*") == 0, (name, compiled)


def test_blocks_fit_on_a_multiprocessor(reports: dict[str, Compiled], arch: int) -> None:
    for name, compiled in reports.items():
        assert compiled.registers * compiled.threads <= REGISTERS_PER_SM, (name, compiled)
        assert compiled.shared_bytes <= SHARED_BYTES[arch], (name, compiled)


def test_products_are_made_where_their_dtype_belongs(reports: dict[str, Compiled], arch: int) -> None:
    """16 bits on the tensor cores, on Hopper by whole warp groups; fp32 nowhere near TF32."""
    for name, case in CASES.items():
        compiled = reports[name]
        on_tensor_cores = count(compiled, TENSOR_CORES[arch])
        if case.dtype == FP32:
            assert count(compiled, ANY_TENSOR_CORES) == 0 and count(compiled, r"FFMA2?\b.*") > 0, (
                name,
                compiled,
            )
        else:
            assert on_tensor_cores > 0 and count(compiled, ANY_TENSOR_CORES) == on_tensor_cores, (
                name,
                compiled,
            )


def test_operands_are_copied_16_bytes_at_a_time_ahead_of_their_use(reports: dict[str, Compiled]) -> None:
    for name, case in CASES.items():
        compiled = reports[name]
        if case.hidden_size % 16 == 0:
            wide, copies = count(compiled, r"LDGSTS\..*\.128"), count(compiled, r"LDGSTS\b.*")
            assert wide == copies > 0, (name, compiled)


def test_no_logit_is_stored(reports: dict[str, Compiled]) -> None:
    """What leaves a program is three to six sums a row: a few stores, and no atomic."""
    for name, case in CASES.items():
        compiled = reports[name]
        assert count(compiled, r"STG\b.*") <= (6 if case.has_statistics else 3) * 4, (name, compiled)
        assert count(compiled, r"(ATOM|RED|ATOMG)\b.*") == 0, (name, compiled)


def test_d_is_written_as_wide_as_logits_are_read(reports: dict[str, Compiled]) -> None:
    for name, case in SLAB_CASES.items():
        compiled = reports[name]
        # The label, lse, and with coefficients these three and the entropy.
        assert count(compiled, r"LDG\b(?!.*\.128).*") == (6 if case.has_coeffs else 2), (name, compiled)
        assert count(compiled, r"STG\b.*") == count(compiled, r"STG\..*\.128") > 0, (name, compiled)
        assert compiled.num_barriers == (case.in_place and case.d_dtype != FP32), (name, compiled)
