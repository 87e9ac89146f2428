"""Other libraries' names of settings: what is the same under another name, and what to do about the rest.

TRL's names, and those that transformers has had, are taken where the setting means the same. Other libraries'
are refused with ours beside them: their values mean other things, or what they switch is not here.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from fastdpo.training.settings.sources import MIXTURES, read_mixture
from fastdpo.training.settings.values import NO, NOTHING, Hint, read_value

# The same setting, the same values.
ALIASES = {
    "model_name_or_path": "model",
    "model_revision": "revision",
    "torch_dtype": "dtype",
    "tokenizer_name_or_path": "tokenizer",
    "ref_model_name_or_path": "ref_model",
    "dataset_name": "dataset",
    "datasets": "dataset",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_dataset_split",
    "streaming": "dataset_streaming",
    "buffer_size": "shuffle_buffer_size",
    "preprocessing_num_workers": "dataset_num_proc",
    "precompute_ref_batch_size": "reference_batch_size",
    "activation_offloading": "offload_activations",
    "cpo_alpha": "nll_weight",
    "tpo_alpha": "nll_weight",
    "simpo_gamma": "gamma",
    "tpo_l_gamma": "gamma",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "test_split_size": "held_out",
    "no_cuda": "use_cpu",
}
# Something that is on or off there: our setting, and what it is when on. Off is our default.
SWITCHES = {
    "precompute_ref_log_probs": ("reference", "precomputed"),
    "padding_free": ("batch_layout", "packed"),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2"),
}
_BITS = "load_in_4bit and load_in_8bit are of bitsandbytes"
_BY_LENGTH = "max_length bounds prompt and answer together, and truncation_mode says which of them is cut"
_PAD = "the collator pads"
_TOKENS = "set the tokenizer's own special tokens, and save it"
# What may be given as off, or as nothing, and not as on; why.
UNSUPPORTED = {
    "generate_during_eval": "generations are not supported by this version",
    "is_encoder_decoder": "encoder-decoders are not supported by this version",
    "ignore_bias_buffers": "DDP's buffers are those of the model",
    "reference_free": "cpo is DPO under a uniform reference",
    "max_completion_length": _BY_LENGTH,
    "padding_value": f"not needed: {_PAD}, with the tokenizer's pad token",
    "pad_token": _TOKENS,
    "dataset_config": "load that configuration with `datasets`, save it, and give its folder as dataset",
}
_TEMPLATE = "the tokenizer's chat template is used, or chat_template, a file or the template itself"
_LOSS = "loss_type names the loss, and beta its strength"
_STEPS = "eval_strategy and eval_steps, save_strategy and save_steps take steps, shares of the run, or epochs"
_LOG = "report_to names the trackers, which read their own environment variables"
# What else is met in others' files and on others' command lines: what to do instead.
ELSEWHERE = {
    # TRL, of this version and of former ones
    "max_prompt_length": _BY_LENGTH,
    "max_target_length": _BY_LENGTH,
    "rpo_alpha": "loss_type: [sigmoid, sft] with loss_weights: [1, rpo_alpha]",
    "sft_weight": "loss_type: [simpo, sft] with loss_weights: [1, sft_weight]",
    "gamma_beta_ratio": "loss_type: simpo with gamma: beta x gamma_beta_ratio",
    "use_logits_to_keep": "not needed: only answers' tokens reach the head",
    "use_liger_loss": "not needed: no logits are made",
    "label_pad_token_id": f"not needed: {_PAD}",
    "ref_model_init_kwargs": "ref_model is loaded as model is",
    "model_adapter_name": "the model's active adapter is trained",
    "ref_adapter_name": "ref_model takes a path, reference: adapter the model without its adapter",
    "force_use_ref_model": "not needed: a ref_model that is given is used",
    "tools": "each row brings its own, in the column tools",
    # transformers, formerly
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "not needed: weights are written as safetensors",
    "fp16_opt_level": "fp16",
    # alignment-handbook
    "dataset_splits": "dataset_split and eval_dataset_split",
    "auto_insert_empty_system_msg": _TEMPLATE,
    "hub_model_revision": "hub_revision",
    # LLaMA-Factory
    "stage": _LOSS,
    "pref_loss": _LOSS,
    "pref_beta": "beta",
    "pref_ftx": "loss_type: [sigmoid, sft] with loss_weights: [1, pref_ftx]",
    "pref_bco_weight": "loss_type: [sigmoid, bco_pair] with loss_weights: [1, pref_bco_weight]",
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "finetuning_type": "use_peft: true for LoRA, false for all weights",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules, whose default is every linear layer but the head",
    "additional_target": "lora_modules_to_save",
    "adapter_name_or_path": "model takes an adapter's folder",
    "quantization_bit": _BITS,
    "quantization_method": _BITS,
    "flash_attn": "attn_implementation: flash_attention_2",
    "template": _TEMPLATE,
    "cutoff_len": "max_length",
    "max_samples": "give a file with the rows wanted as dataset",
    "dataset_dir": "dataset takes a path",
    "val_size": "held_out",
    "plot_loss": "not needed: curves.png is drawn at the end",
    "overwrite_cache": "not needed: what is kept is found by what it was made of",
    "neat_packing": "batch_layout: packed",
    "packing": "batch_layout: packed",
    # axolotl
    "base_model": "model",
    "base_model_config": "not needed: the model brings its own",
    "tokenizer_config": "tokenizer",
    "model_type": "not needed: the model says what it is",
    "tokenizer_type": "not needed: the tokenizer says what it is",
    "strict": "not needed: every setting is checked",
    "special_tokens": _TOKENS,
    "rl": _LOSS,
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "orpo_alpha": "beta, with loss_type: orpo",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "dpo_use_weighting": "use_weighting",
    "dpo_label_smoothing_factor": "label_smoothing",
    "test_datasets": "eval_dataset",
    "dataset_prepared_path": "not needed: rows are tokenised when a run starts",
    "val_set_size": "held_out",
    "sequence_len": "max_length",
    "sample_packing": "batch_layout: packed",
    "pad_to_sequence_len": "pad_to_multiple_of, or nothing: batches need no fixed length",
    "adapter": "use_peft: true for LoRA",
    "lora_model_dir": "model takes an adapter's folder",
    "lora_target_linear": "not needed: it is the default of lora_target_modules",
    "lora_fan_in_fan_out": "not needed: peft finds out",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "cosine_min_lr_ratio": "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}",
    "train_on_inputs": "nll_on_prompt, of losses with an NLL term; preference losses look at answers",
    "flash_attention": "attn_implementation: flash_attention_2",
    "xformers_attention": "attn_implementation: sdpa",
    "sdp_attention": "attn_implementation: sdpa",
    "evals_per_epoch": _STEPS,
    "saves_per_epoch": _STEPS,
    "early_stopping_patience": "transformers' EarlyStoppingCallback, from Python",
    "loss_watchdog_threshold": "on_nonfinite_loss, for losses that are not finite",
    "loss_watchdog_patience": "on_nonfinite_loss, for losses that are not finite",
    "eval_table_size": "generations are not supported by this version",
    "eval_max_new_tokens": "generations are not supported by this version",
    "wandb_project": _LOG,
    "wandb_entity": _LOG,
    "wandb_watch": _LOG,
    "wandb_name": "run_name",
    "wandb_log_model": _LOG,
    "plugins": "not needed: what plugins add there is here, or is not supported",
    # what people type
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epoch": "num_train_epochs",
    "steps": "max_steps",
    "warmup": "warmup_steps",
    "loss": "loss_type",
    "method": "loss_type",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "seq_len": "max_length",
    "model_name": "model",
    "model_path": "model",
    "model_id": "model",
    "reference_model": "ref_model",
    "data": "dataset",
    "data_path": "dataset",
    "train_data": "dataset",
    "train_file": "dataset",
    "train_dataset": "dataset",
    "eval_data": "eval_dataset",
    "validation_file": "eval_dataset",
    "test_size": "held_out",
    "output": "output_dir",
    "out": "output_dir",
    "save_dir": "output_dir",
    "lora": "use_peft",
    "use_lora": "use_peft",
    "rank": "lora_r",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "precision": "bf16 or fp16 for the computation, dtype for the weights",
    "mixed_precision": "bf16 or fp16",
    "device": "use_cpu, or the environment variable CUDA_VISIBLE_DEVICES",
    "cpu": "use_cpu",
    "gpus": "`accelerate launch` or `torchrun` starts a process a GPU",
    "num_gpus": "`accelerate launch` or `torchrun` starts a process a GPU",
    "resume": "resume_from_checkpoint",
    "layout": "batch_layout",
    "packed": "batch_layout: packed",
    "wandb": "report_to: wandb",
    "tensorboard": "report_to: tensorboard",
    "flash_attention_2": "attn_implementation: flash_attention_2",
    "overwrite": "overwrite_output_dir",
    "num_proc": "dataset_num_proc",
}
# Settings of the command line that are an argument in Python.
_IN_PYTHON = {
    "dataset_streaming": "in Python, train_dataset=read_rows(..., streaming=True)",
    "model_init_kwargs": "in Python, load the model with them and give it",
    "trust_remote_code": "in Python, load the model with it and give it",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "in Python, load the model with it and give it"),
}
_SWITCH = Hint(bool | None)


def our_names(given: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings under our names, and what is wrong with those that have none.

    Args:
        given: settings by any name, hyphens for underscores too.
        known: our names, of those who asked.

    Returns:
        The settings, and a text for each name that cannot be taken.
    """
    ours: dict[str, Any] = {}
    named: dict[str, str] = {}
    problems = []
    for written, value in given.items():
        name = written.replace("-", "_")
        try:
            found = _translated(name, value, known)
        except (KeyError, ValueError) as error:
            problems.append(str(error.args[0]))
            continue
        for ourselves, meant in found.items():
            if ourselves in named and meant is None:
                continue  # nothing is said by the second name
            if ours.get(ourselves) not in (None, meant):
                problems.append(f"{named[ourselves]} and {written}: give one of the two")
            named[ourselves], ours[ourselves] = written, meant
    return ours, problems


