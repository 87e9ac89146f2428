"""kill -9, in truth, in whatever is written: nothing half-written is trusted, and the end is the same."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.deaths import DEATHS, ended, score, train
from tests.training.conftest import made_tokenizer, make_rows, read_metrics, tiny_llama, write_jsonl

SCORING = ("a batch scored", "scores half-written", "scored rows half-written")
TRAINING = [name for name in DEATHS if name not in SCORING]
# One of each always; the others are as slow as these.
OFTEN = (
    "in the optimiser's step",
    "last file not in its place",
    "scores half-written",
)


def cases(names: list[str] | tuple[str, ...]) -> list[object]:
    return [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def whole(trained_bpe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(train, folder, trained_bpe) == 0, (folder / "log.txt").read_text()
    return folder


@pytest.mark.promise(69)
@pytest.mark.parametrize("death", cases(TRAINING))
def test_a_killed_run_goes_on_to_the_same_curve(trained_bpe: str, whole: Path, tmp_path: Path, death: str):
    log = tmp_path / "log.txt"
    assert ended(train, tmp_path, trained_bpe, death) == -signal.SIGKILL, log.read_text()
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and not (tmp_path / "end.safetensors").exists()
    assert ended(train, tmp_path, trained_bpe) == 0, log.read_text()
    # Only of a checkpoint that was whole before the older one goes it is gone on from the later.
    resumed = "checkpoint-4" if death == "an earlier one half-removed" else "checkpoint-2"
    assert json.loads((tmp_path / "resumed.json").read_text()) == str(tmp_path / "run" / resumed)
    assert read_metrics(tmp_path / "run") == read_metrics(whole / "run")
    one, other = (load_file(folder / "end.safetensors") for folder in (tmp_path, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert not list((tmp_path / "run").rglob("*.tmp"))


def prepared(folder: Path, bpe: str) -> Path:
    """A model and its data."""
    tiny_llama().save_pretrained(folder / "model")
    made_tokenizer(bpe).save_pretrained(folder / "model")
    write_jsonl(folder / "rows.jsonl", make_rows(30))
    return folder


@pytest.fixture(scope="module")
def scored(trained_bpe: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = prepared(tmp_path_factory.mktemp("scored"), trained_bpe)
    assert ended(score, folder, trained_bpe) == 0, (folder / "log.txt").read_text()
    return (folder / "scored.jsonl").read_bytes()


@pytest.mark.promise(69)
@pytest.mark.parametrize("death", cases(SCORING))
def test_a_killed_scoring_goes_on_to_the_same_file(
    trained_bpe: str, scored: bytes, tmp_path: Path, death: str
):
    log = prepared(tmp_path, trained_bpe) / "log.txt"
    assert ended(score, tmp_path, trained_bpe, death) == -signal.SIGKILL, log.read_text()
    assert not (tmp_path / "scored.jsonl").exists()
    assert ended(score, tmp_path, trained_bpe) == 0, log.read_text()
    assert (tmp_path / "scored.jsonl").read_bytes() == scored
    # What was written before is not computed again: of 8 batches 3, or 2 and what was being written.
    kept = {"a batch scored": "12 of 30", "scores half-written": "8 of 30"}.get(death)
    assert kept is None or f"{kept} rows were scored by an interrupted run" in log.read_text()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]
