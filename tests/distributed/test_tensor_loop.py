"""``PreferenceTrainer`` with ranks that share tensors, or rows: the curves and weights of one process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.cases import SEQUENCE_LOOP, TENSOR_LOOP
from tests.distributed.ranks import run_ranks
from tests.distributed.tensor_loop_run import run_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
# Over two ranks of tensors, and with FSDP2 over two more.
WORLDS = {2: tuple(TENSOR_LOOP), 4: ("shared prompts", "AOT", "precomputed", "resumed")}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (make test-deepspeed)"
)
# Rows split over two ranks, and with other rows on two more; an engine's settings stay with a process.
_ALONE = ("ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2 twice")
SEQUENCES = {
    (2, "DDP"): tuple(name for name in SEQUENCE_LOOP if name not in _ALONE),
    **{(4 if name == "FSDP2 twice" else 2, name): (name,) for name in _ALONE},
    (4, "DDP"): ("shared prompts", "AOT"),
}
CASES = [(world, name) for world, names in WORLDS.items() for name in names]


def _by_itself(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = ("save_strategy", "save_steps", "dp_replicate_size")
    of_one = {name: {k: v for k, v in case.items() if k not in names} for name, case in cases.items()}
    return {name: run_case(folder / name / "run", None, case) for name, case in of_one.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _by_itself(tmp_path_factory.mktemp("alone"), TENSOR_LOOP)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of the runs, by the number of ranks."""
    folders = {}
    for world, names in WORLDS.items():
        folders[world] = tmp_path_factory.mktemp("ranks")
        run_ranks("tests.distributed.tensor_loop_run", str(folders[world]), *names, world=world, seconds=500)
    return folders


@pytest.fixture(scope="module")
def alone_in_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _by_itself(tmp_path_factory.mktemp("alone"), SEQUENCE_LOOP)


@pytest.fixture(scope="module")
def ran_in_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """The folders of runs with rows that are split."""
    folders, run = {}, "tests.distributed.tensor_loop_run"
    for (world, engine), names in SEQUENCES.items():
        folders[world, engine] = folder = tmp_path_factory.mktemp("parts")
        run_ranks(run, str(folder), "sequences", *names, world=world, seconds=500)
    return folders


@pytest.mark.parametrize(("world", "name"), CASES)
def test_ranks_train_as_one_process(world: int, name: str, ran: dict[int, Path], alone: dict[str, Any]):
    _check(torch.load(ran[world] / name / "found.pt"), alone[name])


@needs_deepspeed
@pytest.mark.parametrize(
    ("world", "engine", "name"), [(*key, name) for key, names in SEQUENCES.items() for name in names]
)
def test_parts_of_rows_train_as_whole_ones(
    world: int,
    engine: str,
    name: str,
    ran_in_parts: dict[tuple[int, str], Path],
    alone_in_rows: dict[str, Any],
):
    _check(torch.load(ran_in_parts[world, engine] / name / "found.pt"), alone_in_rows[name])


def _check(found: Any, wanted: dict[str, Any]) -> None:
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


@pytest.mark.parametrize("how", ["tensors", "copies", pytest.param("sequences", marks=needs_deepspeed)])
def test_the_command_line_takes_the_sizes_of_accelerates_file(how: str, tmp_path: Path):
    printed = run_ranks(
        "tests.distributed.tensor_loop_run", str(tmp_path), "command line", how, world=4, seconds=200
    )
    assert "done: 2 steps" in printed[0]
    if how == "copies":
        assert all("placements ['(Replicate(), Shard(dim=0))']" in text for text in printed)
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
