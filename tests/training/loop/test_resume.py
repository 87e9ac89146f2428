"""An interrupted run, resumed, logs what the uninterrupted one logs, to the last digit."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fastdpo.training.loop.callbacks import METRICS_FILE
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import (
    draw_none,
    made_tokenizer,
    make_rows,
    quick_args,
    read_metrics,
    tiny_llama,
)

MakeArgs = Callable[..., PreferenceConfig]
# Saved in the middle of a logging interval and of an epoch (20 pairs, 6 a step), under dropout.
SETTINGS = {
    "max_steps": 8,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "warmup_steps": 2,
    "disable_dropout": False,
}


SECOND_EPOCH = {"save_steps": 5}
# Some ten batches an epoch, of unlike numbers of pairs.
PACKED = {**SECOND_EPOCH, "batch_layout": "packed", "max_tokens_per_batch": 320}
SHARED = {**SECOND_EPOCH, "batch_layout": "shared_prompt", "max_tokens_per_batch": 240}


class Interrupt(TrainerCallback):
    """Ends a run: in good order after a checkpoint, or by an error two steps later."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.how == "stopped":
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.how == "crashed" and state.global_step == 5:
            raise InterruptedError


def weighted(count: int, weight: float = 1.0, seed: int = 1) -> list[dict[str, Any]]:
    return [{**row, "weight": weight} for row in make_rows(count, seed)]


