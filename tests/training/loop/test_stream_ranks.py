"""Two processes on a stream: each has its share, both give what one gives, and neither waits for rows."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.training.data import stream
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.distributed.ranks import run_ranks
from tests.training.conftest import bpe_text, made_tokenizer, make_rows, read_metrics, tiny_llama
from tests.training.loop.ddp_run import CPU_RANKS_CAN_RESUME, KeepGradients, StopAfterSaving

# Two ranks take the batches of one process in turn: a step of theirs is one of twice as many micro-batches.
CASES: dict[str, dict[str, Any]] = {
    "rows": {"shuffle_buffer_size": 5},
    "accumulated": {"shuffle_buffer_size": 5, "accumulate": 2},
    "budget": {
        "train_sampling_strategy": "sequential",
        "batch_layout": "shared_prompt",
        "max_tokens_per_batch": 130,
    },
    "kto": {"loss_type": "kto", "train_sampling_strategy": "sequential"},
    "fewer rows than ranks": {"train_sampling_strategy": "sequential"},
}
# Batches of a buffer are packed for as many ranks as there are.
PACKED = {"batch_layout": "packed", "max_tokens_per_batch": 150, "shuffle_buffer_size": 8}


def made(
    folder: Path, name: str, *callbacks: Any, data: Any = None, accumulate: int = 1, **changes: Any
) -> PreferenceTrainer:
    is_alone = "WORLD_SIZE" not in os.environ
    settings = {
        "max_steps": 3,
        "save_strategy": "no",
        "disable_dropout": False,
        "logging_steps": 1,
        **changes,
    }
    args = PreferenceConfig(
        output_dir=str(folder / name),
        use_cpu=True,
        ddp_backend=None if is_alone else "gloo",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate * (2 if is_alone else 1),
        learning_rate=1e-3,
        max_bad_rows=0.3,
        disable_tqdm=True,
        **settings,
    )
    rows = make_rows(1) if name == "fewer rows than ranks" else make_rows(17)
    if len(rows) > 10:
        rows[10] = {**rows[10], "chosen": ""}
    if name == "kto" or len(rows) == 1:
        rows = rows * 2
    return PreferenceTrainer(
        tiny_llama(1, attention_dropout=0.2 if "whole" in name or "parts" in name else 0.0),
        args,
        train_dataset=rows if data == "at hand" else read_rows(rows, streaming=True),
        processing_class=made_tokenizer(bpe_text()),
        callbacks=list(callbacks),
    )


def run(folder: Path, name: str) -> None:
    kept = KeepGradients()
    trainer = made(folder, name, kept, **CASES[name])
    trainer.train()
    torch.save(kept.gradients, folder / f"{name}{trainer.accelerator.process_index}.pt")


def main(folder: Path) -> None:
    stream.HEAD_ROWS, stream.PART_ROWS = 8, 5
    for name in CASES:
        run(folder, name)
    sequential: Any = {"train_sampling_strategy": "sequential", "max_steps": 4}
    made(folder, "streamed", **sequential).train()
    made(folder, "at hand", data="at hand", **sequential).train()
    if not CPU_RANKS_CAN_RESUME:
        return
    settings: Any = {**PACKED, "max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    made(folder, "whole", **settings).train()
    made(folder, "parts", StopAfterSaving(), **settings).train()
    made(folder, "parts", **settings).train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    run_ranks("tests.training.loop.test_stream_ranks", str(folder), seconds=540)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(stream, "HEAD_ROWS", 8)
    monkeypatch.setattr(stream, "PART_ROWS", 5)
    run(tmp_path, name)
    wanted = torch.load(tmp_path / f"{name}0.pt")
    for rank in range(2):
        gradients = torch.load(two_ranks / f"{name}{rank}.pt")
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(gradients[parameter], gradient, rtol=0, atol=2e-6)
    logs, wanted_logs = read_metrics(two_ranks / name), read_metrics(tmp_path / name)
    assert [entry["step"] for entry in logs] == [1, 2, 3]
    for entry, wanted_entry in zip(logs, wanted_logs, strict=True):
        assert entry == pytest.approx(wanted_entry, rel=1e-5, abs=1e-6 if entry["step"] == 1 else 1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_have_the_batches_of_the_data_at_hand(two_ranks: Path):
    streamed, at_hand = read_metrics(two_ranks / "streamed"), read_metrics(two_ranks / "at hand")
    for entry in (*streamed, *at_hand):
        del entry["epoch"]
    assert streamed == at_hand and len(streamed) == 4


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not CPU_RANKS_CAN_RESUME, reason="a later transformers is needed")
def test_two_ranks_resume(two_ranks: Path):
    assert read_metrics(two_ranks / "parts") == read_metrics(two_ranks / "whole")
    assert [entry["step"] for entry in read_metrics(two_ranks / "whole")] == list(range(1, 9))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
