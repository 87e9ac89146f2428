"""Every wrong call says what the page says, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ROOT, wrong_calls


@pytest.mark.promise(22, 23)
def test_the_page_is_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong_calls.make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    messages = {call: wrong_calls.said(call) for call in wrong_calls.calls()}
    assert len(messages) == len(list(wrong_calls.calls())) > 60
    assert {path.name for path in tmp_path.iterdir()} == before  # nothing was written
    page = (ROOT / "docs" / "wrong_calls.md").read_text(encoding="utf-8")
    differ = [row for call in messages if (row := wrong_calls.row(call, messages[call])) not in page]
    assert not differ, "make tables"
    assert page == wrong_calls.page(messages), "make tables"


def test_a_call_that_is_right_is_found_out():
    with pytest.raises(AssertionError, match="is no mistake"):
        wrong_calls.said("fastdpo.linear_logprob(hidden, head, labels)")
