"""Carried contexts in the loop: the same curves, resumed alike, and what they do not go with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.integrations.forest.carried import _Run
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.types import CarriedContext
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]
# Bytes, as the tokenizer has them: of 240 pairs those that are short.
SHORT = {"max_length": 256, "max_bad_rows": 0.9}


def train(args: PreferenceConfig, tokenizer: Any, rows: Any, **how: Any) -> PreferenceTrainer:
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train(**how)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
def test_the_curve_is_that_of_whole_rows(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, preference_path: Path, layout: str
):
    """Thirty steps on real pairs, with a budget of tokens and two micro-batches a step."""
    curves = []
    for chunk in (None, 48):
        args = make_args(
            output_dir=str(tmp_path / str(chunk)), batch_layout=layout, context_chunk=chunk, max_steps=30,
            max_tokens_per_batch=700, gradient_accumulation_steps=2, learning_rate=1e-3, **SHORT,
        )  # fmt: skip
        train(args, tokenizer, str(preference_path))
        curves.append(read_metrics(args.output_dir))
    assert min(entry["loss"] for entry in curves[0]) < 0.6 and len(curves[0]) == 30  # it learns
    for found, wanted in zip(curves[1], curves[0], strict=True):
        for name in ("loss", "rewards/margins", "grad_norm"):
            # A rounding in a gradient grows over thirty steps of Adam.
            assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-4), name


@pytest.mark.promise(61)
def test_a_run_goes_on_where_it_stopped(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    """To the bit, with dropout, whose draws are made twice."""
    rows, curves = make_rows(24), []
    for name, stop in (("whole", 6), ("parts", 3)):
        settings = {
            "output_dir": str(tmp_path / name), "batch_layout": "shared_prompt", "context_chunk": 8,
            "disable_dropout": False, "save_strategy": "steps", "save_steps": 3,
        }  # fmt: skip
        for steps in (stop, 6)[: 1 + (stop < 6)]:
            model = tiny_llama(attention_dropout=0.2)
            args = make_args(**settings, max_steps=steps, lr_scheduler_type="constant")
            trainer = PreferenceTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
            trainer.train(resume_from_checkpoint=steps > stop)
        curves.append([entry["loss"] for entry in read_metrics(tmp_path / name)])
    assert len(curves[0]) == 6 and curves[0] == curves[1]


def test_every_pass_is_carried(make_args: MakeArgs, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    """Training, the reference, an evaluation: no call of a backbone sees more tokens than a chunk has."""
    seen: list[int] = []
    chunk = _Run._chunk

    def noted(self: _Run, *args: Any) -> torch.Tensor:
        states = chunk(self, *args)
        seen.append(states.shape[1])
        return states

    monkeypatch.setattr(_Run, "_chunk", noted)
    args = make_args(batch_layout="shared_prompt", context_chunk=8, max_steps=1)
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(8), processing_class=tokenizer)
    assert set(seen) >= {7}  # the probe's
    seen.clear()
    longest: list[int] = []
    for model in (trainer.model, trainer.reference.model):
        model.model.layers[0].register_forward_pre_hook(lambda _, inputs: longest.append(inputs[0].shape[1]))
    trainer.train()
    trainer.evaluate(make_rows(4))
    assert max(seen) == max(longest) == 8 and len(longest) == len(seen)


def test_settings_reach_the_batches(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    args = make_args(
        batch_layout="auto", context_chunk=16, context_device_mib=1, context_host_mib=2,
        context_directory=str(tmp_path),
    )  # fmt: skip
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(8), processing_class=tokenizer)
    assert trainer.data_collator.context == CarriedContext(16, 1, 2, str(tmp_path))
    assert "bucketed" not in trainer.data_collator.arrangements
    trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_chunk": 8}, "context_chunk: got 8 with batch_layout='padded', wanted 'packed'"),
        ({"context_chunk": 0, "batch_layout": "packed"}, "context_chunk: got 0, wanted a number of tokens"),
        ({"context_host_mib": 8}, "context_host_mib: got 8 without context_chunk"),
        (
            {"context_chunk": 8, "batch_layout": "packed", "row_arrangement": "bucketed"},
            "context_chunk: got 8 with row_arrangement='bucketed'",
        ),
        (
            {"context_chunk": 8, "batch_layout": "packed", "gradient_checkpointing": True},
            "context_chunk: got 8 with activation checkpointing",
        ),
        (
            {"context_chunk": 8, "batch_layout": "packed", "offload_activations": True},
            "context_chunk: got 8 with offload_activations",
        ),
        (
            {"context_chunk": 8, "batch_layout": "packed", "context_device_mib": -1},
            "context_device_mib: got -1",
        ),
        (
            {"context_chunk": 8, "batch_layout": "packed", "torch_compile": True},
            "context_chunk: got 8 with torch_compile",
        ),
        ({"context_chunk": 8, "batch_layout": "packed", "engine": "fsdp2"}, "context_chunk: got 8"),
    ],
)
def test_what_it_does_not_go_with(make_args: MakeArgs, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_args(**changes)


def test_models_that_carry_more_are_refused(make_args: MakeArgs, tokenizer: Any):
    from tests.integrations.tiny import make_model

    model = make_model("falcon-h1", vocab_size=360)
    args = make_args(batch_layout="packed", context_chunk=8)
    with pytest.raises(ValueError, match="cannot be trained in .*layers of type hybrid"):
        PreferenceTrainer(model, args, train_dataset=make_rows(4), processing_class=tokenizer)
