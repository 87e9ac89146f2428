"""Models as users bring them: adapters, frozen ones, paths, processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fastdpo.training.loop.models import load_model, tokenizer_of
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference.sources import is_adapter_model
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.hub import is_adapter
from tests.training.conftest import make_rows, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    tiny_llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def adapter_dir(tmp_path: Path, model_dir: str) -> str:
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    adapted: Any = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_an_adapters_folder_is_a_model_whose_adapter_goes_on(
    make_args: MakeArgs, adapter_dir: str, tokenizer: Any
):
    assert is_adapter(adapter_dir)
    model = load_model(adapter_dir)
    assert is_adapter_model(model)
    rows = {"train_dataset": make_rows(8), "processing_class": tokenizer}
    trainer = PreferenceTrainer(model, make_args(max_steps=1), **rows)
    assert trainer.reference.kind == "precomputed"  # the adapter as it is found is part of the reference
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_adapters_that_are_frozen_are_named(
    make_args: MakeArgs, adapter_dir: str, model_dir: str, tokenizer: Any
):
    rows = {"train_dataset": make_rows(8), "processing_class": tokenizer}
    frozen = PeftModel.from_pretrained(load_model(model_dir), adapter_dir)
    # transformers loads an adapter's folder too, frozen and without peft's own class around it.
    for model in (frozen, AutoModelForCausalLM.from_pretrained(adapter_dir)):
        with pytest.raises(ValueError, match=r"got an adapter that is frozen, .*is_trainable=True"):
            PreferenceTrainer(model, make_args(), **rows)
    PreferenceTrainer(frozen, make_args(), eval_dataset=make_rows(4), processing_class=tokenizer)


def test_a_model_of_which_nothing_is_trained_is_named(make_args: MakeArgs, tokenizer: Any):
    rows = {"train_dataset": make_rows(8), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="got one whose parameters are all frozen"):
        PreferenceTrainer(tiny_llama().requires_grad_(False), make_args(), **rows)


@pytest.mark.parametrize("same", [True, False])
def test_the_reference_may_be_a_path(make_args: MakeArgs, model_dir: str, tokenizer: Any, same: bool):
    rows = {"train_dataset": make_rows(8), "processing_class": tokenizer}
    model = model_dir if same else tiny_llama(seed=1)
    trainer = PreferenceTrainer(model, make_args(max_steps=1), ref_model=model_dir, **rows)
    assert trainer.reference.kind == "copy"
    trainer.train()
    assert (trainer.state.log_history[0]["rewards/margins"] == 0.0) == same
    with pytest.raises(ValueError, match="ref_model: got './missing', and there is no such folder"):
        PreferenceTrainer(tiny_llama(), make_args(), ref_model="./missing", **rows)


def test_a_processor_has_its_tokenizer_inside(make_args: MakeArgs, make_tokenizer: Callable[..., Any]):
    tokenizer = make_tokenizer(chat_template=None)
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template="{{ messages }}", save_pretrained=print)
    assert tokenizer_of(processor) is tokenizer and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer_of(tokenizer) is tokenizer and tokenizer_of(None) is None
    trainer = PreferenceTrainer(
        tiny_llama(), make_args(max_steps=1), train_dataset=make_rows(4), processing_class=processor
    )
    assert trainer.processing_class is processor  # which is what is saved beside the model


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "all-linear"),
        (["all-linear"], "all-linear"),
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([r".*layers\.[01]\..*(q|v)_proj"], r".*layers\.[01]\..*(q|v)_proj"),
    ],
)
def test_modules_that_are_adapted(words: list[str], wanted: str | set[str]):
    flags = ["--lora_target_modules", *words] if words else []
    run = parse_train(["--model", "m", "--dataset", "d", "--use_cpu", "--use_peft", *flags])
    found = run.adapter.peft_config()
    assert found.target_modules == wanted
    adapted: Any = get_peft_model(tiny_llama(), found)
    names = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]
        for name, _ in adapted.named_parameters()
        if "lora_A" in name
    }
    assert names >= {"q_proj"} and ("o_proj" in names) == (wanted == "all-linear") and "lm_head" not in names


def test_warnings_of_other_libraries_about_later_versions_are_not_shown(
    make_args: MakeArgs, adapter_dir: str, tokenizer: Any, recwarn: pytest.WarningsRecorder
):
    recwarn.clear()
    load_model(adapter_dir)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = {"train_dataset": make_rows(4), "processing_class": tokenizer}
    PreferenceTrainer(tiny_llama(), make_args(), peft_config=config, **rows)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_a_new_adapter_begins_as_the_seed_says(make_args: MakeArgs, tokenizer: Any):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    first = []
    for seed in (1, 1, 2):
        trainer = PreferenceTrainer(
            tiny_llama(), make_args(seed=seed), train_dataset=make_rows(4), processing_class=tokenizer,
            peft_config=config,
        )  # fmt: skip
        first.append(next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).detach().clone())
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_rank_stabilised_and_directional_adapters(make_args: MakeArgs):
    words = ["--model", "m", "--dataset", "d", "--use_cpu", "--use_peft", "--use_rslora", "--use_dora"]
    found = parse_train(words).adapter.peft_config()
    assert found.use_rslora and found.use_dora
