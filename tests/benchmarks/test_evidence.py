"""The page of evidence is what this checkout gives, and says that it is no measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence
from benchmarks.compiled import CompiledKernel

KERNEL = CompiledKernel("row", "D", "Triton 1.2", "sm_90", 512, 96, 0, 1024, 16, 8, {})


def test_the_page_is_what_its_cheap_sections_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the poison of uninitialised memory is launches of its own
    page = evidence.PAGE.read_text()
    assert "Nothing on this page was measured on a GPU" in page
    held = evidence.sections_of(page)
    for name in evidence.CHEAP:
        assert held[name] == evidence.SECTIONS[name]().strip(), f"{name}: run `make evidence`"
    assert held.keys() == evidence.SECTIONS.keys() and evidence.document(held) == page


@pytest.mark.slow
def test_the_simulated_section_is_what_the_simulation_gives() -> None:
    held = evidence.sections_of(evidence.PAGE.read_text())
    assert held["accuracy"] == evidence.accuracy().strip(), "run `make evidence`"


def test_kernels_stand_in_a_table_for_each_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Any] = [
        KERNEL, CompiledKernel("row", "D", "Triton 1.2", "sm_80", 512, 128, 24, 1024, 16, 8, {}),
        CompiledKernel("sequence", "sums", "nvcc 1.3", "sm_90a", 0, 40, 0, 0, 8, 0, {}),
    ]  # fmt: skip
    monkeypatch.setattr(evidence, "compiled_rows", lambda: kernels)
    text = evidence.compiled()
    assert "### Triton 1.2\n\n| kernel | case | sm_90 | sm_80 |" in text
    assert "| row | D | 96, none spilled, load 16, D 8 | 128, 24 spilled, load 16, D 8 |" in text
    assert "### nvcc 1.3\n\n| kernel | case | sm_90a |" in text
    assert "| sequence | sums | 40, none spilled, load 8 |" in text


def test_one_section_is_written_and_the_others_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "evidence.md"
    page.write_text(evidence.document({"waves": "old waves", "accuracy": "old sums"}))
    monkeypatch.setitem(evidence.SECTIONS, "waves", lambda: "new waves\n")
    words = ["--page", str(page), "--only", "waves"]
    assert evidence.main([*words, "--check"]) == 1
    assert "waves: not what this checkout gives; run `make evidence`" in capsys.readouterr().out
    assert evidence.main(words) == 0 and evidence.main([*words, "--check"]) == 0
    assert evidence.sections_of(page.read_text()) == {"waves": "new waves", "accuracy": "old sums"}


def test_a_compiler_that_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise RuntimeError("no cuobjdump here")

    monkeypatch.setitem(evidence.SECTIONS, "compiled", missing)
    assert evidence.main(["--only", "compiled", "--page", str(tmp_path / "none.md")]) == 2
    assert "error: no cuobjdump here" in capsys.readouterr().err
