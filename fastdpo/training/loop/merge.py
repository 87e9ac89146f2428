"""``fastdpo merge``: an adapter and its base as one model of 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fastdpo.training.loop.checkpoint_files import check_weights
from fastdpo.training.loop.models import load_model, load_tokenizer
from fastdpo.training.loop.run_record import SETTINGS_FILE
from fastdpo.training.settings.quantisation import QuantisationArguments
from fastdpo.training.settings.yaml_file import read_settings

_BITS = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)


def merge(adapter: str, output_dir: Path, *, dtype: str, base: str, trust_remote_code: bool = False) -> None:
    """``fastdpo merge``: write the merged model and its tokenizer into a folder of their own.

    Args:
        adapter: its folder or id.
        base: of a base of few bits: ``trained``, the weights that were trained on, or ``original``.

    Raises:
        ValueError: the folder is in use; and as `merged_model`.
    """
    if output_dir.is_file() or output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"output_dir: got {output_dir}, which is in use, wanted a folder that is not there, or empty"
        )
    bits = bits_of(Path(adapter)) if base == "trained" else QuantisationArguments()
    bits.check_quantisation()
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model = merged_model(adapter, dtype, bits, **options)
    tokenizer = _tokenizer(adapter, model.name_or_path, options)
    model.save_pretrained(output_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)
    how = " of the dequantised base" if bits.is_quantised else ""
    print(f"merged into {output_dir}: {dtype}{how}")


def merged_model(adapter: str, dtype: str, bits: QuantisationArguments, **options: Any) -> Any:
    """The base of an adapter with the adapter merged into its weights.

    Args:
        adapter: its folder or id.
        dtype: of the result: ``bfloat16``, ``float16`` or ``float32``.
        bits: what the base was quantised to in training, which is undone before.
        options: of ``load_model``, for the base.

    Raises:
        ValueError: no adapter, or one whose base is not known or cannot be loaded; or weights in a checkpoint
            have changed since they were written.
        ImportError: without peft.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise ImportError("adapter: merging needs peft, which is not installed: pip install peft") from None
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter: got {adapter!r}, which is none: {str(error).splitlines()[0]}") from None
    if not config.base_model_name_or_path:
        raise ValueError(f"adapter: got {adapter!r}, which does not name its base")
    check_weights(Path(adapter), "adapter")
    precision = getattr(torch, dtype)
    if bits.is_quantised:
        options["quantization_config"] = bits.quantisation_config(dtype)
    base: Any = load_model(config.base_model_name_or_path, what="base", dtype=dtype, **options)
    if bits.is_quantised:
        base = base.dequantize(dtype=precision)
    base = base.to(precision)
    is_tied = _untie(base)
    try:
        adapted = PeftModel.from_pretrained(base, adapter)
    except SafetensorError as error:
        raise ValueError(f"adapter: could not load {adapter!r}: {error}") from error
    merged = adapted.merge_and_unload(safe_merge=True).to(precision)
    if is_tied and torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight):
        _set_tied(merged, True)
        merged.tie_weights()
    return merged


def bits_of(folder: Path) -> QuantisationArguments:
    """What the settings beside an adapter say of the bits of its base; none without settings."""
    path = folder / SETTINGS_FILE
    given = read_settings(path) if path.is_file() else {}
    return QuantisationArguments(**{name: given[name] for name in _BITS if name in given})


def _untie(model: Any) -> bool:
    """Whether the head was the embedding; it is not any more: an adapter may be of one of them alone."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    _set_tied(model, False)
    return True


def _set_tied(model: Any, value: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = value


def _tokenizer(adapter: str, base: str, options: dict[str, Any]) -> Any:
    """The adapter's, which may have a chat template of its own, or the base's; None where neither has one."""
    for name in (adapter, base):
        try:
            return load_tokenizer(name, or_processor=True, **options)
        except ValueError:
            continue
    return None
