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


def sees_images(config: Any) -> bool:
    """Whether a config is of a model of images and text."""
    import transformers as hf

    return type(config) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: Any, *, with_images: bool = False) -> Any:
    """``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` for what only that one knows (LLaVA).

    Of a family in both it is the first: of some checkpoints of vision and language (Qwen3.5, Llama 4) that
    makes the language model alone.

    Args:
        with_images: the data have images, for which the language model alone will not do.
    """
    import transformers as hf

    causal, seeing = hf.MODEL_FOR_CAUSAL_LM_MAPPING, hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = type(config)
    if with_images and kind in seeing:
        return hf.AutoModelForImageTextToText
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind in seeing and kind not in causal and not has_own_code:
        return hf.AutoModelForImageTextToText
    return hf.AutoModelForCausalLM
