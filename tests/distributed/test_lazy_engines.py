"""A head that FSDP2 splits, lazy or used in parts: steps, masks, statistics, mistakes that must not hang."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """Of each rank, by case."""
    found = []
    for printed in run_ranks("tests.distributed.lazy_run", seconds=200):
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
        found.append({line.pop("case"): line for line in lines})
    assert not [name for of in found for name, line in of.items() if "raised" in line], found
    return found


@pytest.mark.parametrize(
    "name", ["two steps", "two steps, tail", "two steps, root", "states moved, two steps"]
)
def test_two_steps_give_the_weights_of_one_process(results: list[dict[str, Any]], name: str):
    assert results[0][name]["error"] < 1e-6 < 1e-4 < results[0][name]["moved"]


@pytest.mark.promise(65)
@pytest.mark.parametrize(
    "name",
    [
        "a reference without the adapter, asked later",
        "masks of which one rank knows the rows",
        "statistics",
        "in a trainer's method",
        "in a trainer's method, root",
        "without gradients",
        "states moved, statistics",
    ],
)
def test_it_gives_what_one_process_gives(results: list[dict[str, Any]], name: str):
    assert results[0][name]["error"] < 2e-6


@pytest.mark.parametrize("name", ["16 bits", "16 bits, tail"])
def test_16_bits_are_as_near_to_the_truth_as_real_logits(results: list[dict[str, Any]], name: str):
    of_real, of_lazy = results[0][name]["grads"]
    assert of_lazy < 1.2 * of_real
    # Log-probabilities of 9 bits, of which some 40 are added up, times beta.
    assert max(results[0][name]["losses"]) < 0.1 * 40**0.5 * 2**-7


def test_parts_in_16_bits_are_as_near_to_the_truth_as_the_gathered_weight(results: list[dict[str, Any]]):
    found = results[0]["states moved, 16 bits"]
    error, *kept = found["states"]
    assert error < 1.2 * found["weight"][0] and kept == found["weight"][1:]


@pytest.mark.promise(66)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kept beyond a step", "changed in place after the forward pass"),
        ("kept beyond a step, root", "changed in place after the forward pass"),
        (
            "ranks that ask for different things",
            r"ask for \['lse of all rows', 'mean of all rows'\] of lazy logits, wanted the same on all",
        ),
        ("states of another unit", "not in a unit of FSDP2's of its own"),
        ("states of LoRA", "but it carries LoRA"),
        ("a function of its own", "a function with a backward pass of its own"),
    ],
)
def test_mistakes_are_said_on_every_rank(results: list[dict[str, Any]], name: str, said: str):
    for of_rank in results:
        assert re.search(said, str(of_rank[name]["said"]))


def test_a_rank_that_asks_alone_is_told(results: list[dict[str, Any]]):
    said = results[0]["one rank alone"]["said"]
    assert "lse of all rows asked for on rank 0 and not on all ranks within 0:00:02" in said
