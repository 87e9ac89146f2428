"""TRL's fused head under FSDP2: patched it gives what one process gives, and refuses what TRL gets wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("trl")

from tests.distributed.cases import TRL
from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    printed = run_ranks("tests.distributed.trl_run", seconds=120)[0]
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("name", [name for name in TRL if not name.startswith("own")])
def test_a_head_that_is_whole_in_the_forward_pass(results: dict[str, Any], name: str):
    assert results[name]["error"] < 2e-6


def test_a_head_in_a_unit_of_its_own_is_refused(results: dict[str, Any]):
    """TRL 1.16 trains it on this rank's rows alone, in silence: half of the gradient is missing."""
    assert results["own, as it is"]["error"] > 0.5
    assert "whose gradient would not be added up over the ranks" in results["own, patched"]["said"]
