"""No public name goes, and none is renamed, unseen."""

from __future__ import annotations

import pytest

from tests.public_names import FROZEN, names


@pytest.mark.promise(71)
def test_they_are_those_that_are_promised():
    found, promised = list(names()), FROZEN.read_text(encoding="utf-8").splitlines()
    gone, new = sorted(set(promised) - set(found)), sorted(set(found) - set(promised))
    assert not gone and not new, f"gone: {gone}; new: {new}; if this is meant: python -m tests.public_names"
    assert found == promised and len(found) > 300
