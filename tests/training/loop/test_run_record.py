"""What is kept beside a model: settings that make the run again, and a card that says how it was made."""

# ruff: noqa: F811  (fixtures that are imported are named again where they are asked for)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from fastdpo.training.loop.run_record import settings_of
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.yaml_file import read_settings
from tests.cli_cases import model_dir, pairs, train  # noqa: F401  (fixtures)
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]


def test_settings_make_the_run_again(train: Callable[..., int], tmp_path: Path, capsys: Any):
    words = "--use_peft --lora_r 4 --lora_alpha 8 --held_out 4 --loss_type simpo --gamma 1 --bf16 false"
    words += " --lr_scheduler_type cosine --lr_scheduler_kwargs"
    assert train(*words.split(), '{"num_cycles": 2}') == 0
    assert f"done: 2 steps in 0 s; the model is in {tmp_path / 'out'}" in capsys.readouterr().out
    path = tmp_path / "out" / "settings.yaml"
    settings = read_settings(path)
    assert settings["loss_type"] == "simpo" and settings["loss_options"] == {"gamma": 1}
    assert settings["lr_scheduler_kwargs"] == {"num_cycles": 2} and settings["held_out"] == 4
    assert not {"output_dir", "report_to", "dataloader_pin_memory"} & set(settings)  # what was not said
    first, again = read_metrics(tmp_path / "out"), tmp_path / "again"
    run = parse_train([str(path), "--output_dir", str(again)])
    assert {**run.told(), **settings_of(run.config)} == settings
    from fastdpo.cli import main

    assert main(["train", str(path), "--output_dir", str(again)]) == 0
    assert read_metrics(again) == first


def test_settings_are_those_of_the_run(make_args: MakeArgs):
    args = make_args(hub_token="secret", warmup_steps=0.1, label_smoothing=0.1)
    args.logging_steps = 7  # changed afterwards
    settings = settings_of(args)
    assert settings["logging_steps"] == 7 and settings["warmup_steps"] == 0.1
    assert settings["loss_options"] == {"label_smoothing": 0.1}
    assert not {"hub_token", "output_dir"} & set(settings) and "secret" not in str(settings)


@pytest.mark.parametrize(
    "adapter", [None, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")]
)
def test_the_card(make_args: MakeArgs, tokenizer: Any, adapter: Any):
    args = make_args(max_steps=1, save_strategy="steps", save_steps=1)
    trainer = PreferenceTrainer(
        tiny_llama(), args, train_dataset=make_rows(8), processing_class=tokenizer, peft_config=adapter
    )
    trainer.train()
    trainer.save_model()
    for folder in (Path(args.output_dir or ""), Path(args.output_dir or "") / "checkpoint-1"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == ("transformers" if adapter is None else "peft")
        assert {"fastdpo", "preference-optimization", "sigmoid"} <= set(card.data.tags)
        for text in (
            "| losses | `sigmoid`: DPO",
            "| beta | 0.1 |",
            "dataset: 8 of 8 pairs kept",
            "| steps | 1 (",
        ):
            assert text in card.text
        assert "More Information Needed" not in card.text
        assert (folder / "settings.yaml").is_file()


def test_a_card_of_ones_own_stays(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    trainer = PreferenceTrainer(
        tiny_llama(), make_args(max_steps=1), train_dataset=make_rows(4), processing_class=tokenizer
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("My notes.")
    trainer.save_model(str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "README.md").read_text() == "My notes."
    trainer.save_model(str(tmp_path / "new"))
    trainer.save_model(str(tmp_path / "new"))  # our own is replaced
    assert "fastdpo" in (tmp_path / "new" / "README.md").read_text()
    trainer.create_model_card()
    assert "fastdpo" in (Path(trainer.args.output_dir or "") / "README.md").read_text()


def test_where_nobody_said_is_said(
    make_args: MakeArgs,
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    for given in (None, str(tmp_path / "out")):
        caplog.clear()
        args = make_args(max_steps=1, output_dir=given)
        PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(4), processing_class=tokenizer).train()
        text = "no output_dir is given: what this run writes goes into trainer_output"
        assert (text in caplog.text) == (given is None)
