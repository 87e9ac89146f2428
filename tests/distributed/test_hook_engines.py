"""A patched model under FSDP2, FSDP1 and ZeRO on two ranks: the loss and the gradients of one process."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from fastdpo.plan.traffic import head_traffic
from tests.distributed.cases import FSDP, HSDP, ZERO
from tests.distributed.problem import VOCABULARY, batch, part
from tests.distributed.ranks import DEVICES, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
# fp32: the loss, and the largest error of any gradient over the gradient's largest number.
_TOLERANCE = 2e-6
# Gathers of a step of units beside the head's: the two layers forward and backward, and the root's.
_BESIDE = 5


def _results(module: str, world: int = 2, device: str = "cpu") -> dict[str, Any]:
    printed = run_ranks(module, world=world, seconds=500, device=device)
    lines = [json.loads(line) for line in printed[0].splitlines() if line.startswith('{"case"')]
    return {line.pop("case"): line for line in lines}


@pytest.fixture(scope="module", params=DEVICES)
def fsdp(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _results("tests.distributed.fsdp_run", 2, request.param)


@pytest.fixture(scope="module", params=DEVICES)
def hsdp(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _results("tests.distributed.fsdp_run", 4, request.param)


@pytest.fixture(scope="module")
def zero() -> dict[str, Any]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed (make test-deepspeed)")
    return _results("tests.distributed.zero_run")


@pytest.mark.promise(51)
@pytest.mark.parametrize("name", FSDP)
def test_fsdp_gives_what_one_process_gives(fsdp: dict[str, Any], name: str):
    found = fsdp[name]
    assert "raised" not in found, found["raised"]
    assert found["error"] < _TOLERANCE


@pytest.mark.parametrize("name", HSDP)
def test_copies_of_a_split_model_give_what_one_process_gives(hsdp: dict[str, Any], name: str):
    found = hsdp[name]
    assert "raised" not in found, found["raised"]
    assert found["error"] < _TOLERANCE


@pytest.mark.parametrize(
    ("name", "gathers"),
    [
        ("FSDP2 root logps", 0),  # with the root's other weights
        ("FSDP2 own loss", 2),  # for the forward and for the backward pass
        ("FSDP2 tail packed", 1),  # kept in between
        ("FSDP2 own logps, frozen head", 2),
        ("FSDP2 root lazy", 0),
        ("FSDP2 own lazy", 2),
        ("FSDP2 own lazy twice, a rank without labels", 4),  # for each look
        ("FSDP2 tail lazy", 1),
    ],
)
def test_fsdp2_gathers_the_head_once_a_direction(fsdp: dict[str, Any], name: str, gathers: int):
    assert fsdp[name]["calls"]["_allgather_base_"] == _BESIDE + gathers


def test_fewer_bytes_move_where_the_weight_stays(fsdp: dict[str, Any]):
    """As many as the plan says, which counts what comes from other ranks: half, of two."""
    weight, states, chosen = (
        fsdp[name]
        for name in (
            "FSDP2 own logps, recomputed",
            "FSDP2 own logps, states moved, recomputed",
            "FSDP2 own logps, states moved by choice",
        )
    )
    tokens = max(int((part(batch(), pairs)["labels"][:, 1:] != -100).sum()) for pairs in ([0, 1], [2, 3]))
    plan = head_traffic(tokens, 32, VOCABULARY, 2, weight_bytes=4, states_bytes=4)
    moved = [sum(of["sent"].values()) for of in (weight, states)]
    assert plan.choice == "states" and moved[1] < moved[0]
    saved = moved[0] - moved[1] - 2 * (plan.weight_bytes - plan.states_bytes)
    assert 0 <= saved + 32 < 300  # 32 bytes of counts; the plan takes all ranks to have as many tokens
    assert sum(chosen["sent"].values()) == moved[1] + 8  # and the number of tokens that decides


@pytest.mark.promise(51)
@pytest.mark.parametrize("name", ZERO)
def test_zero_gives_what_one_process_gives(zero: dict[str, Any], name: str):
    found = zero[name]
    assert "raised" not in found, found["raised"]
    assert found["error"] < _TOLERANCE
    # The head is not held while the layers run.
    assert found["head"] == ("NOT_AVAILABLE" if name.startswith("ZeRO-3") else "whole")
