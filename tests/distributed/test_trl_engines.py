"""TRL's fused head under FSDP2 and ZeRO-3: patched it gives what one process gives, or refuses."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

pytest.importorskip("trl")

from tests.distributed.cases import TRL, TRL_ZERO
from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    printed = run_ranks("tests.distributed.trl_run", seconds=120)[0]
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
    return {line.pop("case"): line for line in lines}


@pytest.fixture(scope="module")
def zero() -> dict[str, Any]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed (make test-deepspeed)")
    printed = run_ranks("tests.distributed.trl_zero_run", seconds=200)[0]
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("name", TRL_ZERO)
def test_a_head_that_zero_puts_away(zero: dict[str, Any], name: str):
    """Gathered for TRL's call, and again for its backward pass."""
    assert "raised" not in zero[name], zero[name]["raised"]
    assert zero[name]["error"] < 2e-6
    # Two steps; the first entropy that is differentiated is made once more.
    calls = {"as it is": 0, "patched, with an entropy": 3}.get(name, 2)
    assert zero[name]["calls"] == calls


@pytest.mark.parametrize("name", [name for name in TRL if not name.startswith("own")])
def test_a_head_that_is_whole_in_the_forward_pass(results: dict[str, Any], name: str):
    assert results[name]["error"] < 2e-6


def test_a_head_in_a_unit_of_its_own_is_refused(results: dict[str, Any]):
    """TRL 1.16 trains it on this rank's rows alone, in silence: half of the gradient is missing."""
    assert results["own, as it is"]["error"] > 0.5
    assert "whose gradient would not be added up over the ranks" in results["own, patched"]["said"]
