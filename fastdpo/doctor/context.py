"""How long a context may be: what a step's backbone holds, in each way of running it.

It is counted on the step's own code, which runs on tensors that have shapes and no memory, with a few layers
and at a few lengths: what is alive at once grows in proportion to both. So whatever a model's layers do, and
whatever becomes of this package's code, is in the numbers; what a kernel takes inside of an operator is not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from fastdpo.doctor.live_bytes import LiveBytes, without_memory
from fastdpo.integrations.auto_class import auto_class
from fastdpo.integrations.forest.segments import Forest
from fastdpo.integrations.model import backbone_states, patch_model
from fastdpo.plan.schedule import MIB
from fastdpo.types import CarriedContext, Execution

GIB = 2**30
DEFAULT_CHUNK = 1024
# Tokens at which to count; of a carried context chunks, from where on each adds the same. Elsewhere other
# things are most at once in long contexts than in short ones, and between two points a line is never too low.
_CHUNKS = (3, 4)
_LENGTHS = (2**9, 2**12, 2**16, 2**20)
# Layers at the least of the smaller of two models that many layers are counted by, each of whole patterns of
# types of layers, and their vocabulary: the gradient of a large one would be most of all in so small a model.
_FEW_LAYERS, _FEW_WORDS = 2, 1024
# Tokens that answers have: of others a carried context keeps no hidden states.
LABELLED = 512


class Curve(NamedTuple):
    """Bytes at once over tokens: straight lines through points that were counted."""

    points: tuple[tuple[int, float], ...]

    def at(self, tokens: int) -> float:
        """Bytes for a context of so many tokens."""
        (a, first), (b, second) = next(
            (pair for pair in pairwise(self.points) if tokens <= pair[1][0]), self.points[-2:]
        )
        return first + (second - first) * (tokens - a) / (b - a)

    def longest(self, room: float) -> int:
        """Tokens that fit into ``room`` bytes; 0 where nothing does. More tokens never take fewer bytes."""
        (a, first), (b, second) = next(
            (pair for pair in pairwise(self.points) if room <= pair[1][1]), self.points[-2:]
        )
        return max(0, int(a + (room - first) * (b - a) / (second - first)))

    def without(self, other: Curve) -> Curve:
        """What is left where the other's bytes lie elsewhere."""
        return Curve(tuple((n, size - other.at(n)) for n, size in self.points))


class ContextNeeds(NamedTuple):
    """What a step takes, in bytes.

    Args:
        curves: of each way, of the backbone's forward and backward pass, gradients of what is trained among
            them.
        keys_values: of a carried context its keys, values and their gradients, which may lie elsewhere.
        weights: of the whole model, adapters included.
        trained: of what is trained.
    """

    curves: dict[str, Curve]
    keys_values: Curve
    weights: int
    trained: int


def context_needs(
    config: Any,
    *,
    chunk: int = DEFAULT_CHUNK,
    is_lora: bool = False,
    dtype: torch.dtype | None = None,
) -> ContextNeeds:
    """Count a step of a model of this config, of one row that holds one context.

    Args:
        config: of a causal language model of transformers.
        chunk: of carried contexts, in tokens.
        is_lora: whether PEFT's adapters of rank 16 on all linear layers but the head are trained, or all
            weights.
        dtype: of weights and activations; None for the config's, or else bfloat16.

    Raises:
        ValueError: a model that `patch_model` or a carried context refuses.
        ImportError: adapters without PEFT.
    """
    kind = dtype or getattr(config, "dtype", None) or torch.bfloat16
    count = partial(_count_all, config, kind, is_lora)
    curves = {
        way: Curve(tuple((n, count(way, chunk, n)[0]) for n in _LENGTHS)) for way in ("plain", "checkpointed")
    }
    lengths = [chunk * n for n in _CHUNKS]
    peaks, kept = zip(*(count("carried", chunk, n) for n in lengths), strict=True)
    curves["carried"] = _curve(lengths, peaks)
    model = meta_model(config, kind, is_lora, "plain")
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return ContextNeeds(curves, _curve(lengths, kept), sum(size for size, _ in sizes), trained)


