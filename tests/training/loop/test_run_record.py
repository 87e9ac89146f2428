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
            "| versions | fastdpo ",
            "eprint = {2305.18290}",
            "@software{fastdpo,",
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


def test_what_is_pushed(train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To a stand-in of the hub: the model, its card with the curves and the evaluation, and the settings."""
    import huggingface_hub
    from transformers import trainer as of_trainer

    pushed: list[tuple[str, dict[str, str]]] = []

    def upload(*_: Any, repo_id: str, folder_path: Any, **__: Any) -> Any:
        files = {p.name: p.read_text(errors="replace") for p in Path(folder_path).iterdir() if p.is_file()}
        pushed.append((repo_id, files))
        return type("Commit", (), {"done": lambda self: True, "result": lambda self: None})()

    name = type("Repository", (), {"repo_id": "me/model"})()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self, token=None: {"name": "me"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: name)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    # Releases before 5.24 take them as functions.
    monkeypatch.setattr(of_trainer, "create_repo", lambda *args, **kwargs: name, raising=False)
    monkeypatch.setattr(of_trainer, "upload_folder", upload, raising=False)
    assert train(*"--push_to_hub --hub_model_id me/model --held_out 4".split()) == 0
    assert {repo for repo, _ in pushed} == {"me/model"}
    files = pushed[-1][1]
    assert {
        "README.md",
        "settings.yaml",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    } <= files.keys()
    assert "eval_loss" in files["README.md"] and "How to cite" in files["README.md"]
    assert "hub_token" not in files["settings.yaml"]


def test_no_warning_of_transformers_own_names(make_args: MakeArgs, recwarn: pytest.WarningsRecorder):
    """Of what is set by the name before: transformers 5.23 has another, and says so in every run."""
    args = make_args(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    found: Any = getattr(args, "activation_checkpointing_kwargs", args.gradient_checkpointing_kwargs)
    assert found == {"use_reentrant": False}
    assert not [w for w in recwarn.list if "gradient_checkpointing" in str(w.message)]
