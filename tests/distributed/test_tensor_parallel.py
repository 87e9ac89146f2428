"""A patched model under transformers' tensor parallelism: the vocabulary stays split, one result."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.cases import TENSOR_PARALLEL
from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found = {}
    for world in (2, 4):
        printed = run_ranks("tests.distributed.tensor_run", world=world, seconds=200)[0]
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
        found.update({line.pop("case"): line for line in lines})
    return found


@pytest.mark.promise(65)
@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_it_gives_what_one_process_gives(results: dict[str, Any], name: str):
    assert "raised" not in results[name], results[name]["raised"]
    assert results[name]["error"] < 5e-6  # fp32, whose sums over heads and over columns are split too


def test_the_head_is_not_gathered(results: dict[str, Any]):
    # Of the labelled tokens three numbers each; the backbone's own sums are all_reduce. Those of mode
    # `pairs`, one for each group, are made within an op.
    assert results["log-probabilities"]["calls"]["_allgather_base_"] == 1
    assert "_allgather_base_" not in results["the loss"]["calls"]
