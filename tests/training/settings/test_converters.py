"""``fastdpo convert-config``: public recipes of four projects become files that our parser reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdpo.cli import main
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.converters.convert import convert, source_of
from fastdpo.training.settings.words import ArgumentError
from fastdpo.training.settings.yaml_file import read_settings

FOREIGN = Path(__file__).parent / "foreign"
# Of files of each project, from its repository: whose they are, some of what they become, what is left out.
FILES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama_factory_dpo": (
        "llama-factory",
        {
            "model": "Qwen/Qwen3-4B-Instruct-2507",
            "loss_type": "sigmoid",
            "beta": 0.1,
            "max_length": 2048,
            "use_peft": True,
            "lora_r": 8,
            "lora_alpha": 16,
            "dataset_num_proc": 16,
            "warmup_steps": 0.1,
            "num_train_epochs": 3.0,
        },
        {"dataset", "template", "max_samples"},
    ),
    "llama_factory_kto": (
        "llama-factory",
        {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "use_peft": True},
        {"dataset", "template", "max_samples"},
    ),
    "axolotl_dpo": (
        "axolotl",
        {
            "model": "meta-llama/Meta-Llama-3-8B-Instruct",
            "loss_type": "sigmoid",
            "beta": 0.1,
            "max_length": 4096,
            "load_in_8bit": True,
            "use_peft": True,
            "lora_r": 32,
            "lora_alpha": 16,
            "dataset": "fozziethebeat/alpaca_messages_2k_dpo_test",
            "prompt_column": "conversation",
            "held_out": 0.05,
            "eval_strategy": "steps",
            "eval_steps": 0.0625,
            "save_steps": 0.25,
            "optim": "adamw_bnb_8bit",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "per_device_train_batch_size": 2,
            "attn_implementation": "flash_attention_2",
        },
        {"chat_template", "special_tokens"},
    ),
    "axolotl_kto": (
        "axolotl",
        {
            "loss_type": "kto",
            "beta": 0.5,
            "desirable_weight": 0.2,
            "undesirable_weight": 1.0,
            "load_in_4bit": True,
            "use_bnb_nested_quant": True,
            "dataset_split": "train",
            "save_strategy": "epoch",
        },
        {"datasets.type", "special_tokens", "evals_per_epoch"},
    ),
    "axolotl_orpo": (
        "axolotl",
        {
            "loss_type": "orpo",
            "beta": 0.1,
            "load_in_4bit": True,
            "held_out": 0.1,
            "ignore_columns": ["prompt"],
        },
        {"chat_template", "loss_watchdog_threshold", "loss_watchdog_patience"},
    ),
    "handbook_qlora": (
        "alignment-handbook",
        {
            "model": "alignment-handbook/zephyr-7b-sft-qlora",
            "loss_type": "sigmoid",
            "beta": 0.01,
            "dataset": "HuggingFaceH4/ultrafeedback_binarized",
            "dataset_split": "train_prefs",
            "eval_dataset_split": "test_prefs",
            "load_in_4bit": True,
            "lora_r": 128,
            "dtype": "bfloat16",
            "warmup_steps": 0.1,
        },
        {"max_prompt_length"},
    ),
    "handbook_apo": (
        "alignment-handbook",
        {"loss_type": "apo_zero", "beta": 0.05, "batch_layout": "packed", "use_liger_kernel": True},
        {"dataset_mixture"},
    ),
    "handbook_orpo": (
        "alignment-handbook",
        {"loss_type": "orpo", "beta": 0.05, "revision": "main", "bf16": True, "warmup_steps": 100},
        {"max_prompt_length"},
    ),
}
LLAMA_FACTORY = {
    "model_name_or_path": "m",
    "stage": "dpo",
    "output_dir": "o",
    "cutoff_len": 512,
    "dataset": "d",
}
AXOLOTL = {
    "base_model": "m",
    "rl": "dpo",
    "datasets": [{"path": "d"}],
    "micro_batch_size": 4,
    "learning_rate": 1e-5,
}
HANDBOOK = {"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "output_dir": "o"}


@pytest.fixture
def has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that are not here are."""
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())


def load(settings: dict[str, Any], folder: Path) -> Any:
    """As our own parser reads it, on a machine without a GPU."""
    here = {
        "use_cpu": True,
        "bf16": False,
        "tf32": None,
        "report_to": "none",
        "dataset": "d",
        "optim": "adamw_torch",
    }
    path = folder / "ours.yaml"
    path.write_text(
        yaml.safe_dump({**settings, **{k: v for k, v in here.items() if k in settings or k == "use_cpu"}})
    )
    return parse_train([str(path), "--dataset", "d"])


