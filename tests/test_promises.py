"""The page of promises is what the tests' marks say, and no promise is without a test or a reason."""

from __future__ import annotations

import pytest

from tests import ROOT, promises
from tests.promise_table import PROMISES, TIERS


def test_the_page_is_what_the_marks_say():
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    assert page == promises.page(), "make tables"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == promises.in_readme(readme) and "\n[Promises]" in readme, "make tables"


def test_every_number_is_marked_or_has_its_reason():
    numbers = [promise.number for promise in PROMISES]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > promises.LAST_GOAL
    marked = {number for holder in promises.holders() for number in holder.numbers}
    assert marked <= set(numbers)
    for promise in PROMISES:
        assert promise.tiers and set(promise.tiers) <= set(TIERS)
        assert promises.is_kept(promise) or promise.not_run, f"promise {promise.number}: no test, no reason"


def test_a_test_on_a_gpu_keeps_nothing():
    source = """
pytestmark = pytest.mark.gpu

@pytest.mark.promise(3, 4)
def test_one(): ...
"""
    (one,) = promises._of_file(source, "test_one.py")
    assert (one.numbers, one.runs, one.tier) == ((3, 4), promises.GPU, "G")
    (one,) = promises._of_file(source.replace("pytest.mark.gpu", "[pytest.mark.slow]"), "test_one.py")
    assert (one.runs, one.tier) == (promises.SLOW, "C")
    (one,) = promises._of_file(source.partition("\n\n")[2], "test_one.py")
    assert one.runs == promises.ALWAYS


def test_marks_are_plain_numbers():
    with pytest.raises(ValueError, match="wanted numbers of promises"):
        list(promises._of_file("@pytest.mark.promise(x)\ndef test_one(): ...", "test_one.py"))


def test_pytest_sees_what_is_read_from_the_source(request: pytest.FixtureRequest):
    """Of the files that were collected with this one: no mark that pytest has is missing on the page."""
    listed = {holder.place: set(holder.numbers) for holder in promises.holders()}
    for item in request.session.items:
        numbers = {number for mark in item.iter_markers("promise") for number in mark.args}
        if numbers:
            place = item.path.relative_to(ROOT / "tests").as_posix()
            assert listed[f"{place}::{item.originalname}"] == numbers  # type: ignore[attr-defined]