def context_lines(
    config: Any, context: int, *, memory_gib: float, chunk: int = DEFAULT_CHUNK
) -> list[tuple[str, str]]:
    """What ``fastdpo doctor --context`` says.

    Args:
        context: tokens of the row: a prompt and its answers.
        memory_gib: of the card.
    """
    run = Execution()
    head = int(1.25 * run.workspace_mib + run.cache_mib) * MIB
    lines = [
        (
            "assumed",
            f"one row of {context} tokens (a prompt and its answers, of which the last "
            f"{min(LABELLED, context)} are labelled) at a time on a card of {memory_gib:g} GiB, carried in "
            f"chunks of {chunk}; counted on the step's own code, without what kernels take "
            f"inside; no second model as reference; {_gib(head)} for the head",
        )
    ]
    for name, is_lora in (("full", False), ("LoRA", True)):
        try:
            needs = context_needs(config, chunk=chunk, is_lora=is_lora)
        except (ImportError, ValueError) as error:
            lines.append((name, f"not known: {' '.join(str(error).split())}"))
            continue
        # Gradients are among what is counted; Adam has two moments in the weights' dtype.
        room = memory_gib * GIB - needs.weights - 2 * needs.trained - head
        lines.append(
            (name, f"weights {_gib(needs.weights)}, moments {_gib(2 * needs.trained)}, and with gradients:")
        )
        for way, curve in needs.curves.items():
            lines.append((f"  {way}", _verdict(curve, context, room)))
        kept = needs.keys_values
        lines.append(
            (
                "  carried, K and V away",
                f"{_verdict(needs.curves['carried'].without(kept), context, room)}; "
                f"{_gib(kept.at(context))} in host memory or a file (context_device_mib: 0)",
            )
        )
    return lines


def _verdict(curve: Curve, context: int, room: float) -> str:
    longest = curve.longest(room)
    fits = "fits" if longest >= context else "does not fit"
    return f"{_gib(curve.at(context))}, {fits}; the longest: {longest} tokens"


def _curve(lengths: Sequence[int], found: Sequence[float]) -> Curve:
    return Curve(tuple(zip(lengths, found, strict=True)))


def _count_all(
    config: Any,
    dtype: torch.dtype,
    is_lora: bool,
    way: str,
    chunk: int,
    tokens: int,
    *,
    keeps_gradients: bool = True,
) -> tuple[float, float]:
    """As `_count`, with all layers; of many, in proportion to their number."""
    total, types = getattr(config, "num_hidden_layers", None), getattr(config, "layer_types", None)
    size = _pattern(types or [""] * (total or 1))
    count = size * -(-_FEW_LAYERS // size)
    if not isinstance(total, int) or total <= 2 * count or getattr(config, "is_heterogeneous", False):
        return _count(config, dtype, is_lora, way, chunk, tokens, keeps_gradients=keeps_gradients)
    words = min(config.vocab_size, _FEW_WORDS)
    few = []
    for layers in (count, 2 * count):
        shorter = copy.deepcopy(config)
        if types:
            shorter.layer_types = list(types[:layers])
        shorter.num_hidden_layers = layers
        shorter.vocab_size, shorter.pad_token_id = words, None
        few.append(_count(shorter, dtype, is_lora, way, chunk, tokens, keeps_gradients=keeps_gradients))
    more = (total - count) / count
    peak, kept = (first + (second - first) * more for first, second in zip(*few, strict=True))
    # A carried context has the sum of its chunks' own.
    sums = 0 if is_lora else keeps_gradients + (way == "carried")
    of_words = sums * (config.vocab_size - words) * config.hidden_size * dtype.itemsize
    return peak + of_words, kept


def _pattern(types: Sequence[str]) -> int:
    """After how many layers their types begin again."""
    sizes = range(1, len(types))
    return next((n for n in sizes if all(kind == types[i % n] for i, kind in enumerate(types))), len(types))


def _count(
    config: Any,
    dtype: torch.dtype,
    is_lora: bool,
    way: str,
    chunk: int,
    tokens: int,
    *,
    keeps_gradients: bool = True,
) -> tuple[int, int]:
    """Most bytes alive in a forward and backward pass of the backbone, and those of keys and values."""
    model = meta_model(config, dtype, is_lora, way)
    how: dict[str, Any] = {"forest": Forest.of_sequences([tokens])}
    if way == "carried":
        how |= {"context": CarriedContext(chunk), "wanted": range(max(0, tokens - LABELLED), tokens)}
    with without_memory(model), LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for parameter in model.parameters():
            if parameter.requires_grad and not keeps_gradients:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        states = backbone_states(model, input_ids=torch.zeros(1, tokens, dtype=torch.int64), **how)
        kept = 0
        if way == "carried":
            kept = 2 * states.grad_fn.run.kept.num_bytes  # type: ignore[union-attr]  # with their gradients
        states.sum().backward()
    return live.peak, kept


def activation_bytes(
    config: Any,
    tokens: int,
    way: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    chunk: int = DEFAULT_CHUNK,
    is_lora: bool = False,
) -> int:
    """Bytes of the backbone's passes over one row of so many tokens, without the gradients of weights.

    Args:
        way: ``plain``, ``checkpointed`` or ``carried``.

    Raises:
        ValueError: a model that `patch_model` or a carried context refuses.
    """
    counted = _count_all(config, dtype, is_lora, way, chunk, tokens, keeps_gradients=False)
    return int(counted[0])


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def meta_model(config: Any, dtype: torch.dtype, is_lora: bool, way: str) -> Any:
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
        if is_lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
            model.enable_input_require_grads()
    patch_model(model).train(way == "checkpointed")
    if way == "checkpointed":
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