def _translated(name: str, value: Any, known: Collection[str]) -> dict[str, Any]:
    """A setting under our name; nothing for one that is off. Raises KeyError or ValueError with a text."""
    if name in known:
        return {name: value}
    if ALIASES.get(name) in known:
        if name == "warmup_ratio":
            value = _share(name, value)
        return {ALIASES[name]: value}
    if name in SWITCHES and SWITCHES[name][0] in known:
        ours, when_on = SWITCHES[name]
        return {ours: when_on} if read_value(name, _SWITCH, value) else {}
    if name in UNSUPPORTED:
        if value is None or str(value).strip().lower() in (*NO, *NOTHING):
            return {}
        raise ValueError(f"{name}: got {value!r}, wanted none or false: {UNSUPPORTED[name]}")
    if name in MIXTURES:
        return read_mixture(name, value)
    raise KeyError(f"{name}: not a setting of fastdpo{hint_for(name, known)}")


def _share(name: str, value: Any) -> Any:
    # From 1 on, warmup_steps is a number of steps.
    share = read_value(name, Hint(float | None), value)
    if share is not None and not 0 <= share < 1:
        raise ValueError(f"{name}: got {value!r}, wanted a share in [0, 1), or warmup_steps")
    return share or 0.0


def hint_for(name: str, known: Collection[str], prefix: str = "") -> str:
    """``; ...``: what to do about a name that is none of ``known``, which are shown with ``prefix``."""
    if name in _IN_PYTHON:
        return f"; {_IN_PYTHON[name]}"
    if name in ELSEWHERE:
        text = ELSEWHERE[name]
        return f"; use {prefix}{text}" if text in known else f"; {text}"
    elsewhere = {**ALIASES, **{theirs: ours for theirs, (ours, _) in SWITCHES.items()}}.get(name)
    if elsewhere is not None:
        return f"; it is {elsewhere} of the command line"
    near = difflib.get_close_matches(name, [*known, *ELSEWHERE], n=1, cutoff=0.75)
    if not near:
        return ""
    return hint_for(near[0], known, prefix) if near[0] not in known else f"; did you mean {prefix}{near[0]}?"
