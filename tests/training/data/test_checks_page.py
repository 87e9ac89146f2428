"""The table of checks and the page made of it."""

from __future__ import annotations

import ast

from fastdpo.training.data.checks_page import BEGIN, END, with_checks
from fastdpo.training.settings.row_checks import CHECKS, EFFECTS, LEFT_OUT, may_stay
from tests import ROOT


def test_the_page_is_current():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == with_checks(page), "make tables"


def test_every_check_is_made_and_every_name_is_of_the_table():
    used = set()
    for path in (ROOT / "fastdpo" / "training").rglob("*.py"):
        if path.name == "row_checks.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # As what is found, as what is yielded to be found, or by its entry in the table.
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in CHECKS:
                used.add(node.value)
            named = (
                isinstance(node, ast.Call) and ast.unparse(node.func) in ("BadRow", "Finding") and node.args
            )
            if named and isinstance(node.args[0], ast.Constant):
                assert node.args[0].value in CHECKS, path.name
    assert set(CHECKS) - used == {"no_column", "many_bad_rows"}  # errors with a text of their own


def test_every_check_says_what_to_do():
    messages = [check.message for check in CHECKS.values()]
    assert len(set(messages)) == len(messages)
    for check in CHECKS.values():
        assert check.effect in EFFECTS and check.what.endswith(".") and check.remedy.endswith((".", "`."))
        assert not check.may_stay or check.effect == LEFT_OUT
        assert not any("|" in text for text in (check.message, check.what, check.remedy))
    assert set(may_stay()) == {
        "no_assistant", "answer_lost", "reasoning_lost", "tool_call_lost", "tools_lost", "prompt_lost",
        "open_turn",
    }  # fmt: skip
