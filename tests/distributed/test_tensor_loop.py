"""``PreferenceTrainer`` under tensor parallelism: the curves, weights and rewards of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.cases import TENSOR_LOOP
from tests.distributed.ranks import run_ranks
from tests.distributed.tensor_loop_run import run_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
# Over two ranks of tensors, and with FSDP2 over two more.
WORLDS = {2: tuple(TENSOR_LOOP), 4: ("shared prompts", "AOT", "precomputed", "resumed")}
CASES = [(world, name) for world, names in WORLDS.items() for name in names]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    names = ("save_strategy", "save_steps")
    cases = {name: {k: v for k, v in case.items() if k not in names} for name, case in TENSOR_LOOP.items()}
    return {name: run_case(folder / name / "run", None, case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of the runs, by the number of ranks."""
    folders = {}
    for world, names in WORLDS.items():
        folders[world] = tmp_path_factory.mktemp("ranks")
        run_ranks("tests.distributed.tensor_loop_run", str(folders[world]), *names, world=world, seconds=500)
    return folders


@pytest.mark.parametrize(("world", "name"), CASES)
def test_ranks_train_as_one_process(world: int, name: str, ran: dict[int, Path], alone: dict[str, Any]):
    found, wanted = torch.load(ran[world] / name / "found.pt"), alone[name]
    assert not isinstance(found, str), found
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    assert found["tokens"] == wanted["tokens"]
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
    assert len(found["evaluations"]) == len(wanted["evaluations"])
    for ours, theirs in zip(found["evaluations"], wanted["evaluations"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    if "rewards" in wanted:
        torch.testing.assert_close(found["rewards"], wanted["rewards"], rtol=0, atol=1e-5)
    assert found["weights"].keys() == wanted["weights"].keys()
    for key, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=2e-5)


def test_the_command_line_takes_the_sizes_of_accelerates_file(tmp_path: Path):
    printed = run_ranks(
        "tests.distributed.tensor_loop_run", str(tmp_path), "command line", world=4, seconds=200
    )
    assert "done: 2 steps" in printed[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_mistakes_are_errors_on_every_rank(tmp_path: Path):
    printed = run_ranks("tests.distributed.tensor_loop_run", str(tmp_path), "mistakes", seconds=120)
    wanted = {
        "other sizes": "tp_size: got None on rank 1 and 2 on rank 0, wanted one",
        "a whole model": "tp_size: got 2 and a model split over 1 ranks, wanted a path or hub id",
        "no divisor": "tp_size 3: got 2 processes, wanted a multiple of 3",
        "other data": "data: rank 1 has others than rank 0: hash ",
    }
    for text in printed:
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"mistake"')]
        said = {line["mistake"]: line["said"] for line in lines}
        assert said.keys() == wanted.keys()
        for what, start in wanted.items():
            assert said[what].startswith(start), said[what]


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_saved_loads(world: int, ran: dict[int, Path]):
    folder = ran[world] / "resumed" / "run" / "final"
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = torch.load(ran[world] / "resumed" / "found.pt")["weights"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