def make_trainer(args: PreferenceConfig, tokenizer: Any, use_lora: bool, *callbacks: TrainerCallback) -> Any:
    return PreferenceTrainer(
        tiny_llama(attention_dropout=0.2),
        args,
        train_dataset=weighted(20),
        eval_dataset=weighted(5, seed=2),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if use_lora else None,
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def uninterrupted(trained_bpe: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What runs logged, and their weights. Several are compared to one: saving changes none of them."""

    @functools.cache
    def run(use_lora: bool, changes: tuple[tuple[str, Any], ...]) -> tuple[Any, dict[str, torch.Tensor]]:
        args = quick_args(tmp_path_factory.mktemp("whole") / "run", **{**SETTINGS, **dict(changes)})
        trainer = make_trainer(args, made_tokenizer(trained_bpe), use_lora)
        trainer.train()
        return read_metrics(args.output_dir or ""), trainer.model.state_dict()

    return run


# Either end, with and without an adapter, each layout, both orders, and either place to save at.
@pytest.mark.promise(54)
@pytest.mark.parametrize(
    ("how", "use_lora", "changes"),
    [
        ("stopped", False, {}),
        ("crashed", False, {}),
        ("stopped", False, {**SECOND_EPOCH, "train_sampling_strategy": "group_by_length"}),
        ("crashed", False, {**PACKED, "save_steps": 3}),
        ("stopped", False, {**PACKED, "train_sampling_strategy": "group_by_length"}),
        ("stopped", True, SHARED),
    ],
    ids=[
        "stopped",
        "crashed",
        "second epoch by length",
        "packed crashed",
        "packed second epoch by length",
        "lora shared",
    ],
)
def test_the_curve_is_that_of_the_uninterrupted_run(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, how: str, use_lora: bool, changes: dict[str, Any],
    uninterrupted: Callable[..., tuple[Any, Any]],
):  # fmt: skip
    settings = {**SETTINGS, **changes}
    logs, weights = uninterrupted(
        use_lora, tuple(item for item in changes.items() if item[0] != "save_steps")
    )

    parts = make_args(output_dir=str(tmp_path / "parts"), **settings)
    interrupted = make_trainer(parts, tokenizer, use_lora, Interrupt(how))
    if how == "crashed":
        with pytest.raises(InterruptedError):
            interrupted.train()
        with (Path(parts.output_dir) / METRICS_FILE).open("a") as file:
            file.write('{"step": 6, "lo')  # killed while writing
    else:
        interrupted.train()
    assert [path.name for path in Path(parts.output_dir).glob("checkpoint-*")] == [
        f"checkpoint-{settings['save_steps']}"
    ]
    resumed = make_trainer(make_args(output_dir=parts.output_dir, **settings), tokenizer, use_lora)
    resumed.train(resume_from_checkpoint=True)

    assert read_metrics(parts.output_dir) == logs
    assert [e["step"] for e in logs] == [2, 4, 4, 6, 8, 8]
    for name, value in weights.items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_resuming_by_path_and_by_setting(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    settings = {**SETTINGS, "save_steps": 4, "max_steps": 4}
    args = make_args(**settings)
    make_trainer(args, tokenizer, False).train()
    checkpoint = str(Path(args.output_dir) / "checkpoint-4")
    for resume in ("true", checkpoint):
        again = make_args(**{**settings, "max_steps": 6}, resume_from_checkpoint=resume)
        trainer = make_trainer(again, tokenizer, False)
        trainer.train()
        assert [e["step"] for e in read_metrics(args.output_dir) if "loss" in e] == [2, 4, 6]


def test_there_is_nothing_to_resume_from(make_args: MakeArgs, tokenizer: Any):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        make_trainer(make_args(**SETTINGS), tokenizer, False).train(resume_from_checkpoint=True)


INTERRUPTED = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "loss_type": "ipo",
    "pair_weight_column": "weight",
}


@pytest.fixture(scope="module")
def interrupted_once(trained_bpe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a checkpoint at step 2."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_none(monkeypatch)
        make_trainer(quick_args(folder, **INTERRUPTED), made_tokenizer(trained_bpe), True).train()
    return folder


@pytest.fixture
def interrupted(make_args: MakeArgs, interrupted_once: Path) -> Path:
    """A copy of it, where the settings of a test look for it."""
    return Path(shutil.copytree(interrupted_once, make_args().output_dir or ""))


def resume(
    make_args: MakeArgs,
    tokenizer: Any,
    rows: int = 20,
    r: int = 4,
    checkpoint: Any = True,
    weight: float = 1.0,
    **changes: Any,
) -> Any:
    settings = {**INTERRUPTED, "max_steps": 6, **changes}
    trainer = PreferenceTrainer(
        tiny_llama(attention_dropout=0.2), make_args(**settings), train_dataset=weighted(rows, weight),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=r, target_modules="all-linear", lora_dropout=0.1),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss_type": "sigmoid"}, r"another loss: loss_type \['ipo'\] -> \['sigmoid'\]"),
        ({"beta": 0.2}, "another loss: beta None -> 0.2"),
        ({"label_smoothing": 0.1, "loss_type": "sigmoid"}, "another loss: .*loss_options None -> "),
        ({"rows": 19}, "other data: 20 rows -> 19, or other tokens"),
        ({"max_length": 16}, "other data: 20 rows -> 20, or other tokens"),
        ({"weight": 2.0}, "other data: 20 rows -> 20, with other labels, scores or other numbers"),
        ({"r": 2}, "another adapter: default.r 4 -> 2"),
        ({"max_steps": 4}, "at step 4, epoch .*, and max_steps is 4: nothing is left to train"),
        ({"max_steps": -1, "num_train_epochs": 0.5}, "and num_train_epochs is 0.5: nothing is left to train"),
    ],
)
def test_another_run_does_not_go_on(
    make_args: MakeArgs, tokenizer: Any, interrupted: Path, changes: dict[str, Any], text: str
):
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*checkpoint-4 is .*{text}"):
        resume(make_args, tokenizer, **changes)


def test_what_else_differs_is_said_and_from_where_it_goes_on(
    make_args: MakeArgs, tokenizer: Any, interrupted: Path, caplog: pytest.LogCaptureFixture
):
    (interrupted / "checkpoint-4" / "trainer_state.json").unlink()
    (interrupted / "checkpoint-2" / "optimizer.pt").unlink()
    with caplog.at_level("INFO", "fastdpo"):
        resume(make_args, tokenizer, learning_rate=2e-3, reference="precomputed", dataset_num_proc=1)
    for text in (
        "checkpoint-4 was not written to its end",
        "checkpoint-2 has no optimizer.pt: the optimiser and its schedule start anew",
        "with other settings than the checkpoint's: ",
        "learning_rate 0.001 -> 0.002",
        "reference 'adapter' -> 'precomputed'",
        f"resuming from {interrupted / 'checkpoint-2'}, at step 2 of 6",
        "training on 20 pairs of dataset, ",
        "6 steps of 4 pairs; ipo, beta 0.1, reference precomputed",
        f"backend cpu, layout padded, 4,096 of 45,728 parameters trained; into {interrupted}",
    ):
        assert text in caplog.text
    assert "dataset_num_proc" not in caplog.text  # what says nothing of the run
    assert caplog.text.count("resuming from") == 1


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("nowhere", "got nowhere, and there is no such folder"),
        (".", "wanted a checkpoint in it, as .*checkpoint-4"),
        ("checkpoint-2/..", "wanted a checkpoint in it, as .*checkpoint-4"),
        ("empty", "which has no trainer_state.json, wanted a checkpoint's folder"),
    ],
)
def test_what_is_no_checkpoint_is_said(
    make_args: MakeArgs, tokenizer: Any, interrupted: Path, place: str, text: str
):
    (interrupted / "empty").mkdir()
    given = place if place == "nowhere" else str(interrupted / place)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{text}"):
        resume(make_args, tokenizer, checkpoint=given)
