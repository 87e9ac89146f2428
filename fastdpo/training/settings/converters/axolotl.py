"""axolotl's files with ``rl: dpo``, ``ipo``, ``kto``, ``orpo`` or ``simpo``, of 2026's schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdpo.training.settings.converters.parts import Theirs, one_or_all

MARKS = ("base_model", "rl", "micro_batch_size", "sequence_len", "adapter", "lora_target_linear")

_SAME = {
    "base_model": "model",
    "tokenizer_config": "tokenizer",
    "revision_of_model": "revision",
    "trust_remote_code": "trust_remote_code",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "val_set_size": "held_out",
    "dataset_processes": "dataset_num_proc",
    "dataset_num_proc": "dataset_num_proc",
    "lora_r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_modules_to_save": "lora_modules_to_save",
    "lora_target_parameters": "lora_target_parameters",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "use_kernels": "use_kernels",
    "wandb_name": "run_name",
    "dpo_use_weighting": "use_weighting",
    "pad_to_multiple_of": "pad_to_multiple_of",
    "torch_compile_backend": "torch_compile_backend",
    "streaming": "dataset_streaming",
}
_ADAPTER = tuple(n for n in _SAME.values() if n.startswith("lora_") or n in ("use_dora", "use_rslora"))
_OWN_OPTIMISERS = ("muon", "dion", "came_pytorch", "optimi_adamw", "ao_adamw_fp8", "adopt_adamw", "q_galore")
_TOKENS = "set the tokenizer's own special tokens, and save it"
_PACK = "pairs are not packed there; batch_layout: packed has no padding"
_KERNEL = "of axolotl's own kernels"
_SPLIT = "of axolotl's own ways to split a model: engine has FSDP2 and DeepSpeed"
_WATCH = "on_nonfinite_loss, for losses that are not finite"
_LEFT = {
    "special_tokens": _TOKENS,
    "tokens": _TOKENS,
    "added_tokens_overrides": _TOKENS,
    "eot_tokens": _TOKENS,
    "sample_packing": _PACK,
    "eval_sample_packing": _PACK,
    "batch_flattening": _PACK,
    "train_on_inputs": "answers alone are scored",
    "loss_watchdog_threshold": _WATCH,
    "loss_watchdog_patience": _WATCH,
    "early_stopping_patience": "transformers' EarlyStoppingCallback, from Python",
    "resize_token_embeddings_to_32x": _TOKENS,
    "trainer_cls": "the trainer is PreferenceTrainer",
    "reward_model": "of reward models",
    "process_reward_model": "of reward models",
    "max_prompt_len": "max_length bounds prompt and answer together",
    "eval_sequence_len": "max_length is of both",
    "lora_fan_in_fan_out": "peft finds out",
    "lora_mlp_kernel": _KERNEL,
    "lora_qkv_kernel": _KERNEL,
    "lora_o_kernel": _KERNEL,
    "lora_embedding_kernel": _KERNEL,
    "fused_attn_kernel": _KERNEL,
    "chunked_cross_entropy": "not needed: no logits are made",
    "tiled_mlp": _KERNEL,
    "context_parallel_size": _SPLIT,
    "sequence_parallel_degree": _SPLIT,
    "tensor_parallel_size": _SPLIT,
    "dp_shard_size": _SPLIT,
    "dp_replicate_size": _SPLIT,
    "layer_offloading": _SPLIT,
    "loraplus_lr_ratio": "optim takes the optimisers of transformers",
    "lr_groups": "one learning rate is here",
    "embedding_lr": "one learning rate is here",
    "unfrozen_parameters": "lora_modules_to_save, with an adapter",
    "cosine_constant_lr_ratio": "lr_scheduler_kwargs of transformers' schedules",
    "lora_rank_pattern": "in Python, peft_config takes any LoraConfig",
    "lora_alpha_pattern": "in Python, peft_config takes any LoraConfig",
    "peft_layers_to_transform": "in Python, peft_config takes any LoraConfig",
    "peft_init_lora_weights": "in Python, peft_config takes any LoraConfig",
    "relora": "not here",
    "gptq": "4 and 8 bits of bitsandbytes are here",
    "qat": "not here",
    "fp8": "not here",
    "wandb_project": "the environment variable WANDB_PROJECT",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_watch": "WANDB_WATCH",
    "wandb_log_model": "WANDB_LOG_MODEL",
    "wandb_run_id": "WANDB_RUN_ID",
    "default_system_message": "put it into the rows",
    "curriculum_sampling": "train_sampling_strategy: sequential",
    "dataset_exact_deduplication": "rows that are the same are counted, and kept",
    "excess_length_strategy": "truncation_mode: skip leaves out, keep_start cuts",
    "hub_strategy": "",
    "rpo_alpha": "loss_type: [sigmoid, sft] with loss_weights: [1, rpo_alpha]",
    "generate_samples": "generations are not here",
    "eval_table_size": "generations are not here",
    "dpo_generate_during_eval": "generations are not here",
    "bnb_config_kwargs": "bnb_4bit_* have those of 4 bits",
    "overrides_of_model_config": "set it in the model's config.json",
    "chat_template_kwargs": "a row's own chat_template_kwargs",
    "vllm": "of on-policy training",
    "freeze_mm_modules": "",
    "do_bench_eval": "not here",
    "save_first_step": "not here",
}
# Settings of how axolotl works, which have no counterpart because none is needed.
_SILENT = frozenset(
    (
        "model_type tokenizer_type strict base_model_config dataset_prepared_path lora_target_linear "
        "pad_to_sequence_len shuffle_merged_datasets skip_prepare_dataset save_safetensors processor_type "
        "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model is_falcon_derived_model "
        "tokenizer_use_fast tokenizer_legacy dataset_keep_in_memory low_cpu_mem_usage dpo_padding_free "
        "dpo_use_logits_to_keep ddp device_map local_rank world_size gc_steps gc_collect_steps "
        "include_tokens_per_second include_tkps use_wandb flash_attn_cross_entropy embeddings_skip_upcast "
        "mean_resizing_embeddings fsdp_version dpo_use_liger_kernel hf_use_auth_token hub_strategy"
    ).split()
)
_ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
    "xformers_attention": "sdpa",
}
_LIGER = {
    "liger_rope": "rope",
    "liger_rms_norm": "rms_norm",
    "liger_layer_norm": "layer_norm",
    "liger_glu_activation": "swiglu",
    "liger_swiglu": "swiglu",
}
# What named strategies read a row's prompt from; answers in them are `chosen` and `rejected` or `completion`.
_PROMPTS = {
    "intel": "question",
    "icr": "input",
    "ultra": "prompt",
    "prompt_pairs": "prompt",
    "argilla": "instruction",
}


def convert(given: dict[str, Any]) -> Theirs:
    """Ours of theirs.

    Raises:
        ValueError: no ``rl``, or one that is not of preferences.
    """
    theirs = Theirs(given)
    kind = str(theirs.take("rl", ""))
    if kind not in ("dpo", "ipo", "kto", "orpo", "simpo"):
        raise ValueError(f"rl: got {kind or 'none'!r}, wanted dpo, ipo, kto, orpo or simpo")
    theirs.rename(_SAME)
    if not theirs.ours.get("held_out"):
        theirs.ours.pop("held_out", None)
    theirs.default(max_length=512, per_device_train_batch_size=1, num_train_epochs=1.0)
    _losses(theirs, kind)
    _adapter(theirs)
    _data(theirs)
    _steps(theirs)
    _machine(theirs)
    theirs.drop({name: why for name, why in _LEFT.items() if why})
    theirs.given = {name: value for name, value in theirs.given.items() if name not in _SILENT}
    theirs.rest((), "not a setting that this converter knows")
    return theirs


def _losses(theirs: Theirs, kind: str) -> None:
    of_trl = theirs.take("trl", {}) or {}
    beta = of_trl.get("beta", theirs.take("rl_beta", theirs.take("dpo_beta", theirs.take("orpo_alpha"))))
    for name in ("rl_beta", "dpo_beta", "orpo_alpha"):
        theirs.take(name)
    theirs.put("beta", 0.1 if beta is None else beta)
    gamma, nll = theirs.take("simpo_gamma", 0.5), theirs.take("cpo_alpha", 1.0)
    desirable = (theirs.take("kto_desirable_weight", 1.0), theirs.take("kto_undesirable_weight", 1.0))
    smoothing, losses = theirs.take("dpo_label_smoothing"), theirs.take("dpo_loss_type")
    weights, is_scored = theirs.take("dpo_loss_weights"), theirs.switch("precompute_ref_log_probs")
    if kind == "dpo":
        theirs.put("loss_type", losses or "sigmoid")
        theirs.put("loss_weights", weights)
        theirs.put("label_smoothing", smoothing)
    elif kind == "kto":
        theirs.put("loss_type", "kto")
        theirs.put("desirable_weight", desirable[0])
        theirs.put("undesirable_weight", desirable[1])
    elif kind == "simpo":  # TRL's CPOTrainer, whose NLL term has the weight cpo_alpha
        theirs.put("loss_type", "cpo_simpo" if float(nll) else "simpo")
        theirs.put("gamma", gamma)
        theirs.put("nll_weight", nll if float(nll) else None)
    else:
        theirs.put("loss_type", kind)
    if is_scored:
        theirs.put("reference", "precomputed")
    for name, value in of_trl.items():
        if name in ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"):
            theirs.put(name, value)
        elif name != "beta" and value is not None:
            theirs.leave(f"trl.{name}", "of on-policy training")


def _adapter(theirs: Theirs) -> None:
    kind, folder = theirs.take("adapter"), theirs.take("lora_model_dir")
    is_all, targets = theirs.switch("lora_target_linear"), theirs.take("lora_target_modules")
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if theirs.switch(name)]
    if kind == "qlora" and not bits:
        bits = ["load_in_4bit"]
    for name in bits:
        theirs.put(name, True)
    if "load_in_4bit" in bits:
        theirs.put("bnb_4bit_quant_type", "nf4")
        theirs.put("use_bnb_nested_quant", True)
    if kind in ("lora", "qlora") and folder is None:
        theirs.put("use_peft", True)
        theirs.put("lora_target_modules", None if is_all else targets)
        return
    if folder is not None:
        theirs.put("model", folder)  # whose training goes on: the adapter names its base
    elif kind is not None:
        theirs.leave("adapter", f"{kind} is not here: lora and qlora are")
    for name in _ADAPTER:
        theirs.ours.pop(name, None)


def _data(theirs: Theirs) -> None:
    columns: dict[str, Any] = {}
    for name, ours in (("datasets", "dataset"), ("test_datasets", "eval_dataset")):
        parts = theirs.take(name) or []
        found, splits = [], []
        for part in parts:
            found.append(_source(theirs, part, columns))
            splits.append(part.get("split") or ("train" if ours == "dataset" else "test"))
        theirs.put(ours, one_or_all(found) if found else None)
        if any(part.get("split") for part in parts):
            theirs.put(f"{ours}_split", one_or_all(splits))
    for column, value in columns.items():
        if value != column.removesuffix("_column"):
            theirs.put(column, value)
    template, text = theirs.take("chat_template"), theirs.take("chat_template_jinja")
    theirs.put("chat_template", text)
    if text is None and template not in (None, "tokenizer_default", "jinja"):
        theirs.leave(
            "chat_template",
            f"{template} is axolotl's name for one: the tokenizer's own is used; chat_template takes a file "
            "or the template itself",
        )


def _source(theirs: Theirs, part: Mapping[str, Any], columns: dict[str, Any]) -> str:
    """A data set's path, and the columns that it has the parts of a row in; those of several are one."""
    path, kind = str(part.get("path")), part.get("type")
    named: dict[str, Any] = {}
    if isinstance(kind, Mapping):
        for name in ("prompt", "chosen", "rejected", "completion", "label"):
            named[f"{name}_column"] = kind.get(f"field_{name}")
        for name in (
            "prompt_format",
            "chosen_format",
            "rejected_format",
            "completion_format",
            "field_system",
        ):
            if kind.get(name):
                theirs.leave(
                    f"datasets.type.{name}", "texts are taken as they are, messages by the chat template"
                )
    else:
        strategy = str(kind or "").partition(".")[2]
        if str(kind or "").startswith("chat_template"):
            named["prompt_column"] = part.get("field_messages", "messages" if strategy == "default" else None)
        elif strategy in _PROMPTS:
            named["prompt_column"] = _PROMPTS[strategy]
            theirs.left_out["datasets.type"] = (
                f"{kind} writes its template's words around texts; here texts are taken as they are, and "
                "messages by the chat template: give messages"
            )
        if strategy.startswith("argilla_chat") or kind == "chat_template.argilla":
            theirs.put("ignore_columns", ["prompt"])  # the answers hold the whole conversation
        for name in ("chosen", "rejected"):
            named[f"{name}_column"] = part.get(f"field_{name}")
    for column, value in named.items():
        if value is not None and columns.setdefault(column, value) != value:
            theirs.left_out[f"datasets.{column}"] = (
                f"{path} has {value}: what a column is called is said once for all"
            )
    mapping = part.get("message_property_mappings") or {}
    if any(ours != name for ours, name in mapping.items()) or any(
        names != [role] for role, names in (part.get("roles") or {}).items()
    ):
        theirs.left_out["datasets.message_property_mappings"] = (
            "messages have role and content, and the chat template's roles: rename them in the data"
        )
    for name in ("name", "revision", "shards", "field", "input_transform"):
        if part.get(name):
            theirs.left_out[f"datasets.{name}"] = (
                "load the rows with `datasets`, save them, and give their folder"
            )
    files = part.get("data_files")
    if files and path in ("json", "csv", "parquet", "arrow"):
        return str(files if isinstance(files, str) else files[0])
    return path


