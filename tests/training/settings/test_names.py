"""Other libraries' names: TRL's mean what they mean there, the rest is refused with ours beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.losses import all_loss_options
from fastdpo.training.settings.names import ALIASES, ELSEWHERE, SWITCHES, UNSUPPORTED, our_names
from fastdpo.training.settings.run import AdapterArguments, DataArguments, ModelArguments
from fastdpo.training.settings.sources import MIXTURES
from fastdpo.training.settings.values import hints_of
from fastdpo.training.settings.words import ArgumentError

RUN = (ModelArguments, DataArguments, AdapterArguments, PreferenceConfig)
KNOWN = [*(name for kind in RUN for name in hints_of(kind)), *all_loss_options()]
_LENGTH = "max_length bounds prompt and answer together"
_LOSS = "loss_type names the loss"
_LOG = "report_to names the trackers"
_STEPS = "eval_strategy and eval_steps"
_HANDBOOK = (
    "bf16 beta do_eval eval_steps gradient_accumulation_steps gradient_checkpointing "
    "gradient_checkpointing_kwargs hub_model_id learning_rate log_level logging_steps lr_scheduler_type "
    "max_length num_train_epochs optim output_dir per_device_train_batch_size per_device_eval_batch_size "
    "push_to_hub save_strategy save_steps save_total_limit seed warmup_ratio model_name_or_path torch_dtype"
)
_FACTORY = (
    "model_name_or_path trust_remote_code do_train dataset dataloader_num_workers output_dir logging_steps "
    "save_steps overwrite_output_dir report_to per_device_train_batch_size gradient_accumulation_steps "
    "learning_rate num_train_epochs lr_scheduler_type warmup_ratio bf16 ddp_timeout preprocessing_num_workers"
)
_FACTORY_REFUSED = {
    "stage": _LOSS,
    "finetuning_type": "use_peft",
    "lora_rank": "use lora_r",
    "lora_target": "lora_target_modules",
    "pref_beta": "use beta",
    "template": "chat template",
    "cutoff_len": "use max_length",
    "max_samples": "give a file",
    "plot_loss": "curves.png",
}
_AXOLOTL = (
    "datasets load_in_8bit output_dir chat_template lora_r lora_alpha lora_dropout "
    "gradient_accumulation_steps learning_rate bf16 tf32 gradient_checkpointing "
    "resume_from_checkpoint logging_steps weight_decay"
)
_AXOLOTL_REFUSED = {
    "base_model": "use model",
    "model_type": "not needed",
    "tokenizer_type": "not needed",
    "special_tokens": "special tokens",
    "rl": _LOSS,
    "dataset_prepared_path": "not needed",
    "val_set_size": "use held_out",
    "sequence_len": "use max_length",
    "sample_packing": "batch_layout: packed",
    "pad_to_sequence_len": "pad_to_multiple_of",
    "adapter": "use_peft",
    "lora_model_dir": "an adapter's folder",
    "lora_target_linear": "not needed",
    "wandb_project": _LOG,
    "wandb_entity": _LOG,
    "wandb_watch": _LOG,
    "wandb_name": "use run_name",
    "wandb_log_model": _LOG,
    "micro_batch_size": "use per_device_train_batch_size",
    "num_epochs": "use num_train_epochs",
    "optimizer": "use optim",
    "lr_scheduler": "use lr_scheduler_type",
    "flash_attention": "attn_implementation: flash_attention_2",
    "evals_per_epoch": _STEPS,
    "saves_per_epoch": _STEPS,
}
# Of public recipe files: the settings that are taken, and what each of the others is answered with.
RECIPES: dict[str, tuple[str, dict[str, str]]] = {
    "alignment-handbook, zephyr-7b-beta, DPO full": (
        _HANDBOOK + " eval_strategy dataset_num_proc dataset_mixture",
        {"max_prompt_length": _LENGTH},
    ),
    "alignment-handbook, zephyr-7b-beta, DPO QLoRA": (
        _HANDBOOK + " evaluation_strategy use_peft lora_r lora_alpha lora_dropout lora_target_modules "
        "preprocessing_num_workers dataset_mixer load_in_4bit",
        {
            "dataset_splits": "dataset_split and eval_dataset_split",
            "max_prompt_length": _LENGTH,
        },
    ),
    "alignment-handbook, zephyr-141b, ORPO": (
        "model_name_or_path model_revision torch_dtype attn_implementation chat_template dataset_name "
        "dataset_train_split dataset_num_proc bf16 beta gradient_accumulation_steps gradient_checkpointing "
        "gradient_checkpointing_kwargs hub_model_id learning_rate log_level logging_steps lr_scheduler_type "
        "max_length num_train_epochs optim output_dir per_device_train_batch_size push_to_hub report_to "
        "save_strategy seed warmup_steps",
        {"max_prompt_length": _LENGTH},
    ),
    "alignment-handbook, smollm3, APO": (
        "model_name_or_path model_revision torch_dtype attn_implementation trust_remote_code bf16 "
        "dataset_num_proc do_eval eval_strategy gradient_accumulation_steps gradient_checkpointing run_name "
        "output_dir gradient_checkpointing_kwargs hub_strategy learning_rate log_level logging_steps "
        "logging_strategy lr_scheduler_type lr_scheduler_kwargs max_grad_norm beta loss_type max_length "
        "num_train_epochs overwrite_output_dir per_device_train_batch_size push_to_hub padding_free "
        "report_to save_strategy save_steps save_total_limit seed use_liger_kernel warmup_ratio "
        "dataset_mixture",
        {},
    ),
    "SimPO, llama-3-8b-instruct": (
        _HANDBOOK + " evaluation_strategy use_flash_attention_2 preprocessing_num_workers run_name report_to "
        "dataset_mixer",
        {
            "dataset_splits": "dataset_split",
            "gamma_beta_ratio": "loss_type: simpo with gamma: beta x gamma_beta_ratio",
            "max_prompt_length": _LENGTH,
        },
    ),
    "LLaMA-Factory, qwen3 LoRA, DPO": (
        _FACTORY + " save_only_model resume_from_checkpoint",
        {**_FACTORY_REFUSED, "pref_loss": _LOSS},
    ),
    "LLaMA-Factory, qwen3 LoRA, KTO": (_FACTORY, _FACTORY_REFUSED),
    "axolotl, llama-3 LoRA, DPO": (_AXOLOTL + " load_in_4bit warmup_steps", _AXOLOTL_REFUSED),
    "axolotl, mistral QLoRA, ORPO": (
        _AXOLOTL
        + " remove_unused_columns lora_target_modules fp16 local_rank debug deepspeed fsdp fsdp_config "
        "warmup_steps group_by_length load_in_4bit",
        {
            **_AXOLOTL_REFUSED,
            "strict": "not needed",
            "orpo_alpha": "beta, with loss_type: orpo",
            "lora_fan_in_fan_out": "not needed",
            "train_on_inputs": "nll_on_prompt",
            "early_stopping_patience": "EarlyStoppingCallback",
            "xformers_attention": "attn_implementation",
            "loss_watchdog_threshold": "on_nonfinite_loss",
            "loss_watchdog_patience": "on_nonfinite_loss",
            "eval_table_size": "generations",
            "eval_max_new_tokens": "generations",
        },
    ),
}
# What texts name beside settings.
WORDS = ("min_lr_rate", "cosine_with_min_lr", "flash_attention_2", "bco_pair")
# Values that decide what is said; all others are left open.
_VALUES: dict[str, Any] = {
    "dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0},
    "dataset_mixture": {"datasets": [{"id": "a/b", "config": "default", "split": "train", "weight": 1.0}]},
    "warmup_ratio": 0.1,
    "padding_free": True,
    "use_flash_attention_2": True,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_settings_of_a_recipe_are_here(recipe: str):
    taken, refused = RECIPES[recipe]
    given: dict[str, Any] = {name: _VALUES.get(name) for name in (*taken.split(), *refused)}
    ours, problems = our_names(given, KNOWN)
    assert set(ours) <= set(KNOWN) and len(problems) == len(refused)
    for problem, (name, text) in zip(problems, refused.items(), strict=True):
        assert problem.startswith(f"{name}: ") and text in problem
    # Nothing is lost on the way, but for switches that are off.
    off = [name for name in taken.split() if name in {*SWITCHES, *UNSUPPORTED} and not given[name]]
    mixtures = [name for name in taken.split() if name in MIXTURES]
    of_mixtures = {name for mixture in mixtures for name in our_names({mixture: given[mixture]}, KNOWN)[0]}
    assert len(ours) - len(of_mixtures) == len(taken.split()) - len(off) - len(mixtures)


def test_simpo_without_its_loss_does_not_train_as_dpo(tmp_path: Path):
    path = tmp_path / "simpo.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset_name: d\nbeta: 10\ngamma_beta_ratio: 0.3\ndataset_splits: [a]\n"
    )
    with pytest.raises(ArgumentError) as refusal:
        parse_train([str(path)])
    first, *lines = str(refusal.value).splitlines()
    assert first == f"{path}: " and len(lines) == 2  # all of a file's at once
    assert lines[0] == (
        "  gamma_beta_ratio: not a setting of fastdpo; loss_type: simpo with gamma: beta x gamma_beta_ratio"
    )


@pytest.mark.parametrize(
    ("theirs", "value", "ours"),
    [
        *((name, "x", {ours: "x"}) for name, ours in ALIASES.items() if name != "warmup_ratio"),
        ("warmup_ratio", 0.1, {"warmup_steps": 0.1}),
        ("warmup_ratio", 0, {"warmup_steps": 0.0}),
        ("padding_free", True, {"batch_layout": "packed"}),
        ("padding_free", "false", {}),
        ("precompute_ref_log_probs", True, {"reference": "precomputed"}),
        ("group_by_length", False, {}),
        ("group_by_length", "yes", {"train_sampling_strategy": "group_by_length"}),
        ("use_flash_attention_2", True, {"attn_implementation": "flash_attention_2"}),
        ("is_encoder_decoder", False, {}),
        ("pad_token", None, {}),
        ("learning-rate", 1, {"learning_rate": 1}),
    ],
)
def test_names_that_mean_the_same(theirs: str, value: Any, ours: dict[str, Any]):
    assert our_names({theirs: value}, KNOWN) == (ours, [])
    assert set(ours) <= set(KNOWN)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"warmup_ratio": 1}, "warmup_ratio: got 1, wanted a share in [0, 1), or warmup_steps"),
        ({"pad_token": "x"}, "pad_token: got 'x', wanted none or false: set the tokenizer's own"),
        ({"model": "a", "model_name_or_path": "b"}, "model and model_name_or_path: give one of the two"),
        (
            {"padding_free": True, "batch_layout": "padded"},
            "padding_free and batch_layout: give one of the two",
        ),
        ({"no_such_key": None}, "no_such_key: not a setting of fastdpo"),
        ({"lr": 1}, "lr: not a setting of fastdpo; use learning_rate"),
        ({"batch_size": 1}, "batch_size: not a setting of fastdpo; use per_device_train_batch_size"),
        ({"max_seq_lenght": 1}, "max_seq_lenght: not a setting of fastdpo; use max_length"),
        ({"betta": 1}, "betta: not a setting of fastdpo; did you mean beta?"),
    ],
)
def test_names_that_do_not(given: dict[str, Any], problem: str):
    _, problems = our_names(given, KNOWN)
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_the_tables_name_settings_that_there_are():
    assert set(ALIASES.values()) | {ours for ours, _ in SWITCHES.values()} <= set(KNOWN)
    assert not {*ELSEWHERE, *ALIASES, *SWITCHES, *UNSUPPORTED} & set(KNOWN)
    for name, text in ELSEWHERE.items():
        # A text that is one word is a setting, and so are words with an underscore.
        for word in re.findall(r"^\w+$|\b[a-z]+_\w+", text):
            assert word in (*KNOWN, name, *WORDS), (name, word)


def test_names_of_others_in_python():
    args = PreferenceConfig(
        use_cpu=True, loss_type="simpo", simpo_gamma=1.5, padding_free=True, warmup_ratio=0.1
    )
    assert args.options == {"gamma": 1.5} and args.batch_layout == "packed" and args.warmup_steps == 0.1
    with pytest.raises(TypeError, match="PreferenceConfig: gamma_beta_ratio: not a setting .* gamma: beta x"):
        PreferenceConfig(gamma_beta_ratio=0.5)
    with pytest.raises(TypeError, match="model_name_or_path: not a setting of fastdpo; it is model of "):
        PreferenceConfig(model_name_or_path="m")


def test_names_of_others_on_the_command_line():
    words = (
        "--model_name_or_path m --dataset-name d --use_cpu --model-revision r --padding_free --simpo_gamma 2"
    )
    run = parse_train([*words.split(), "--loss_type", "cpo_simpo", "--dataset_test_split", "test"])
    assert (run.model.model, run.data.dataset, run.model.revision) == ("m", "d", "r")
    assert run.config.batch_layout == "packed" and run.config.options == {"gamma": 2.0}
    assert (run.data.eval_dataset, run.data.eval_dataset_split) == ("d", "test")
    for word, hint in (
        ("--lr", "; use --learning_rate"),
        ("--batch_size=4", "; use --per_device_train_batch_size"),
        ("--cutoff-len", "; use --max_length"),
        ("run.yaml", ": a YAML file comes first, or after --config"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(f"unknown argument {word}{hint}")):
            parse_train([*words.split(), word])
    with pytest.raises(ArgumentError, match="model_name_or_path and model: give one"):
        parse_train([*words.split(), "--model", "other"])


def test_an_adapter_that_is_not_described_is_trls():
    """But for dropout, which TRL has 0.05 of."""
    ours, theirs = AdapterArguments(), pytest.importorskip("trl").ModelConfig()
    assert (ours.lora_r, ours.lora_alpha) == (theirs.lora_r, theirs.lora_alpha)
