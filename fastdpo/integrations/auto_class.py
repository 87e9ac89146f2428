"""Which auto class of transformers makes a model with a language model's head, of a path or hub id."""

from __future__ import annotations

from typing import Any

# What of the options of a loader says where and how a config is read.
_OF_CONFIG = (
    "revision",
    "code_revision",
    "trust_remote_code",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
)


def read_config(name: str, **options: Any) -> Any:
    """The config of a model, with those of a loader's options that concern it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, **{key: options[key] for key in _OF_CONFIG if key in options})


def auto_class(config: Any) -> Any:
    """``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` for what only that one knows (LLaVA).

    Of a family in both it is the first: of some checkpoints of vision and language (Qwen3.5, Llama 4) that
    makes the language model alone.
    """
    import transformers as hf

    causal, with_images = hf.MODEL_FOR_CAUSAL_LM_MAPPING, hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = type(config)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind in with_images and kind not in causal and not has_own_code:
        return hf.AutoModelForImageTextToText
    return hf.AutoModelForCausalLM
