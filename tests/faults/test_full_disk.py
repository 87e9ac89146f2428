"""A disk that is full, in truth: an error that names it, nothing half-written trusted, and on with room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerCallback

from fastdpo.integrations.forest.keys_values import KeysValues
from fastdpo.rounds.partial import PartialWork, write_rows
from fastdpo.rounds.ranks import Ranks
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.encoding import EncodingOptions
from tests.distributed.ranks import free_port, run_ranks, start
from tests.distributed.resume_run import whole
from tests.faults.conftest import SmallDisk
from tests.rounds.conftest import read
from tests.training.conftest import (
    draw_none,
    made_tokenizer,
    make_rows,
    quick_args,
    read_metrics,
    tiny_llama,
    write_jsonl,
)

FULL, KILLED = "No space left on device", "tests.distributed.killed_run"
SETTINGS: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "max_steps": 6,
    "disable_dropout": False,
}


class Fill(TrainerCallback):
    """Leaves so much of what the first checkpoint took at the end of a step."""

    def __init__(self, disk: SmallDisk, share: float, step: int = 3) -> None:
        self.disk, self.share, self.step, self.size = disk, share, step, 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        files = Path(args.output_dir, f"checkpoint-{state.global_step}").iterdir()
        self.size = sum(-(-file.stat().st_size // 4096) * 4096 for file in files)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.disk.leave(int(self.share * self.size))


def make_trainer(args: PreferenceConfig, tokenizer: Any, *callbacks: TrainerCallback) -> PreferenceTrainer:
    return PreferenceTrainer(
        tiny_llama(attention_dropout=0.2),
        args,
        train_dataset=make_rows(20),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def uninterrupted(trained_bpe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What is logged, and the weights."""
    args = quick_args(tmp_path_factory.mktemp("whole") / "run", **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        draw_none(patch)
        trainer = make_trainer(args, made_tokenizer(trained_bpe))
        trainer.train()
    return read_metrics(args.output_dir or ""), trainer.model.state_dict()


# Before its first file; within the weights, the optimiser's state, and what comes last.
@pytest.mark.promise(69)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.85, 0.99])
def test_a_checkpoint_that_has_no_room(
    disk: SmallDisk, tokenizer: Any, uninterrupted: tuple[Any, Any], share: float
):
    args = quick_args(disk.folder / "run", **SETTINGS)
    folder = Path(args.output_dir or "")
    with pytest.raises(OSError, match=FULL) as raised:
        make_trainer(args, tokenizer, Fill(disk, share)).train()
    assert f"{folder / 'checkpoint-4'}: the checkpoint was not written to its end" in str(raised.value)
    assert f"resume_from_checkpoint=True, from {folder / 'checkpoint-2'}" in str(raised.value)
    # The one before stays, also where one alone is kept.
    assert (folder / "checkpoint-2" / "preference_run.json").is_file()

    disk.make_room()
    resumed = make_trainer(args, tokenizer)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from == str(folder / "checkpoint-2")
    logs, weights = uninterrupted
    assert read_metrics(folder) == logs
    for name, value in weights.items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not list(folder.rglob("*.tmp"))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return whole(tmp_path_factory.mktemp("truth"), "alone")


