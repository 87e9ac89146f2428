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

import fastdpo.training.loop.trainer
from fastdpo.training.loop.guard import NonFiniteLossError
from fastdpo.training.loop.trainer import PreferenceTrainer
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


class BadGradient(TrainerCallback):
    """Once, in the backward pass of the third step, while its loss is finite."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            weight = model.lm_head.weight

            def spoil(gradient: torch.Tensor) -> torch.Tensor:
                hook.remove()
                return gradient.index_fill(0, torch.tensor([3]), self.value)

            hook = weight.register_hook(spoil)


def guarded(args: PreferenceConfig, tokenizer: Any, *callbacks: TrainerCallback) -> PreferenceTrainer:
    return PreferenceTrainer(
        tiny_llama(), args, train_dataset=make_rows(20), processing_class=tokenizer, callbacks=list(callbacks)
    )


@pytest.mark.promise(56)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("save_steps", "max_steps"), [(1, 5), (2, 5), (2, 3)])
def test_gradients_that_are_not_finite_stop_the_run_and_are_in_no_checkpoint(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, value: float, save_steps: int, max_steps: int
):
    """Before the checkpoint of that step, in the next one, and at the end. Resumed, the curve is whole."""
    how = {"save_strategy": "steps", "save_steps": save_steps, "max_steps": max_steps}
    args = make_args(**how)
    with pytest.raises(NonFiniteLossError, match=r"the gradients of step 3 are not finite \(their norm is"):
        guarded(args, tokenizer, BadGradient(value)).train()
    folder = Path(args.output_dir)
    assert max(path.name for path in folder.glob("checkpoint-*")) == "checkpoint-2"
    guarded(args, tokenizer).train(resume_from_checkpoint=True)
    whole = make_args(**how, output_dir=str(tmp_path / "whole"))
    guarded(whole, tokenizer).train()
    assert read_metrics(folder) == read_metrics(whole.output_dir)


@pytest.mark.promise(56)
def test_a_step_whose_gradients_are_not_finite_is_left_out(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    kept = KeepWeights()
    trainer = guarded(make_args(on_nonfinite_loss="skip"), tokenizer, BadGradient(float("nan")), kept)
    trainer.train()
    assert caplog.text.count("the gradients of step 3 are not finite, though its loss is") == 1
    for name, value in kept.steps[1].items():
        assert torch.equal(kept.steps[2][name], value)
    assert not torch.equal(kept.steps[3]["lm_head.weight"], kept.steps[2]["lm_head.weight"])
    assert all(value.isfinite().all() for value in kept.steps[3].values())


@pytest.mark.promise(56)
def test_a_run_that_stopped_for_its_loss_goes_on_to_the_same_curve(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where it was the machine, once."""
    how = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    args = make_args(**how)
    trainer = guarded(args, tokenizer)
    with monkeypatch.context() as patch:
        plain = fastdpo.training.loop.trainer.batch_loss

        def spoiled(*given: Any, **options: Any) -> Any:
            result = plain(*given, **options)
            is_bad = trainer.state.global_step == 2
            return result._replace(loss=result.loss * float("nan")) if is_bad else result

        patch.setattr("fastdpo.training.loop.trainer.batch_loss", spoiled)
        with pytest.raises(NonFiniteLossError, match="the loss is nan at step 3, from the log-prob"):
            trainer.train()
    guarded(args, tokenizer).train(resume_from_checkpoint=True)
    whole = make_args(**how, output_dir=str(tmp_path / "whole"))
    guarded(whole, tokenizer).train()
    assert read_metrics(args.output_dir) == read_metrics(whole.output_dir)


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