@pytest.mark.parametrize("name", FILES)
def test_a_public_file_becomes_one_of_ours(name: str, tmp_path: Path, has_all: None):
    source, wanted, left_out = FILES[name]
    path = FOREIGN / f"{name}.yaml"
    given = read_settings(path)
    assert source_of(given) == source
    found, _ = convert(given, folder=FOREIGN)
    assert {key: found.ours.get(key) for key in wanted} == wanted
    assert set(found.left_out) == left_out
    run = load({key: value for key, value in found.ours.items() if key != "push_to_hub"}, tmp_path)
    assert run.config.loss_type == [wanted["loss_type"]] and run.config.beta == found.ours["beta"]


def test_what_is_printed_is_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert-config", str(FOREIGN / "axolotl_dpo.yaml")]) == 0
    shown = capsys.readouterr()
    found, _ = convert(read_settings(FOREIGN / "axolotl_dpo.yaml"))
    assert yaml.safe_load(shown.out) == found.ours
    assert "#   special_tokens: set the tokenizer's own special tokens" in shown.out
    assert "special_tokens: set the tokenizer's own" in shown.err
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({**LLAMA_FACTORY, "stage": "sft"}))
    assert main(["convert-config", str(tmp_path / "sft.yaml")]) == 2
    assert "stage: got 'sft', wanted dpo or kto" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text("alpha: 1\n")
    assert main(["convert-config", str(tmp_path / "x.yaml")]) == 2
    assert "whose it is cannot be told by its settings; say --from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (
            {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.0},
            {"loss_type": "simpo", "beta": 2.0, "gamma": 1.0},
        ),
        ({"pref_loss": "orpo"}, {"loss_type": "orpo", "beta": 0.1, "nll_on_prompt": False}),
        ({"pref_ftx": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        ({"pref_bco_weight": 1.0}, {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.5, 0.5]}),
        ({"dpo_label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ({"finetuning_type": "full"}, {"use_peft": None, "lora_r": None}),
        (
            {"lora_target": "q_proj,v_proj", "lora_rank": 4},
            {"lora_target_modules": ["q_proj", "v_proj"], "lora_alpha": 8},
        ),
        (
            {"quantization_bit": 4},
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True},
        ),
        ({"quantization_bit": 8}, {"load_in_8bit": True}),
        ({"flash_attn": "sdpa"}, {"attn_implementation": "sdpa"}),
        ({"enable_liger_kernel": True}, {"use_liger_kernel": True}),
        ({"moe_aux_loss_coef": 0.01}, {"router_aux_loss_coef": 0.01}),
        ({"adapter_name_or_path": "a"}, {"model": "a", "use_peft": None}),
        (
            {"val_size": 0.1, "disable_shuffling": True},
            {"held_out": 0.1, "train_sampling_strategy": "sequential"},
        ),
        ({"max_length": 77, "top_p": 0.5}, {"max_length": 512}),  # of its generations
        ({"max_steps": 5}, {"max_steps": 5, "num_train_epochs": None}),
    ],
)
def test_llama_factorys_values(given: dict[str, Any], ours: dict[str, Any], tmp_path: Path, has_all: None):
    found, _ = convert({**LLAMA_FACTORY, **given}, "llama-factory", folder=tmp_path)
    assert {key: found.ours.get(key) for key in ours} == ours
    load(found.ours, tmp_path)