@pytest.mark.promise(69)
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "sharded"])
def test_a_checkpoint_of_two_ranks_that_has_no_room(
    disk: SmallDisk, way: str, truth: dict[str, Any], tmp_path: Path
):
    """Each rank ends by itself, with the disk's error or the name of the rank that has it."""
    port, arguments = free_port(), (str(disk.folder), way, "full", "0")
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = [start(KILLED, arguments, rank, 2, port, logs[rank]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [1, 1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for said in (log.read_text() for log in logs):
        assert FULL in said or "ended with OSError" in said, said[-3000:]
    said = logs[0].read_text()
    assert f"{disk.folder / way / 'checkpoint-4'}: the checkpoint was not written to its end" in said
    assert (disk.folder / way / "checkpoint-2" / "preference_run.json").is_file()
    disk.make_room()
    run_ranks(KILLED, str(disk.folder), way, "resumed")
    found = torch.load(disk.folder / f"{way}.pt")
    assert found["losses"] == pytest.approx(truth["losses"], abs=1e-5)
    for name, value in truth["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=2e-6)


@pytest.mark.promise(69)
def test_metrics_that_have_no_room(disk: SmallDisk, tokenizer: Any, uninterrupted: tuple[Any, Any]):
    args = quick_args(disk.folder / "run", **SETTINGS, overwrite_output_dir=True)
    with pytest.raises(OSError, match=f"{FULL}: '{args.output_dir}/metrics.jsonl'"):
        make_trainer(args, tokenizer, Fill(disk, 0, step=1)).train()
    disk.make_room()
    make_trainer(args, tokenizer).train()
    assert read_metrics(args.output_dir or "") == uninterrupted[0]


@pytest.mark.promise(69)
def test_a_model_that_has_no_room(disk: SmallDisk, tokenizer: Any):
    args = quick_args(disk.folder / "run", **{**SETTINGS, "max_steps": 2})
    trainer = make_trainer(args, tokenizer)
    trainer.train()
    disk.leave(50_000)
    with pytest.raises(OSError, match=f"run: the model was not written to its end: {FULL}.*checkpoint-2"):
        trainer.save_model()
    disk.make_room()
    trainer.save_model()


@pytest.mark.promise(69)
@pytest.mark.parametrize("left", [0, 16_384])
def test_rows_that_have_no_room(
    disk: SmallDisk, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
):
    """The rows of the file, then their tokens."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", disk.folder / "cache")
    rows = make_rows(400)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    whole = encode_rows(read_rows(rows), tokenizer, EncodingOptions())
    disk.leave(left)
    # What the library says where it sees so beforehand, and where it is told.
    full = f"(Not enough disk space|.*{FULL})"
    with pytest.raises(ValueError, match=rf"rows\.jsonl: cannot be read, or not kept in .*cache: {full}"):
        read_rows(path)
    disk.make_room()
    source = read_rows(path)
    disk.leave(left)
    with pytest.raises(ValueError, match=rf"cache: tokenised rows cannot be kept there: {full}"):
        encode_rows(source, tokenizer, EncodingOptions())
    disk.make_room()
    assert encode_rows(source, tokenizer, EncodingOptions()).fingerprint() == whole.fingerprint()
    assert not list(disk.folder.rglob("*.incomplete"))


@pytest.mark.promise(69)
def test_reference_scores_that_have_no_room(disk: SmallDisk, tokenizer: Any, tmp_path: Path):
    def curve(cache: Path, name: str) -> list[dict[str, Any]]:
        args = quick_args(
            tmp_path / name, reference="precomputed", reference_cache_dir=str(cache), max_steps=2,
            overwrite_output_dir=True,
        )  # fmt: skip
        make_trainer(args, tokenizer).train()
        return read_metrics(tmp_path / name)

    disk.leave(0)
    cache = disk.folder / "cache"
    with pytest.raises(OSError, match=rf"{FULL}: '{cache}/"):
        curve(cache, "run")
    assert not [path for path in cache.rglob("*") if path.is_file()]
    disk.make_room()
    found = curve(cache, "run")
    assert len(list(cache.glob("*.npz"))) == 1
    assert found == curve(cache, "again") == curve(tmp_path / "other", "other")


@pytest.mark.promise(69)
def test_records_of_rounds_that_have_no_room(disk: SmallDisk):
    output = disk.folder / "samples.jsonl"

    def work() -> PartialWork:
        return PartialWork(output, {"seed": 1}, Ranks.joined(True), overwrite=False)

    records = [{"part": k, "answers": "x" * 1500} for k in range(8)]
    first = work()
    disk.leave(8192)
    with pytest.raises(OSError, match=rf"{FULL}: '.*samples\.jsonl\.partial/part-0-0\.jsonl'"):
        for record in records:
            first.add(record)
    with pytest.raises(OSError, match=FULL):
        first.close()
    disk.make_room()
    going_on = work()
    found = going_on.records()
    assert 0 < len(found) < 8 and found == records[: len(found)]
    for record in records[len(found) :]:
        going_on.add(record)
    disk.leave(4096)
    with pytest.raises(OSError, match=rf"{FULL}: '{output}'"):
        going_on.finish(records)
    assert not output.exists()
    disk.make_room()
    last = work()
    last.finish(sorted(last.records(), key=lambda record: record["part"]))
    assert read(output) == records and [path.name for path in disk.folder.iterdir()] == [output.name]


def test_rows_are_replaced_whole_or_not_at_all(disk: SmallDisk):
    path = disk.folder / "rows.jsonl"
    write_rows(path, [{"a": 1}])
    disk.leave(4096)
    with pytest.raises(OSError, match=FULL):
        write_rows(path, [{"a": "x" * 9000}])
    assert read(path) == [{"a": 1}]


@pytest.mark.promise(62)
def test_keys_and_values_that_have_no_room(disk: SmallDisk):
    """An error, not the signal that a write through memory would be; and nothing is left of them."""

    def keep(kept: KeysValues, layers: int) -> None:
        for layer in range(layers):
            kept.write(layer, 0, *torch.ones(2, 1, 4, 1024, 32).unbind())  # 512 KiB each
            assert float(kept.read(layer, 0, 1024)[1].sum()) == 4 * 1024 * 32

    kept = KeysValues(1024, torch.device("cpu"), 0, 0, str(disk.folder))
    disk.leave(3 << 20)
    with pytest.raises(OSError, match=f"context: 0 MiB of keys and values: {FULL}.*{disk.folder}"):
        keep(kept, 4)
    kept.close()
    assert [path.name for path in disk.folder.iterdir()] == ["filler"]
    disk.make_room()
    keep(KeysValues(1024, torch.device("cpu"), 0, 0, str(disk.folder)), 4)


@pytest.mark.promise(69)
def test_curves_that_have_no_room_are_not_drawn(
    disk: SmallDisk, make_args: Callable[..., Any], caplog: pytest.LogCaptureFixture
):
    from fastdpo.training.loop.curves import draw_curves

    pytest.importorskip("matplotlib")
    disk.leave(0)
    path = disk.folder / "curves.png"
    assert not draw_curves([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}], path)
    assert "curves.png is not drawn: No space left on device" in caplog.text and not path.exists()
