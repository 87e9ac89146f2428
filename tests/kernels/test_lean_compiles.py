"""What Triton makes of the kernels of mode ``lean``: tensor cores, registers, spills, shared memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.compile_lean import CASES, FP32, SLAB_CASES
from benchmarks.compiled import ARCHITECTURES, CompiledKernel

# Triton takes half a minute for an architecture; `test_triton_compiles.py` has a few that are quick.
pytestmark = pytest.mark.slow

REGISTERS_PER_SM = 65536
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # sm_80's table serves sm_86 and sm_89 too
TENSOR_CORES = {80: r"HMMA\..*", 90: r"HGMMA\..*", 100: r"UTC\w*MMA.*"}
ANY_TENSOR_CORES = r"(HMMA|HGMMA|UTC\w*MMA)\b.*"

Kernels = dict[str, CompiledKernel]


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def kernels(arch: int, compiled: Callable[[str, str], Kernels]) -> Kernels:
    return compiled("lean", f"sm_{arch}")


def test_nothing_spills(kernels: Kernels) -> None:
    assert kernels.keys() == CASES.keys() | SLAB_CASES.keys()
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0 and kernel.count(r"(LDL|STL)\b.*") == 0, (name, kernel)


def test_blocks_fit_on_a_multiprocessor(kernels: Kernels, arch: int) -> None:
    for name, kernel in kernels.items():
        assert kernel.registers * kernel.threads <= REGISTERS_PER_SM, (name, kernel)
        assert kernel.shared_bytes <= SHARED_BYTES[arch], (name, kernel)


def test_products_are_made_where_their_dtype_belongs(kernels: Kernels, arch: int) -> None:
    """16 bits on the tensor cores, on Hopper by whole warp groups; fp32 nowhere near TF32."""
    for name, case in CASES.items():
        kernel = kernels[name]
        on_tensor_cores = kernel.count(TENSOR_CORES[arch])
        if case.dtype == FP32:
            assert kernel.count(ANY_TENSOR_CORES) == 0 and kernel.count(r"FFMA2?\b.*") > 0, (
                name,
                kernel,
            )
        else:
            assert on_tensor_cores > 0 and kernel.count(ANY_TENSOR_CORES) == on_tensor_cores, (
                name,
                kernel,
            )


def test_operands_are_copied_16_bytes_at_a_time_ahead_of_their_use(kernels: Kernels) -> None:
    for name, case in CASES.items():
        kernel = kernels[name]
        if case.hidden_size % 16 == 0:
            wide, copies = kernel.count(r"LDGSTS\..*\.128"), kernel.count(r"LDGSTS\b.*")
            assert wide == copies > 0, (name, kernel)


def test_no_logit_is_stored(kernels: Kernels) -> None:
    """What leaves a program is three to six sums a row: a few stores, and no atomic."""
    for name, case in CASES.items():
        kernel = kernels[name]
        assert kernel.count(r"STG\b.*") <= (6 if case.has_statistics else 3) * 4, (name, kernel)
        assert kernel.count(r"(ATOM|RED|ATOMG)\b.*") == 0, (name, kernel)


def test_d_is_written_as_wide_as_logits_are_read(kernels: Kernels) -> None:
    for name, case in SLAB_CASES.items():
        kernel = kernels[name]
        # The label, its log-probability, lse, and with coefficients these three and the entropy.
        assert kernel.count(r"LDG\b(?!.*\.128).*") == (7 if case.has_coeffs else 3), (name, kernel)
        assert kernel.count(r"STG\b.*") == kernel.count(r"STG\..*\.128") > 0, (name, kernel)
        assert kernel.facts["barriers"] == (case.in_place and case.d_dtype != FP32), (name, kernel)
