"""Attention over a forest, through the attention function that transformers lets anyone register.

The forest goes where a mask would: the mask function registered here returns it, every layer hands it on
as its ``attention_mask``, and the attention function gets it back, also when a checkpointed layer is run
again in the backward pass. No mask is made. Without a forest both do what the model's own implementation
does.
"""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import transformers
from torch import Tensor, nn

from fastdpo.integrations.backbone_config import text_config
from fastdpo.integrations.forest.backends import attend
from fastdpo.integrations.forest.segments import Forest
from fastdpo.integrations.lm_head import unwrap

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _HAS_REGISTRY = True
except ImportError:  # releases before 4.53, in which the hook runs without forests
    _HAS_REGISTRY = False

# Behind the name of a model's own implementation. transformers looks for names in it, as "flash" or "sdpa".
_SUFFIX = "_in_forests"
_USED: ContextVar[Attention | None] = ContextVar("fastdpo_attention", default=None)


class Attention(ABC):
    """Stands in a mask's place in a call of a backbone: what its layers compute attention with."""

    was_seen = False  # by any layer

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """``(1, n, heads, d)``; arguments as of `backends.attend`."""


class OverForest(Attention):
    """Attention over a whole row."""

    def __init__(self, forest: Forest) -> None:
        self._pieces = forest.pieces()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return attend(query, key, value, self._pieces, *args, **options)


@contextlib.contextmanager
def attention_by(model: nn.Module, use: Attention) -> Iterator[None]:
    """A call of ``model``'s backbone whose layers compute attention by ``use``.

    The model's attention is exchanged for one that knows forests, and stays so: `restore_attention`.

    Raises:
        ValueError: its attention does not come from transformers' registry, or its layers did not hand the
            forest on; or a release of transformers without one.
    """
    if not _HAS_REGISTRY:
        raise ValueError(
            f"forest: got transformers {transformers.__version__}, wanted 4.53 or newer, whose layers take "
            "their attention from a registry"
        )
    _exchange_attention(model)
    token = _USED.set(use)
    try:
        yield
    except (TypeError, AttributeError) as error:
        if use.was_seen:
            raise
        raise _refusal(model) from error  # its layers did arithmetic with what stands in the mask's place
    finally:
        _USED.reset(token)
    if not use.was_seen:
        raise _refusal(model)


def _refusal(model: nn.Module) -> ValueError:
    return ValueError(
        f"forest: got a {type(unwrap(model)).__name__}, whose attention is its own, wanted one whose layers "
        "take theirs from transformers' AttentionInterface"
    )


def restore_attention(model: nn.Module) -> None:
    """Give a model its own attention implementation back, where it was exchanged."""
    config = text_config(model)
    if (own := own_attention(config)) + _SUFFIX == getattr(config, "_attn_implementation", None):
        config._attn_implementation = own


def own_attention(config: Any) -> str:
    """The attention implementation that a model's config asks for: ``sdpa``, ``eager``, ..."""
    name: str = getattr(config, "_attn_implementation", None) or "eager"
    return name.removesuffix(_SUFFIX)


def _exchange_attention(model: nn.Module) -> None:
    config = text_config(model)
    own = own_attention(config)
    name = own + _SUFFIX
    if config._attn_implementation != name:
        _register(own)
        config._attn_implementation = name


def _register(own: str) -> None:
    AttentionInterface.register(own + _SUFFIX, _attention_function(own))
    AttentionMaskInterface.register(own + _SUFFIX, _mask_function(own))


def _attention_function(own: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention of a layer: over the forest that stands in the mask's place, else the model's own."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        *args: Any, **options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if isinstance(attention_mask, Attention):
            attention_mask.was_seen = True
            return attention_mask.attend(query, key, value, *args, **options), None
        plain = _eager_function(module) if own == "eager" else ALL_ATTENTION_FUNCTIONS[own]
        found: tuple[Tensor, Tensor | None] = plain(
            module, query, key, value, attention_mask, *args, **options
        )
        return found

    return attention


def _mask_function(own: str) -> Callable[..., Any]:
    def mask(*args: Any, **options: Any) -> Any:
        use = _USED.get()
        return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, **options) if use is None else use

    return mask


def _eager_function(module: nn.Module) -> Callable[..., Any]:
    """Eager attention is no entry of the registry: each family's file has its own."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


# A pickled model may come to a process in which no forest was seen yet.
if _HAS_REGISTRY:
    for _own in ("eager", *ALL_ATTENTION_FUNCTIONS):
        if not _own.endswith(_SUFFIX):
            _register(_own)
