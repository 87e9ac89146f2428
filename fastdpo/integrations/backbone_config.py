"""What a model's config says of its backbone: its size, its kinds of layers, how far they look."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.partitioned import whole_shape

# Layers whose tokens see those before them, all or within a window, and nothing else.
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Types of layers whose time does not grow with the square of a row.
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "moe", "mlp"})
# Fields that say over how many tokens a layer looks, or in pieces of how many.
_SPAN = re.compile(r"window|chunk|local(?!_experts)|block_size|stride|budget|topk")


def text_config(model: nn.Module) -> Any:
    """The config of a causal LM's text model, wrapped or not."""
    inner: Any = unwrap(model)
    return inner.config.get_text_config()


def takes_positions(model: nn.Module) -> bool:
    """Whether a patched model's backbone takes ``position_ids``."""
    hook = getattr(type(unwrap(model)), "_fastdpo_hook", None)
    return hook is None or "position_ids" in hook.tail.arguments


def why_no_neighbours(model: nn.Module) -> str | None:
    """Why a row may hold one sequence only, or None, as far as a patched model's config says."""
    if not takes_positions(model):
        return "its backbone takes no position_ids, which would start again with each sequence"
    types = set(getattr(text_config(model), "layer_types", None) or ())
    if unknown := sorted(types - _KNOWN_LAYERS):
        return f"its layers of type {', '.join(unknown)} may look at more than a row's forest"
    return None


class BackboneSize(NamedTuple):
    """What the time of a backbone depends on: layers, entries of their matrices, width of the attention."""

    layers: int
    parameters: int
    attention_width: float  # of a layer, on average


def backbone_size(model: nn.Module) -> BackboneSize:
    """The size of a causal LM without its embeddings and its head."""
    inner: Any = unwrap(model)
    outer = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    left_out = {id(weight) for module in outer if module is not None for weight in module.parameters()}
    shapes = [whole_shape(p) for p in inner.parameters() if id(p) not in left_out]
    matrices = sum(shape.numel() for shape in shapes if len(shape) > 1)
    hidden = whole_shape(inner.get_output_embeddings().weight)[-1]
    config = text_config(model)
    layers = layer_configs(config) or [config]
    types = getattr(config, "layer_types", None) or [""] * len(layers)
    widths = [
        _attention_width(layer, hidden)
        for layer, kind in zip(layers, types, strict=False)
        if kind not in _WITHOUT_ATTENTION
    ]
    return BackboneSize(len(layers), max(matrices, 1), sum(widths) / len(layers))


def layer_configs(config: Any) -> list[Any]:
    """The config of each layer, some of whose fields may be the layer's own.

    Of a config whose layers differ transformers gives those fields by the layer only, and raises where they
    are read from the whole.

    Args:
        config: of the text model. Of one that does not say how many layers it has the result is empty.
    """
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return []
    per_layer = getattr(config, "per_layer_config", None)
    return [config] * count if per_layer is None else list(per_layer)


def spans(config: Any) -> set[int]:
    """Numbers of tokens from which on a layer may see less, or otherwise, by the names of their fields."""
    layers = layer_configs(config) or [config]
    return {size for layer in layers for size in _sizes(vars(layer)) if size > 1}


def _sizes(fields: Mapping[str, Any]) -> Iterator[int]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif isinstance(name, str) and _SPAN.search(name):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (size for size in values if isinstance(size, int) and not isinstance(size, bool))


def _attention_width(layer: Any, hidden: int) -> int:
    """Entries of a token's queries in one layer."""
    heads = getattr(layer, "num_attention_heads", None)
    head_size = getattr(layer, "head_dim", None)
    return heads * head_size if isinstance(heads, int) and isinstance(head_size, int) else hidden
