"""LLaMA-Factory's files of ``stage: dpo`` and ``kto``, of 2026's ``hparams``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdpo.training.settings.converters.parts import Theirs, listed, one_or_all

MARKS = ("stage", "finetuning_type", "pref_beta", "pref_loss", "pref_ftx", "cutoff_len", "template")

_SAME = {
    "model_name_or_path": "model",
    "model_revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "ref_model": "ref_model",
    "ld_alpha": "ld_alpha",
    "freeze_vision_tower": "freeze_vision_tower",
    "cutoff_len": "max_length",
    "val_size": "held_out",
    "streaming": "dataset_streaming",
    "buffer_size": "shuffle_buffer_size",
    "preprocessing_num_workers": "dataset_num_proc",
    "overwrite_output_dir": "overwrite_output_dir",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "enable_liger_kernel": "use_liger_kernel",
    "hf_hub_token": "hub_token",
}
_OPTIMISER = "optim takes the optimisers of transformers, with optim_args and optim_target_modules"
_GENERATION = "of generations, which a training run makes none of"
_IMAGES = "of images and films, whose size the processor has"
_SERVING = "of serving, which is not training"
_TOKENS = "add them to the model and the tokenizer, and save both"
_LOG = "report_to names the trackers, which read their own environment variables"
_KT = "of KTransformers, which is not here"
_PROFILER = "torch's profiler, from Python"
_LEFT = {
    "do_train": "",
    "plot_loss": "",
    "overwrite_cache": "",
    "preprocessing_batch_size": "",
    "use_fast_tokenizer": "",
    "low_cpu_mem_usage": "",
    "ddp_timeout": "",
    "data_shared_file_system": "",
    "ignore_pad_token_for_loss": "",
    "lora_target": "",
    "use_unsloth_gc": "",
    "template": "the tokenizer's own is used; chat_template takes a file or the template itself",
    "max_samples": "give a file with the rows wanted as dataset, or max_steps",
    "mix_strategy": "dataset_weights has the shares of data sets",
    "interleave_probs": "dataset_weights has the shares of data sets",
    "tokenized_path": "what is tokenised is kept, and found again, by itself",
    "mask_history": "answers alone are scored",
    "train_on_prompt": "answers alone are scored",
    "eval_on_each_dataset": "in Python, a dict of evaluation sets",
    "ref_model_adapters": "merge them (`fastdpo merge`), and give ref_model the result",
    "ref_model_quantization_bit": "the reference is loaded as the model is",
    "create_new_adapter": "merge the adapter (`fastdpo merge`), and give model the result with use_peft",
    "pissa_init": "in Python, peft_config takes any LoraConfig",
    "pissa_convert": "as pissa_init",
    "loraplus_lr_ratio": _OPTIMISER,
    "use_galore": "optim: galore_adamw",
    "use_apollo": "optim: apollo_adamw",
    "use_badam": _OPTIMISER,
    "use_adam_mini": _OPTIMISER,
    "use_muon": _OPTIMISER,
    "use_llama_pro": "not here",
    "use_mca": "Megatron is not here",
    "use_megatron_bridge": "Megatron is not here",
    "use_hyper_parallel": "not here",
    "use_dft_loss": "of fine-tuning",
    "use_asft_loss": "of fine-tuning",
    "use_eaft_loss": "of fine-tuning",
    "early_stopping_steps": "transformers' EarlyStoppingCallback, from Python",
    "compute_accuracy": "",
    "include_effective_tokens_per_second": "",
    "use_unsloth": "not needed: no logits are made",
    "rope_scaling": "set it in the model's config.json",
    "shift_attn": "not here",
    "mixture_of_depths": "not here",
    "resize_vocab": _TOKENS,
    "add_tokens": _TOKENS,
    "add_special_tokens": _TOKENS,
    "new_special_tokens_config": _TOKENS,
    "split_special_tokens": "not here",
    "upcast_layernorm": "dtype is of all weights",
    "upcast_lmhead_output": "not needed: logits are fp32",
    "train_from_scratch": "make the model, save it, and give its folder",
    "cache_dir": "the environment variable HF_HOME",
    "ms_hub_token": "hubs other than Hugging Face's are not here",
    "om_hub_token": "hubs other than Hugging Face's are not here",
    "print_param_status": "`fastdpo doctor` shows it",
    "adapter_folder": "give the adapter's own folder",
    "fp8": "not here",
    "use_reentrant_gc": "",
    "use_v1_kernels": "use_kernels has the hub's",
    "use_kt": _KT,
    "media_dir": "give images with their path",
    "default_system": "put it into the rows",
    "tool_format": "the chat template's own",
    "enable_thinking": "a row's chat_template_kwargs",
    "preserve_thinking": "a row's chat_template_kwargs",
    "freeze_multi_modal_projector": "",
    "freeze_language_model": "not here",
    "use_swanlab": "report_to: swanlab",
    "disable_version_check": "",
}
# Families of names, by how they begin.
_FAMILIES = {
    "galore_": _OPTIMISER,
    "apollo_": _OPTIMISER,
    "badam_": _OPTIMISER,
    "loraplus_": _OPTIMISER,
    "freeze_": "finetuning_type: freeze is not here",
    "ppo_": "of PPO",
    "reward_model": "of PPO",
    "swanlab_": _LOG,
    "ray_": "`torchrun` or `accelerate launch` start processes",
    "profiler_": _PROFILER,
    "enable_torch_profiler": _PROFILER,
    "image_": _IMAGES,
    "video_": _IMAGES,
    "audio_": _IMAGES,
    "use_audio_in_video": _IMAGES,
    "crop_to_patches": _IMAGES,
    "export_": "of `llamafactory-cli export`",
    "vllm_": _SERVING,
    "sglang_": _SERVING,
    "infer_": _SERVING,
    "kt_": _KT,
    "oft_": "OFT: in Python, peft_config",
}
# What its generations are told, some of it by names of ours that mean something else.
_OF_GENERATION = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "max_length",
    "max_new_tokens",
    "repetition_penalty",
    "length_penalty",
    "skip_special_tokens",
    "predict_with_generate",
    "eval_num_beams",
)
_ATTENTION = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa", "disabled": "eager"}


def convert(given: dict[str, Any], folder: Path) -> Theirs:
    """Ours of theirs.

    Args:
        folder: where the file is, below or beside which ``dataset_info.json`` is looked for.

    Raises:
        ValueError: a stage that is not of preferences.
    """
    theirs = Theirs(given)
    stage = theirs.take("stage", "sft")
    if stage not in ("dpo", "kto"):
        raise ValueError(f"stage: got {stage!r}, wanted dpo or kto, whose losses are of preferences")
    for name in _OF_GENERATION:
        if name in theirs.given:
            theirs.leave(name, _GENERATION)
    theirs.rename(_SAME)
    theirs.default(max_length=2048)
    _losses(theirs, stage)
    _tuning(theirs)
    _data(theirs, folder)
    _machine(theirs)
    for name in list(theirs.given):
        why = next((text for begin, text in _FAMILIES.items() if name.startswith(begin)), None)
        if why is not None:
            theirs.drop({name: why})
    silent = {name for name, why in _LEFT.items() if not why}
    theirs.drop({name: why for name, why in _LEFT.items() if why})
    theirs.given = {name: value for name, value in theirs.given.items() if name not in silent}
    theirs.rest((), "not a setting that this converter knows")
    theirs.default(num_train_epochs=3.0, learning_rate=5e-5)
    if not theirs.ours.get("fp16"):
        theirs.default(bf16=False)
    return theirs


def _losses(theirs: Theirs, stage: str) -> None:
    beta, loss = theirs.take("pref_beta", 0.1), theirs.take("pref_loss", "sigmoid")
    theirs.put("beta", beta)
    gamma = theirs.take("simpo_gamma", 0.5)
    weights = (theirs.take("kto_chosen_weight", 1.0), theirs.take("kto_rejected_weight", 1.0))
    smoothing = theirs.take("dpo_label_smoothing", 0.0)
    bco, nll = float(theirs.take("pref_bco_weight", 0.0)), float(theirs.take("pref_ftx", 0.0))
    if stage == "kto":
        theirs.put("loss_type", "kto")
        theirs.put("desirable_weight", weights[0])
        theirs.put("undesirable_weight", weights[1])
        if nll:
            theirs.leave("pref_ftx", "an NLL term beside KTO is not here")
        return
    if loss == "kto_pair":
        theirs.leave(
            "pref_loss", "kto_pair is no loss of LLaMA-Factory's own TRL; sigmoid stands in its place"
        )
        loss = "sigmoid"
    losses, shares = [loss], [1.0]
    if bco:
        losses.append("bco_pair")
        shares = [1 / (1 + bco), bco / (1 + bco)]
    if nll:
        losses.append("sft")
        shares.append(nll)
        theirs.left_out["pref_ftx"] = "kept as the loss sft: a mean over tokens here, over answers there"
    theirs.put("loss_type", one_or_all(losses))
    if len(losses) > 1:
        theirs.put("loss_weights", shares)
    if loss == "simpo":
        theirs.put("gamma", gamma)
    if loss == "orpo":
        theirs.put("nll_on_prompt", False)
        theirs.left_out["pref_loss"] = "kept: orpo's NLL is a mean over tokens here, over answers there"
    if smoothing and loss == "sigmoid":
        theirs.put("label_smoothing", smoothing)
    elif smoothing:
        theirs.leave("dpo_label_smoothing", f"{loss} has none")


def _tuning(theirs: Theirs) -> None:
    kind, adapters = theirs.take("finetuning_type", "lora"), listed(theirs.take("adapter_name_or_path"))
    rank = int(theirs.take("lora_rank", 8))
    alpha, targets = theirs.take("lora_alpha"), listed(theirs.take("lora_target", "all"))
    kept = listed(theirs.take("additional_target"))
    if kind not in ("lora", "full"):
        theirs.leave("finetuning_type", f"{kind} is not here: lora and full are")
    if kind != "lora":
        for name in ("lora_dropout", "use_rslora", "use_dora"):
            theirs.ours.pop(name, None)
    elif len(adapters) == 1 and not theirs.given.get("create_new_adapter"):
        theirs.put("model", adapters[0])  # whose training goes on: the adapter names its base
        for name in ("lora_dropout", "use_rslora", "use_dora"):
            theirs.ours.pop(name, None)
    else:
        if adapters:
            theirs.leave("adapter_name_or_path", "merge them (`fastdpo merge`), and give model the result")
        theirs.put("use_peft", True)
        theirs.put("lora_r", rank)
        theirs.put("lora_alpha", 2 * rank if alpha is None else alpha)
        theirs.put("lora_target_modules", None if targets == ["all"] else targets)
        theirs.put("lora_modules_to_save", kept or None)


def _data(theirs: Theirs, folder: Path) -> None:
    directory = theirs.take("dataset_dir", "data")
    for name in ("dataset", "eval_dataset"):
        names = listed(theirs.take(name))
        if not names:
            continue
        known = _dataset_info(folder, str(directory))
        found = [_source(theirs, name, each, known, str(directory)) for each in names]
        theirs.put(name, one_or_all(found))
    if theirs.switch("disable_shuffling"):
        theirs.put("train_sampling_strategy", "sequential")
    if theirs.switch("packing") | theirs.switch("neat_packing"):
        theirs.put("batch_layout", "packed")


def _dataset_info(folder: Path, directory: str) -> dict[str, Any]:
    for base in (folder, *folder.resolve().parents, Path()):
        path = base / directory / "dataset_info.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            return {name: {**entry, "folder": path.parent} for name, entry in found.items()}
    return {}


def _source(theirs: Theirs, setting: str, name: str, known: dict[str, Any], directory: str) -> str:
    """The file or the id of a data set, with the columns that it has the parts of a row in."""
    entry = known.get(name)
    if entry is None:
        theirs.left_out[setting] = (
            f"{name} is a name of {directory}/dataset_info.json, which was not found: give its file or id"
        )
        return name
    columns = {"instruction": "prompt"} if entry.get("formatting", "alpaca") == "alpaca" else {}
    given = dict(entry.get("columns") or {"prompt": "instruction"})
    for theirs_name, ours in (
        ("prompt", "prompt"),
        ("messages", "prompt"),
        ("chosen", "chosen"),
        ("rejected", "rejected"),
        ("kto_tag", "label"),
        ("response", "completion"),
    ):
        column = given.get(theirs_name, next((c for c, our in columns.items() if our == theirs_name), None))
        if column is not None and column != ours and setting == "dataset":
            theirs.put(f"{ours}_column", column)
    for part in ("query", "history", "system"):
        if part in given:
            theirs.left_out[f"{name}.columns.{part}"] = (
                "put it into the prompt: a row here has one column for it"
            )
    if entry.get("tags") or entry.get("formatting") == "sharegpt":
        tags = entry.get("tags") or {}
        if (tags.get("role_tag", "from"), tags.get("content_tag", "value")) != ("role", "content"):
            theirs.left_out[f"{name}.tags"] = (
                "messages here have role and content: rename from and value in the data"
            )
    if entry.get("subset"):
        theirs.left_out[f"{name}.subset"] = (
            "load that configuration with `datasets`, save it, and give its folder"
        )
    if entry.get("split") and setting == "dataset":
        theirs.put("dataset_split", entry["split"])
    return str(entry.get("hf_hub_url") or entry["folder"] / entry.get("file_name", name))


def _machine(theirs: Theirs) -> None:
    attention = theirs.take("flash_attn", "auto")
    theirs.put("attn_implementation", _ATTENTION.get(str(attention)))
    bits, method = theirs.take("quantization_bit"), theirs.take("quantization_method", "bnb")
    kind, is_nested = theirs.take("quantization_type", "nf4"), theirs.switch("double_quantization", True)
    if bits is not None:
        if int(bits) in (4, 8) and str(method) in ("bnb", "bitsandbytes"):
            theirs.put(f"load_in_{bits}bit", True)
            if int(bits) == 4:
                theirs.put("bnb_4bit_quant_type", kind)
                theirs.put("use_bnb_nested_quant", is_nested)
        else:
            theirs.leave(
                "quantization_bit", f"{bits} bits of {method}: 4 and 8 bits of bitsandbytes are here"
            )
    if theirs.switch("pure_bf16"):
        theirs.put("dtype", "bfloat16")
    if theirs.switch("disable_gradient_checkpointing"):
        theirs.put("gradient_checkpointing", False)
