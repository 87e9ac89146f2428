"""docs/models.md says what the tests run, and no more."""

from __future__ import annotations

import pytest

from tests.integrations.tables import PAGE, render

pytest.importorskip("peft")


def test_the_committed_tables_are_the_generators() -> None:
    text = PAGE.read_text(encoding="utf-8")
    changed = text.replace("| gemma2 |", "| gemma22 |")
    assert changed != text and render(changed) == text, "run python -m tests.integrations.tables"
    with pytest.raises(ValueError, match="<!-- families:begin -->"):
        render("no markers")
