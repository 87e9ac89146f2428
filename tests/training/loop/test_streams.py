"""Training on a stream: the curves of data at hand, exact resume, bad rows, and what is refused by name."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from fastdpo.cli import main
from fastdpo.training.data import stream
from fastdpo.training.data.rows import RowStream
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama, write_jsonl
from tests.training.loop.kinds_data import LOSS_OF_KIND, rows_of
from tests.training.loop.test_resume import Interrupt

MakeArgs = Callable[..., PreferenceConfig]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 8 rows, and parts of 5."""
    monkeypatch.setattr(stream, "HEAD_ROWS", 8)
    monkeypatch.setattr(stream, "PART_ROWS", 5)


def streamed(rows: Any) -> RowStream:
    return read_rows(rows, streaming=True)


def trainer_on(data: Any, args: PreferenceConfig, tokenizer: Any, **more: Any) -> PreferenceTrainer:
    model = more.pop("model", None) or tiny_llama(1)
    return PreferenceTrainer(model, args, train_dataset=data, processing_class=tokenizer, **more)


def curve(trainer: PreferenceTrainer) -> list[dict[str, Any]]:
    trainer.train()
    return [
        {name: value for name, value in entry.items() if name != "epoch"}
        for entry in read_metrics(trainer.args.output_dir or "")
    ]


def epochs(output_dir: Any) -> list[float]:
    return [entry["epoch"] for entry in read_metrics(output_dir)]


# The data at hand


@pytest.mark.promise(67)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_layout": "packed", "max_tokens_per_batch": 200, "max_steps": 3},
        {"batch_layout": "shared_prompt", "gradient_accumulation_steps": 2, "max_steps": 2},
        {"batch_layout": "auto", "max_tokens_per_batch": 200, "max_steps": 3},
    ],
    ids=["padded", "packed budget", "shared prompt", "auto budget"],
)
def test_the_curve_is_that_of_the_data_at_hand(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, settings: dict[str, Any]
):
    """In order, for an epoch or less: the same losses, bit for bit."""
    rows = make_rows(24)
    rows[5] = {**rows[5], "chosen": ""}
    settings = {"train_sampling_strategy": "sequential", "max_steps": 5, "max_bad_rows": 0.2, **settings}
    at_hand = curve(trainer_on(rows, make_args(output_dir=str(tmp_path / "hand"), **settings), tokenizer))
    args = make_args(output_dir=str(tmp_path / "stream"), **settings)
    assert curve(trainer_on(streamed(rows), args, tokenizer)) == at_hand
    assert len({entry["loss"] for entry in at_hand}) > 1


@pytest.mark.parametrize("kind", LOSS_OF_KIND)
def test_every_kind_of_data(make_args: MakeArgs, tokenizer: Any, tmp_path: Path, kind: str):
    rows = rows_of(kind, 12)
    # KTO's first prompt comes with the last row's answer at hand, with the next row's in a stream.
    rows[-1] = {**rows[-1], **{name: rows[1][name] for name in ("completion",) if kind == "unpaired"}}
    settings = {"loss_type": LOSS_OF_KIND[kind], "train_sampling_strategy": "sequential", "max_steps": 3}
    at_hand = curve(trainer_on(rows, make_args(output_dir=str(tmp_path / "hand"), **settings), tokenizer))
    args = make_args(output_dir=str(tmp_path / "stream"), **settings)
    assert curve(trainer_on(streamed(rows), args, tokenizer)) == at_hand


