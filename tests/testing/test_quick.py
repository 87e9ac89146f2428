"""The list of `make quick` has no name that is none any more."""

from __future__ import annotations

import pytest

from tests import ROOT
from tests.quick import LONG


@pytest.mark.parametrize("name", sorted(LONG))
def test_what_is_left_out_is_there(name: str):
    path, function = name.split("::")
    assert f"def {function}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")
