"""Every option of the installed TRL's configs: the page, what is taken, and what is refused by name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.losses import all_loss_options
from fastdpo.training.settings.names import UNSUPPORTED
from fastdpo.training.settings.words import ArgumentError

pytest.importorskip("trl")
if importlib.metadata.version("trl") != "1.16.0":
    pytest.skip("the page is of TRL 1.16.0", allow_module_level=True)

from fastdpo.training.settings import trl_options as page  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "trl_options.md"
OPTIONS = page.trl_options()
# A value that is not the default, of options whose type does not say one that is taken.
VALUES: dict[str, Any] = {
    "model_init_kwargs": {"low_cpu_mem_usage": True},
    "pad_to_multiple_of": 8,
    "truncation_mode": "keep_end",
    "loss_type": ["hinge"],
    "loss_weights": [2.0],
    "f_divergence_type": "forward_kl",
    "attn_implementation": "eager",
    "dtype": "bfloat16",
    "datasets": [{"path": "d", "split": "train"}],
    "lora_target_parameters": ["experts.gate_up_proj"],
    "optim": "sgd",
    "optim_target_modules": ["q_proj"],
    "lr_scheduler_type": "cosine",
    "train_sampling_strategy": "sequential",
    "log_level": "info",
    "log_level_replica": "info",
    "debug": "underflow_overflow",
    "ddp_backend": "gloo",
    "accelerator_config": {"even_batches": False},
    "report_to": "none",
    "hub_strategy": "end",
    "ld_alpha": 0.5,
    "beta": 0.2,
    "dataset_name": "d",
    "warmup_steps": 3,
    "neftune_noise_alpha": 5.0,
    "deepspeed": None,
    "fsdp": None,
    "project": "p",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_quant_storage": "bfloat16",
    "router_aux_loss_coef": 0.25,
}
# Of another start, hardware, or tied to a second option.
NOT_TRIED = (
    "fsdp fsdp_config deepspeed parallelism_config fp16 fp16_full_eval tf32 local_rank debug ddp_backend "
    "eval_strategy eval_steps do_eval load_best_model_at_end metric_for_best_model greater_is_better "
    "push_to_hub resume_from_checkpoint torch_compile torch_compile_backend torch_compile_mode report_to "
    "save_strategy logging_strategy hub_strategy gradient_checkpointing gradient_checkpointing_kwargs bf16 "
    "activation_checkpointing activation_checkpointing_kwargs eval_on_start batch_eval_metrics "
    "lora_task_type dataloader_prefetch_factor dataloader_persistent_workers dataset_streaming streaming "
    "test_split_size "
    "prediction_loss_only use_peft bf16_full_eval jit_mode_eval lr_scheduler_kwargs optim_args "
    "restore_callback_states_from_checkpoint dataloader_multiprocessing_context"
).split()
LOSS = {"cpo_alpha": "cpo", "simpo_gamma": "cpo_simpo", "alpha": "simpo", "discopop_tau": "discopop"}


@pytest.mark.promise(23)
def test_none_is_left_out():
    from trl import DPOConfig, KTOConfig, ModelConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    for config in (DPOConfig, KTOConfig, CPOConfig, ORPOConfig, ModelConfig):
        for item in dataclasses.fields(config):
            assert config.__name__ in OPTIONS[item.name].defaults, item.name
    unknown = [name for name, option in OPTIONS.items() if option.kind == "unknown" or not option.ours]
    assert not unknown


def test_the_page_is_what_would_be_written():
    path = str(PAGE)
    assert page.main([path, "--check"]) == 0, f"run python -m fastdpo.training.settings.trl_options {path}"


def _parse(tmp_path: Path, **given: Any) -> Any:
    path = tmp_path / "theirs.yaml"
    names = {"model_name_or_path": "m", "output_dir": "o", "use_cpu": True}
    if not {"dataset_name", "datasets"} & given.keys():
        names["dataset_name"] = "d"
    path.write_text(yaml.safe_dump({**names, **given}))
    return parse_train([str(path)])


def _value(name: str) -> Any:
    if name in VALUES:
        return VALUES[name]
    default = next(iter(OPTIONS[name].defaults.values()))[0]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 2
    return default / 2 + 0.25 if isinstance(default, float) else None


def _found(run: Any, name: str) -> Any:
    if name in run.config.options:
        return run.config.options[name]
    part = next(p for p in (run.model, run.data, run.adapter, run.config) if hasattr(p, name))
    return getattr(part, name)


TRIED = [n for n, o in OPTIONS.items() if o.kind in ("same", "renamed") and n not in NOT_TRIED]
TRIED = [name for name in TRIED if _value(name) is not None]


@pytest.mark.parametrize("name", TRIED)
def test_a_value_under_trls_name_arrives(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())  # bitsandbytes, Liger
    option, value = OPTIONS[name], _value(name)
    more: dict[str, Any] = {}
    if option.ours in all_loss_options():
        takers = all_loss_options()[option.ours]
        more["loss_type"] = LOSS.get(name, next(iter(takers)))
    if name == "f_alpha_divergence_coef":
        more["f_divergence_type"] = "alpha_divergence"
    if name.startswith(("lora_", "use_rslora", "use_dora", "load_in_", "bnb_", "use_bnb")):
        more["use_peft"] = True
    if "bnb" in name:
        more["load_in_4bit"] = True
    if name == "loss_weights":
        more["loss_type"] = ["sigmoid"]
    found = _found(_parse(tmp_path, **{**more, name: value}), option.ours)
    found = getattr(found, "value", found)
    if name == "datasets":
        assert found == ["d"]
    elif name == "accelerator_config":
        assert found.even_batches is False
    else:
        assert found == value or str(found) == str(value)


def test_few_are_not_tried():
    assert len(TRIED) >= 75
    assert not [name for name in NOT_TRIED if name in TRIED]


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if o.kind == "refused"])
def test_what_is_refused_is_so_by_name_and_off_is_taken(tmp_path: Path, name: str):
    with pytest.raises((ArgumentError, ValueError), match=f"{name}: "):
        _parse(tmp_path, **{name: True})
    if name in UNSUPPORTED:
        _parse(tmp_path, **{name: next(iter(OPTIONS[name].defaults.values()))[0]})


def test_switches(tmp_path: Path):
    run = _parse(tmp_path, precompute_ref_log_probs=True, padding_free=True)
    assert (run.config.reference, run.config.batch_layout) == ("precomputed", "packed")


def test_the_same_default_is_the_same_in_the_settings(tmp_path: Path):
    """What the page says has TRL's default, without a value, is what TRL's own config has."""
    from trl import DPOConfig

    theirs = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    ours = _parse(tmp_path, report_to="none")
    held = 0
    for name, option in OPTIONS.items():
        if option.kind != "same" or not option.is_as_there or not hasattr(theirs, name):
            continue
        if name in ("beta", "bf16", "learning_rate", "output_dir", *all_loss_options()):
            continue  # none here, which the losses take for TRL's: `tests/losses`
        if name in ("gradient_checkpointing", "activation_checkpointing", "dataloader_pin_memory", "project"):
            continue  # by the machine
        if name == "hub_token":
            continue
        found, wanted = _found(ours, name), getattr(theirs, name)
        assert json.dumps(found, default=str) == json.dumps(wanted, default=str), name
        held += 1
    assert held > 90


def test_a_file_of_the_handbook_runs_as_it_is(tmp_path: Path):
    run = _parse(
        tmp_path,
        dataset_name=None,
        dataset_mixture={
            "datasets": [{"id": "a/b", "config": "default", "split": "train", "columns": ["chosen"]}],
            "seed": 42,
            "test_split_size": 1000,
        },
        eval_strategy="steps",
        eval_steps=100,
        torch_dtype="bfloat16",
        warmup_ratio=0.1,
        model_init_kwargs={"attn_implementation": "sdpa"},
    )
    assert (run.data.dataset, run.data.dataset_split, run.data.held_out) == ("a/b", "train", 1000)
    assert (run.model.dtype, run.model.attn_implementation) == ("bfloat16", "sdpa")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"dataset_mixer": {"a": 0.5}}, "dataset_mixer: got 0.5 of a, which is a part of its rows there"),
        ({"dataset_mixture": {"datasets": [{"id": "a", "config": "c"}]}}, "got the configuration 'c' of a"),
        ({"dataset_mixture": {"datasets": ["a"]}}, "wanted datasets, a list of their id, split and weight"),
        ({"model_init_kwargs": {"revision": "r"}, "model_revision": "s"}, "got revision, which is"),
        (
            {"lora_task_type": "SEQ_CLS", "use_peft": True},
            "lora_task_type: got 'SEQ_CLS'",
        ),
    ],
)
def test_what_a_file_of_theirs_cannot_have(tmp_path: Path, given: dict[str, Any], problem: str):
    given = (
        given
        if "dataset_mixer" not in given and "dataset_mixture" not in given
        else {**given, "datasets": None}
    )
    with pytest.raises((ArgumentError, ValueError), match=re.escape(problem)):
        _parse(tmp_path, **given)
