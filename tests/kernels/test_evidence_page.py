"""What ``docs/evidence.md`` says of compiled kernels is what is compiled now."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import evidence
from benchmarks.compiled import ARCHITECTURES, TRITON_FAMILIES, CompiledKernel

LIBRARY_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
FAMILIES = [(family, f"sm_{arch}") for family in TRITON_FAMILIES for arch in ARCHITECTURES]
FAMILIES += [("library", arch) for arch in LIBRARY_ARCHITECTURES]

Cells = dict[tuple[str, str, str], str]  # family, case, architecture


def cells_by_compiler() -> dict[str, Cells]:
    """The tables of the page."""
    _, *parts = evidence.sections_of(evidence.PAGE.read_text())["compiled"].split("### ")
    found: dict[str, Cells] = {}
    for part in parts:
        compiler, *lines = part.strip().splitlines()
        header, _, *rows = [line.strip("| ").split(" | ") for line in lines if line]
        found[compiler] = {
            (row[0], row[1], arch): cell
            for row in rows for arch, cell in zip(header[2:], row[2:], strict=True)
        }  # fmt: skip
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("family", "architecture"), FAMILIES, ids=["-".join(each) for each in FAMILIES])
def test_the_page_says_what_is_compiled(
    family: str, architecture: str, compiled: Callable[[str, str], dict[str, CompiledKernel]]
) -> None:
    """Every kernel of a family, and no other: other tests of this folder have had them compiled."""
    kernels = compiled(family, architecture)
    if not kernels:
        pytest.skip(f"the nvcc that built fastdpo._C does not know {architecture}")
    compiler = next(iter(kernels.values())).compiler
    held = cells_by_compiler()
    if compiler not in held:
        pytest.skip(f"the page was made with {', '.join(held)}; here it is {compiler}")
    got = {(k.family, k.case, architecture): evidence.cell_of(k) for k in kernels.values()}
    columns = {(key[0], architecture) for key in got}
    want = {key: cell for key, cell in held[compiler].items() if (key[0], key[2]) in columns}
    assert got == want, "run `make evidence`"
