"""Attention masks for rows that hold several sequences, in the form that a model's attention wants.

A token sees the tokens of its own document that are of its own branch or of branch 0, at positions up to
its own and, in layers with a sliding window, above its own minus the window. sdpa takes the mask as bool,
eager attention as numbers to add, flex attention as a block mask. Models whose layers differ take a dict
by layer type; models whose layers do not differ take one mask, and most of them only that.

Rows without branches need no mask: transformers derives one from positions that start again at 0, as long
as it is given neither a mask nor a cache; flash attention gets the bounds of the sequences as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.integrations.lm_head import unwrap

# Attention implementations that a mask of our own reaches, and those that skip what it hides.
DENSE_MASKS = ("sdpa", "eager")
BLOCK_MASKS = ("flex_attention",)
# Types of layers whose time does not grow with the square of a row.
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "moe", "mlp"})
# Fields that say over how many tokens a layer looks, or in pieces of how many.
_SPAN = re.compile(r"window|chunk|local(?!_experts)|block_size|stride|budget|topk")


class RowMasks:
    """Inputs of a model's backbone for rows of several sequences.

    Args:
        model: a causal LM, wrapped or not; only its config is read, and what its hook knows of its backbone.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = unwrap(model)
        self.config = inner.config.get_text_config()
        self.attention: str = getattr(self.config, "_attn_implementation", None) or "eager"
        self.dtype: torch.dtype = inner.dtype
        hook = getattr(type(inner), "_fastdpo_hook", None)
        self.takes_positions = hook is None or "position_ids" in hook.tail.arguments

    @property
    def windows(self) -> dict[str, int | None]:
        """The sliding window of each type of layer; raises ValueError as `layer_windows`."""
        return layer_windows(self.config)

    @property
    def skips_masked(self) -> bool:
        """Whether the attention kernel leaves masked blocks out, for rows without branches."""
        return self.attention.startswith("flash_attention") or self.attention in BLOCK_MASKS

    def why_no_neighbours(self) -> str | None:
        """Why a row may hold one sequence only, or None."""
        if not self.takes_positions:
            return "its backbone takes no position_ids, which would start again with each sequence"
        try:
            self.windows  # noqa: B018  (raises)
        except ValueError as error:
            return str(error)
        return None

    def why_no_branches(self) -> str | None:
        """Why rows with branches cannot be masked, or None."""
        if self.attention in (*DENSE_MASKS, *BLOCK_MASKS):
            return self.why_no_neighbours()
        wanted = " or ".join((*DENSE_MASKS, *BLOCK_MASKS))
        return f"attn_implementation {self.attention!r} takes no mask of its own, wanted {wanted}"

    def inputs(self, call: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the backbone takes for a call of ``training.rows``: ids, positions, and their mask."""
        names = ("input_ids", "position_ids") if self.takes_positions else ("input_ids",)
        inputs: dict[str, Any] = {name: call[name] for name in names}
        if "branches" in call:
            inputs["attention_mask"] = self.mask(call["documents"], call["branches"], call["position_ids"])
        elif self.attention.startswith("flash_attention") and len(call["input_ids"]) == 1:
            inputs |= _sequence_bounds(call["position_ids"])
        return inputs

    def mask(self, documents: Tensor, branches: Tensor, positions: Tensor) -> Any:
        """The mask, or one per layer type. All arguments ``(R, T)``, the masks ``(R, 1, T, T)``."""
        make = self._block_mask if self.attention in BLOCK_MASKS else self._dense_mask
        windows = self.windows
        made = {window: make(documents, branches, positions, window) for window in {*windows.values()}}
        if len(made) == 1:
            return next(iter(made.values()))
        return {layer_type: made[window] for layer_type, window in windows.items()}

    def _dense_mask(
        self, documents: Tensor, branches: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        query, key = (lambda x: x.unsqueeze(2)), (lambda x: x.unsqueeze(1))
        is_seen = (query(documents) == key(documents)) & (
            (query(branches) == key(branches)) | (key(branches) == 0)
        )
        gap = query(positions) - key(positions)
        is_seen &= gap >= 0
        if window is not None:
            is_seen &= gap < window
        is_seen = is_seen.unsqueeze(1)
        if self.attention == "sdpa":
            return is_seen
        zero = torch.zeros((), dtype=self.dtype, device=positions.device)
        return zero.where(is_seen, torch.finfo(self.dtype).min)

    def _block_mask(self, documents: Tensor, branches: Tensor, positions: Tensor, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            gap = positions[row, query] - positions[row, key]
            seen = documents[row, query] == documents[row, key]
            seen &= (branches[row, query] == branches[row, key]) | (branches[row, key] == 0)
            seen &= gap >= 0
            return seen if window is None else seen & (gap < window)

        rows, length = positions.shape
        on_gpu = positions.device.type == "cuda"
        device = str(positions.device)
        return create_block_mask(is_seen, rows, None, length, length, device=device, _compile=on_gpu)


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
    matrices = sum(p.numel() for p in inner.parameters() if p.dim() > 1 and id(p) not in left_out)
    hidden = inner.get_output_embeddings().weight.shape[-1]
    config = inner.config.get_text_config()
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


def layer_windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each type of attention layer, None where a layer sees everything.

    Args:
        config: of the text model.

    Raises:
        ValueError: a layer type that is not full or sliding attention, or one of several windows.
    """
    layers = layer_configs(config)
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"its layers of type {', '.join(unknown)} are none that a mask is known for")
    # Where layers have no type, all have the window, if there is one.
    has_types = getattr(config, "layer_types", None) is not None
    found: dict[str, int | None] = {}
    for kind, layer in zip(types, layers, strict=False):
        window = None if has_types and kind == "full_attention" else getattr(layer, "sliding_window", None)
        if window is not None and not isinstance(window, int):
            raise ValueError(f"its sliding_window is {window!r}, wanted a number of tokens")
        if found.setdefault(kind, window) != window:
            raise ValueError(f"its layers of type {kind} have windows of {found[kind]} and {window}")
    return dict(sorted(found.items())) or {"full_attention": None}


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


def _sequence_bounds(position_ids: Tensor) -> dict[str, Any]:
    """Bounds of the sequences of one row, once for all layers, which would each look for them otherwise."""
    from transformers import modeling_flash_attention_utils

    derive: Callable[..., Any] = modeling_flash_attention_utils.prepare_fa_kwargs_from_position_ids
    (bounds_q, bounds_k), (longest_q, longest_k) = derive(position_ids)
    return {
        "cu_seq_lens_q": bounds_q,
        "cu_seq_lens_k": bounds_k,
        "max_length_q": int(longest_q),
        "max_length_k": int(longest_k),
    }