def test_llama_factorys_data_sets(tmp_path: Path):
    (tmp_path / "data").mkdir()
    info = {
        "mine": {
            "file_name": "mine.json",
            "ranking": True,
            "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
        },
        "hub": {
            "hf_hub_url": "a/b",
            "ranking": True,
            "formatting": "sharegpt",
            "subset": "en",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    found, _ = convert({**LLAMA_FACTORY, "dataset": "mine"}, folder=tmp_path)
    assert found.ours["dataset"] == str(tmp_path / "data" / "mine.json")
    assert (found.ours["prompt_column"], found.ours["chosen_column"]) == ("question", "good")
    found, _ = convert({**LLAMA_FACTORY, "dataset": "hub"}, folder=tmp_path)
    assert found.ours["dataset"] == "a/b" and found.ours["prompt_column"] == "conversations"
    assert {"hub.tags", "hub.subset"} <= found.left_out.keys()


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"rl": "ipo"}, {"loss_type": "ipo", "beta": 0.1}),
        (
            {"rl": "simpo", "simpo_gamma": 1.0, "rl_beta": 2.0},
            {"loss_type": "cpo_simpo", "nll_weight": 1.0, "gamma": 1.0},
        ),
        ({"rl": "simpo", "cpo_alpha": 0.0}, {"loss_type": "simpo", "nll_weight": None, "gamma": 0.5}),
        ({"dpo_loss_type": ["hinge"], "rl_beta": 0.2}, {"loss_type": ["hinge"], "beta": 0.2}),
        ({"adapter": "qlora"}, {"load_in_4bit": True, "use_peft": True, "bnb_4bit_quant_type": "nf4"}),
        (
            {"adapter": "lora", "lora_target_linear": True, "lora_target_modules": ["q_proj"]},
            {"lora_target_modules": None},
        ),
        ({"adapter": "lora", "lora_target_modules": ["q_proj"]}, {"lora_target_modules": ["q_proj"]}),
        (
            {},
            {
                "max_length": 512,
                "num_train_epochs": 1.0,
                "warmup_steps": 0.03,
                "lr_scheduler_type": "cosine",
                "output_dir": "./model-out",
            },
        ),
        (
            {"cosine_min_lr_ratio": 0.1},
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        (
            {
                "datasets": [
                    {
                        "path": "json",
                        "data_files": ["a.jsonl"],
                        "type": {"field_prompt": "q", "field_chosen": "c"},
                    }
                ]
            },
            {"dataset": "a.jsonl", "prompt_column": "q", "chosen_column": "c"},
        ),
        ({"datasets": [{"path": "a", "type": "chatml.intel"}]}, {"prompt_column": "question"}),
        (
            {"gradient_checkpointing": "offload"},
            {"gradient_checkpointing": True, "offload_activations": True},
        ),
        (
            {
                "plugins": ["axolotl.integrations.liger.LigerPlugin"],
                "liger_rope": True,
                "liger_glu_activation": True,
            },
            {"use_liger_kernel": True, "liger_kernel_config": {"rope": True, "swiglu": True}},
        ),
        ({"fsdp_version": 2, "fsdp_config": {"x": 1}}, {"engine": "fsdp2"}),
        ({"trl": {"sync_ref_model": True}, "precompute_ref_log_probs": False}, {"sync_ref_model": True}),
        (
            {"bfloat16": True, "bf16": "auto", "sdp_attention": True},
            {"dtype": "bfloat16", "bf16": None, "attn_implementation": "sdpa"},
        ),
    ],
)
def test_axolotls_values(given: dict[str, Any], ours: dict[str, Any], tmp_path: Path, has_all: None):
    found, _ = convert({**AXOLOTL, **given})
    assert {key: found.ours.get(key) for key in ours} == ours
    load(found.ours, tmp_path)


@pytest.mark.parametrize(
    ("given", "trainer", "ours"),
    [
        ({}, None, {"loss_type": "sigmoid", "beta": 0.1, "num_train_epochs": 3.0, "learning_rate": 1e-6}),
        ({}, "orpo", {"loss_type": "orpo"}),
        ({"output_dir": "data/zephyr-orpo"}, None, {"loss_type": "orpo"}),
        ({"desirable_weight": 2.0}, None, {"loss_type": "kto", "desirable_weight": 2.0}),
        ({"cpo_alpha": 0.5}, None, {"loss_type": "cpo", "nll_weight": 0.5}),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0},
            None,
            {"loss_type": "simpo", "gamma": 0.5, "nll_weight": None},
        ),
        ({"loss_type": "hinge"}, "cpo", {"loss_type": "cpo", "comparison": "hinge", "nll_weight": 1.0}),
        ({"gamma_beta_ratio": 0.3, "beta": 10.0}, None, {"loss_type": "simpo", "beta": 10.0, "gamma": 3.0}),
        ({"use_peft": True}, None, {"lora_dropout": 0.05, "dtype": "float32", "learning_rate": 1e-6}),
    ],
)
def test_trls_values(given: dict[str, Any], trainer: str | None, ours: dict[str, Any], tmp_path: Path):
    found, _ = convert({**HANDBOOK, **given}, trainer=trainer)
    assert {key: found.ours.get(key) for key in ours} == pytest.approx(ours)
    load(found.ours, tmp_path)


def test_names_that_nobody_knows_are_named():
    for given, source in ((LLAMA_FACTORY, "llama-factory"), (AXOLOTL, "axolotl")):
        found, told = convert({**given, "no_such_key": 3})
        assert told == source and found.left_out["no_such_key"] == "not a setting that this converter knows"
    found, _ = convert({**HANDBOOK, "no_such_key": 3})
    assert "no_such_key" in found.left_out
    with pytest.raises(ValueError, match="rl: got 'grpo', wanted dpo"):
        convert({**AXOLOTL, "rl": "grpo"})


def test_a_trainer_is_of_trls_files(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(AXOLOTL))
    from fastdpo.training.settings.converters.convert import convert_config

    with pytest.raises(ArgumentError, match="--trainer: got 'orpo'"):
        convert_config(path, trainer="orpo")
