"""Losses that are not finite, and directories in use."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

from fastdpo.training.loop.trainer import NonFiniteLossError, PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]
ROWS = make_rows(8)
ROWS[5]["prompt"] = "@" + ROWS[5]["prompt"]  # row 6 is the only one with this token


def poisoned(tokenizer: Any) -> LlamaForCausalLM:
    """A model whose embedding of "@" is NaN."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("@")["input_ids"][0]] = float("nan")
    return model


@pytest.mark.promise(56)
def test_stop_names_the_step_and_the_row(make_args: MakeArgs, tokenizer: Any):
    args = make_args(train_sampling_strategy="sequential")
    trainer = PreferenceTrainer(poisoned(tokenizer), args, train_dataset=ROWS, processing_class=tokenizer)
    with pytest.raises(
        NonFiniteLossError, match=r"loss is nan at step 2, from the log-probabilities of row 6 of"
    ):
        trainer.train()


class KeepWeights(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.mark.promise(56)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_leaves_that_step_out(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture, accumulate: int
):
    args = make_args(
        train_sampling_strategy="sequential",
        on_nonfinite_loss="skip",
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=2,
    )
    model = poisoned(tokenizer)
    kept = KeepWeights()
    trainer = PreferenceTrainer(model, args, train_dataset=ROWS, processing_class=tokenizer, callbacks=[kept])
    trainer.train()
    assert "row 6" in caplog.text and "left out" in caplog.text
    for name, value in kept.steps[0].items():
        torch.testing.assert_close(kept.steps[1][name], value, rtol=0, atol=0, equal_nan=True)
    first = model.state_dict()["lm_head.weight"]
    assert torch.isfinite(first).all() and not torch.equal(first, tiny_llama().lm_head.weight)
    losses = [entry["loss"] for entry in read_metrics(args.output_dir)]
    assert all(isinstance(loss, float) for loss in losses)
    text = (Path(args.output_dir) / "metrics.jsonl").read_text()
    assert "NaN" not in text  # grad_norm of the step left out is null
    assert json.loads(text.splitlines()[1])["grad_norm"] is None


def make_trainer(args: PreferenceConfig, tokenizer: Any) -> PreferenceTrainer:
    return PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(4), processing_class=tokenizer)


def test_a_directory_in_use_is_refused_and_left_alone(make_args: MakeArgs, tokenizer: Any):
    folder = Path(make_args().output_dir)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir: .* is in use"):
        make_trainer(make_args(), tokenizer).train()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_overwriting_removes_the_last_run_and_nothing_else(make_args: MakeArgs, tokenizer: Any):
    args = make_args(max_steps=2, save_strategy="steps", save_steps=1)
    make_trainer(args, tokenizer).train()
    folder = Path(args.output_dir)
    (folder / "notes.txt").write_text("mine")
    again = make_args(max_steps=1, overwrite_output_dir=True)
    make_trainer(again, tokenizer).train()
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "metrics.jsonl"}
    assert [entry["step"] for entry in read_metrics(folder)] == [1]


def test_a_trainer_may_use_its_own_directory_again(make_args: MakeArgs, tokenizer: Any):
    trainer = make_trainer(make_args(max_steps=1), tokenizer)
    trainer.evaluate(make_rows(2, 3))
    trainer.train()
    trainer.train()


def test_without_matplotlib_a_line_says_so(
    make_args: MakeArgs,
    tokenizer: Any,
    curves: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    args = make_args(max_steps=1)
    make_trainer(args, tokenizer).train()
    assert "curves.png is not drawn: matplotlib is not installed" in caplog.text
    assert not (Path(args.output_dir) / "curves.png").exists()
