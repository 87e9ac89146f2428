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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "reference"), CHECKED)
def test_a_run_logs_what_it_logged(tokenizer: Any, name: str, layout: str, reference: str):
    wanted = json.loads(RECORD.read_text())[f"{name}/{layout}/{reference}"]
    found = logged(name, layout, reference, tokenizer)
    # Another machine adds up in another order: sums of some hundred tokens, and Adam's first steps, which
    # turn the sign of a small gradient into a step.
    for what, values in wanted.items():
        assert found[what] == pytest.approx(values, rel=2e-4, abs=2e-4), what