def _steps(theirs: Theirs) -> None:
    epochs = float(theirs.ours.get("num_train_epochs", 1.0))
    for name, ours in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        times = theirs.take(name)
        if not times:
            continue
        if ours == "eval" and not theirs.ours.get("held_out") and "eval_dataset" not in theirs.ours:
            theirs.leave(name, "no rows to evaluate on are named")
        elif float(times) * epochs <= 1:  # a share of 1 would be a step
            theirs.put(f"{ours}_strategy", "epoch")
        else:
            theirs.put(f"{ours}_strategy", "steps")
            theirs.put(f"{ours}_steps", round(1 / (float(times) * epochs), 6))
    if theirs.given.get("hub_model_id"):
        theirs.put("push_to_hub", True)
    schedule, low = theirs.take("lr_scheduler", "cosine"), theirs.take("cosine_min_lr_ratio")
    if schedule in ("one_cycle", "rex"):
        theirs.leave("lr_scheduler", f"{schedule} is axolotl's own: cosine stands in its place")
        schedule = "cosine"
    if low and schedule == "cosine":
        theirs.put("lr_scheduler_kwargs", {"min_lr_rate": low})
        schedule = "cosine_with_min_lr"
    theirs.put("lr_scheduler_type", schedule)
    if "warmup_steps" not in theirs.given and "warmup_ratio" not in theirs.given:
        theirs.put("warmup_steps", 0.03)
    optimiser = str(theirs.ours.get("optim", ""))
    if optimiser.startswith(_OWN_OPTIMISERS):
        theirs.ours.pop("optim")
        theirs.leave("optimizer", f"{optimiser} is axolotl's own: adamw_torch_fused stands in its place")
    theirs.put("output_dir", theirs.take("output_dir", "./model-out"))


