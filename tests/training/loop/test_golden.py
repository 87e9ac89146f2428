"""The loop gives what it gave before its rooms were built: every kind of data, layout and reference."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.training.loop.golden import RECORD, logged, runs

# Every case once; and of one of each kind of row the other layouts and references.
CHECKED = [
    (name, layout, reference)
    for name, layout, reference in runs()
    if (layout == "padded" and reference == "auto")
    or (name in ("ld", "kto", "lists", "steps") and (layout == "shared_prompt") != (reference == "auto"))
]
# Carried contexts: each kind of data once.
CARRIED = [
    (name, layout, reference)
    for name, layout, reference in runs()
    if layout == ("packed" if name in ("sigmoid", "kto", "tpo") else "shared_prompt")
    and reference == ("adapter" if name in ("ld", "turns", "tdpo", "steps") else "auto")
]


@pytest.mark.promise(53)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "reference"), CHECKED)
def test_a_run_logs_what_it_logged(tokenizer: Any, name: str, layout: str, reference: str):
    assert_logged(logged(name, layout, reference, tokenizer), f"{name}/{layout}/{reference}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "reference"), CARRIED)
def test_a_carried_run_logs_what_a_whole_one_does(tokenizer: Any, name: str, layout: str, reference: str):
    """In chunks that cut prompts and answers."""
    found = logged(name, layout, reference, tokenizer, context_chunk=19)
    assert_logged(found, f"{name}/{layout}/{reference}")


def assert_logged(found: dict[str, list[float]], run: str) -> None:
    wanted = json.loads(RECORD.read_text())[run]
    # Another machine adds up in another order: sums of some hundred tokens, and Adam's first steps, which
    # turn the sign of a small gradient into a step.
    for what, values in wanted.items():
        assert found[what] == pytest.approx(values, rel=2e-4, abs=2e-4), what