def test_passes_are_counted_and_shuffled(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    rows = make_rows(12)
    args = make_args(max_steps=9, shuffle_buffer_size=5)
    first = curve(trainer_on(datasets.IterableDataset.from_generator(lambda: iter(rows)), args, tokenizer))
    # How long a pass is shows when it has been read to its end, as it has when the buffer runs dry.
    assert epochs(args.output_dir) == pytest.approx([0, 8 / 12, 1, 16 / 12, 20 / 12, 2, 28 / 12, 32 / 12, 3])
    for changes, is_same in (({}, True), ({"data_seed": 3}, False), ({"shuffle_buffer_size": 4}, False)):
        settings = {"max_steps": 9, "shuffle_buffer_size": 5, **changes}
        again = make_args(output_dir=str(tmp_path / str(changes)), **settings)
        assert (curve(trainer_on(streamed(rows), again, tokenizer)) == first) == is_same


def test_precomputed_columns_are_read(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    rows = [
        {**row, "ref_chosen_logps": -20.0 - k, "ref_rejected_logps": -21.0}
        for k, row in enumerate(make_rows(12))
    ]
    settings = {"reference": "precomputed", "train_sampling_strategy": "sequential", "max_steps": 3}
    at_hand = curve(trainer_on(rows, make_args(output_dir=str(tmp_path / "hand"), **settings), tokenizer))
    args = make_args(output_dir=str(tmp_path / "stream"), **settings)
    assert curve(trainer_on(streamed(rows), args, tokenizer)) == at_hand
    with pytest.raises(ValueError, match="reference: got 'precomputed' with a stream .* 'copy'"):
        trainer_on(streamed(make_rows(12)), args, tokenizer)
    kto = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True, "ref_logps": [-9.0],
            "ref_mismatched_logps": [-9.0], "ref_mismatched_of": ["x"]} for row in make_rows(12)]  # fmt: skip
    args = make_args(loss_type="kto", reference="precomputed")
    with pytest.raises(ValueError, match="of mismatched answers are of other rows"):
        trainer_on(streamed(kto), args, tokenizer)


# Resuming

SETTINGS = {
    "max_steps": 8,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "warmup_steps": 2,
    "shuffle_buffer_size": 6,
    "disable_dropout": False,
}