def _machine(theirs: Theirs) -> None:
    for name, ours in _ATTENTION.items():
        if theirs.switch(name):
            theirs.put("attn_implementation", ours)
    theirs.put("attn_implementation", theirs.take("attn_implementation"))
    for name, dtype in (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")):
        if theirs.switch(name):
            theirs.put("dtype", dtype)
    for name in ("bf16", "tf32", "torch_compile"):
        value = theirs.take(name)
        if value is not None and value != "auto":
            theirs.put(name, value)
    checkpointing, offload = (
        theirs.take("gradient_checkpointing", False),
        theirs.take("activation_offloading"),
    )
    theirs.put("gradient_checkpointing", checkpointing if isinstance(checkpointing, bool) else True)
    if offload not in (None, False) or checkpointing in ("offload", "offload_disk"):
        theirs.put("offload_activations", True)
    is_fsdp2 = 2 in (theirs.take("fsdp_version"), (theirs.given.get("fsdp_config") or {}).get("fsdp_version"))
    fsdp, config = theirs.take("fsdp"), theirs.take("fsdp_config")
    if fsdp or config:
        if is_fsdp2:
            theirs.put("engine", "fsdp2")
        theirs.leave(
            "fsdp_config", "engine: fsdp2 has our choices" if is_fsdp2 else "FSDP2 is here: engine: fsdp2"
        )
    if theirs.switch("use_tensorboard"):
        theirs.put("report_to", "tensorboard")
    elif "wandb_project" in theirs.given:
        theirs.put("report_to", "wandb")
    _plugins(theirs)


def _plugins(theirs: Theirs) -> None:
    plugins = [str(name) for name in theirs.take("plugins") or []]
    kernels = {ours: theirs.switch(name) for name, ours in _LIGER.items() if name in theirs.given}
    for name in list(theirs.given):
        if name.startswith(("liger_", "cut_cross_entropy")):
            theirs.take(name)  # of logits, which are not made
    for name in plugins:
        if "liger" in name.lower():
            theirs.put("use_liger_kernel", True)
            theirs.put("liger_kernel_config", kernels or None)
        elif "cut_cross_entropy" not in name:
            theirs.leave(f"plugins.{name.rpartition('.')[2]}", "plugins are axolotl's own")
