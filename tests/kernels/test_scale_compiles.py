"""What Triton makes of the kernel that scales a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.compiled import ARCHITECTURES, CompiledKernel


@pytest.mark.slow  # four seconds of Triton for each architecture
@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_accesses_are_wide_and_begin_after_a_look_at_the_factor(
    arch: int, compiled: Callable[[str, str], dict[str, CompiledKernel]]
) -> None:
    """No spills, and a factor of 1 leaves before anything else is loaded."""
    kernels = compiled("scale", f"sm_{arch}")
    assert len(kernels) == 3
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0 and kernel.count(r"(LDL|STL)\b.*") == 0, name
        assert kernel.registers <= 64 and kernel.count(r"STG\b.*\.128") > 0, name
        order = list(kernel.instructions)  # of first occurrences
        wide = [i for i, each in enumerate(order) if each.startswith("LDG") and each.endswith(".128")]
        assert wide and order.index("EXIT") < wide[0], (name, order)