@pytest.mark.promise(67)
@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("stopped", {}),
        ("crashed", {"save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
        ("stopped", {"batch_layout": "packed", "max_tokens_per_batch": 200}),
        ("stopped", {"loss_type": "kto", "max_steps": 10}),
    ],
    ids=["stopped", "crashed", "budget", "kto"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, how: str, changes: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    """Under dropout, in the second pass."""
    settings, rows = {**SETTINGS, **changes}, make_rows(17)

    def made(name: str, *callbacks: TrainerCallback) -> PreferenceTrainer:
        args = make_args(output_dir=str(tmp_path / name), **settings)
        model = tiny_llama(attention_dropout=0.2)
        return trainer_on(streamed(rows), args, tokenizer, model=model, callbacks=list(callbacks))

    straight = made("whole")
    straight.train()
    interrupted = made("parts", Interrupt(how))
    if how == "crashed":
        with pytest.raises(InterruptedError):
            interrupted.train()
    else:
        interrupted.train()
    resumed = made("parts")
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        resumed.train(resume_from_checkpoint=True)
    assert "its first" in caplog.text and "taken on trust" in caplog.text
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    assert epochs(tmp_path / "parts")[-1] > 1
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_another_stream_is_not_resumed(make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture):
    rows = make_rows(12)
    settings = {"save_strategy": "steps", "save_steps": 2}
    curve(trainer_on(streamed(rows), make_args(**settings, max_steps=2), tokenizer))
    others = [*rows[:7], *make_rows(1, seed=9), *rows[8:]]
    for data, text in (
        (streamed(others), "8 rows of a stream -> 8 of a stream, or other tokens"),
        (rows, "8 rows of a stream -> 12, or other tokens"),
    ):
        trainer = trainer_on(data, make_args(**settings), tokenizer)
        with pytest.raises(ValueError, match=f"of other data: {text}"):
            trainer.train(resume_from_checkpoint=True)
    later = [*rows[:8], *make_rows(4, seed=9)]  # beyond what can be known
    trainer_on(streamed(later), make_args(**settings), tokenizer).train(resume_from_checkpoint=True)


# Rows that are found out late


def test_bad_rows_are_reported_at_the_end(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    rows = [{**row, "chosen": ""} if k in (11, 14) else row for k, row in enumerate(make_rows(40), 1)]
    args = make_args(train_sampling_strategy="sequential", max_bad_rows=0.2)
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        trainer_on(streamed(rows), args, tokenizer).train()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said[-1].startswith(
        "read so far: dataset: 18 of 20 pairs kept; skipped 2 with an empty completion"
    )
    assert "(rows 11, 14)" in said[-1]
    for changes, text in (
        ({"max_bad_rows": 0.05}, "13% of the rows left out, wanted 5% at most"),
        ({"on_bad_row": "error"}, r"\(rows 11, 14\) \(on_bad_row='error'\)"),
    ):
        args = make_args(**changes, train_sampling_strategy="sequential", overwrite_output_dir=True)
        with pytest.raises(ValueError, match=text):
            trainer_on(streamed(rows), args, tokenizer).train()


def test_what_the_model_lacks_is_named_with_the_row(make_args: MakeArgs, tokenizer: Any):
    rows = make_rows(12)
    tokenizer.add_tokens(["<extra>"])
    rows[9] = {**rows[9], "chosen": " <extra>"}
    model = tiny_llama(1, vocab_size=len(tokenizer) - 1)
    with pytest.raises(ValueError, match="row 10 of dataset has the id"):
        trainer_on(streamed(rows), make_args(), tokenizer, model=model).train()


def test_positions_of_mismatched_answers_count(make_args: MakeArgs, tokenizer: Any):
    """A long prompt and another prompt's long answer meet only in KTO's mismatched sequences."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=360, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    rows = [{"prompt": "river", "completion": " stone", "label": k % 2 == 0} for k in range(12)]
    rows[9] = {"prompt": "lamp", "completion": " river" * 50, "label": True}
    rows[10] = {"prompt": "river " * 40 + "paper", "completion": " stone", "label": False}
    args = make_args(loss_type="kto")
    with pytest.raises(ValueError, match="row 11 of dataset has .* tokens; wanted 64 at most"):
        trainer_on(streamed(rows), args, tokenizer, model=model).train()


def test_own_collators_are_told_of_turns(make_args: MakeArgs, tokenizer: Any):
    def collator(rows: Any) -> Any:
        raise AssertionError

    turns = [{"role": role, "content": "river"} for role in ("assistant", "user", "assistant")]
    rows = [
        {name: [{"role": "assistant", "content": text}] for name, text in row.items()}
        for row in make_rows(12)
    ]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": "stone"}]
    rows[9]["chosen"] = turns
    args = make_args(train_sampling_strategy="sequential", per_device_train_batch_size=12)
    with pytest.raises(ValueError, match="data_collator: got one with answers of several turns"):
        trainer_on(streamed(rows), args, tokenizer, data_collator=collator).train()


# What is refused


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_steps": -1}, "max_steps: got -1 with a stream, wanted the number of steps"),
        ({"num_train_epochs": 3}, "num_train_epochs: got 3 with a stream, wanted max_steps alone"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy: got 'group_by_length' with",
        ),
        ({"longest_batch_first": True}, "longest_batch_first: got True with a stream"),
        ({"save_strategy": "epoch"}, "save_strategy: got 'epoch' with a stream"),
        (
            {"shuffle_buffer_size": 5, "train_sampling_strategy": "sequential"},
            "shuffle_buffer_size: got 5 with train_sampling_strategy 'sequential'",
        ),
        ({"shuffle_buffer_size": -1}, "shuffle_buffer_size: got -1, wanted a whole number from 0"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers: got 2 with a stream, wanted 0"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            r"accelerator_config.dispatch_batches: got True with a stream",
        ),
        ({"max_tokens_per_batch": 20}, "max_tokens_per_batch: got 20, wanted at least"),
    ],
)
def test_what_needs_all_rows_is_refused(
    make_args: MakeArgs, tokenizer: Any, changes: dict[str, Any], text: str
):
    with pytest.raises(ValueError, match=text):
        trainer_on(streamed(make_rows(9)), make_args(**changes), tokenizer).get_train_dataloader()


def test_evaluations_are_of_rows_at_hand(make_args: MakeArgs, tokenizer: Any):
    data = streamed(make_rows(9))
    with pytest.raises(
        ValueError, match="a stream is trained on, as train_dataset, and neither evaluated on"
    ):
        trainer_on(make_rows(9), make_args(), tokenizer, eval_dataset=data)
    iterable = datasets.IterableDataset.from_generator(lambda: iter(make_rows(9)))
    with pytest.raises(ValueError, match="got IterableDataset, .*; a stream is trained on, as train_dataset"):
        trainer_on(make_rows(9), make_args(), tokenizer, eval_dataset=iterable)
    with pytest.raises(ValueError, match="shuffle_buffer_size: got 5 with rows at hand"):
        trainer_on(make_rows(9), make_args(shuffle_buffer_size=5), tokenizer)
    args = make_args(max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = trainer_on(data, args, tokenizer, eval_dataset=make_rows(5))
    assert "eval_loss" in curve(trainer)[-1]


def test_names_of_the_settings(make_args: MakeArgs):
    assert make_args(buffer_size=5).shuffle_buffer_size == 5
    with pytest.raises(TypeError, match=r"dataset_streaming: .*; in Python, train_dataset=read_rows\("):
        make_args(dataset_streaming=True)


# The command line


@pytest.fixture
def flags(tokenizer: Any, tmp_path: Path) -> list[str]:
    tiny_llama(1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return [
        "--model", str(tmp_path / "model"), "--use_cpu", "--dataset_streaming", "--output_dir",
        str(tmp_path / "run"), "--learning_rate", "1e-3", "--logging_steps", "1", "--disable_tqdm",
    ]  # fmt: skip


def test_the_command_line(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any):
    lines = write_jsonl(tmp_path / "a.jsonl", make_rows(11)).read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    write_jsonl(tmp_path / "b.jsonl", make_rows(9, seed=3))
    data = ["--dataset", str(tmp_path / "a.jsonl.zst"), str(tmp_path / "b.jsonl")]
    words = [*flags, *data, "--dataset_weights", "2", "1", "--max_steps", "4", "--save_steps", "2"]
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        assert main(["train", *words, "--per_device_train_batch_size", "4"]) == 0
    assert "training on a stream of pairs" in caplog.text
    whole = read_metrics(tmp_path / "run")
    assert [entry["step"] for entry in whole] == [1, 2, 3, 4]
    said = (tmp_path / "run" / "settings.yaml").read_text()
    assert "dataset_streaming: true" in said
    # Killed after its second step, and gone on with.
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    words = [*words, "--per_device_train_batch_size", "4"]
    assert main(["train", *words, "--resume_from_checkpoint"]) == 0
    assert read_metrics(tmp_path / "run") == whole

    capsys.readouterr()
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    assert main(["doctor", *words]) == 0
    out = capsys.readouterr().out
    assert (
        "a stream, which begins with" in out
        and "8 of 8 pairs kept" in out
        and "longest pair" in out
        and "refused" in out
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("command", "words", "text"),
    [
        ("train", [], "max_steps: got -1 with a stream"),
        (
            "train",
            ["--max_steps", "2", "--held_out", "0.1"],
            "--held_out: got a value with --dataset_streaming",
        ),
        ("score", ["--max_steps", "2"], "--dataset_streaming: got true, wanted rows at hand"),
        ("doctor", ["--max_steps", "2", "--dataloader_num_workers", "1"], "dataloader_num_workers: got 1"),
    ],
)
def test_the_command_line_refuses(
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: list[str],
    text: str,
):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(11))
    assert main([command, *flags, "--dataset", str(path), *words]) == 2
    assert text in capsys.readouterr().err


def test_a_stream_without_an_end(make_args: MakeArgs, tokenizer: Any):
    """The run is as long as max_steps says, and reads no further than it needs."""
    read = itertools.count()
    rows = make_rows(5)

    def endless() -> Any:
        for row in itertools.cycle(rows):
            next(read)
            yield row

    args = make_args(max_steps=3, per_device_train_batch_size=2, shuffle_buffer_size=4)
    trainer_on(datasets.IterableDataset.from_generator(endless), args, tokenizer).train()
    assert next(read) <= 8 + 6 + 4 + 5 + 2 and epochs(args.output_dir) == [0, 0, 0]
