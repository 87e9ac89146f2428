"""A call of a patched model's own forward, with lazy logits in the place of the head's output."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.integrations.backbone_call import CACHES
from fastdpo.integrations.engines import engine_around, engine_of_head, forwards_replaced, is_tensor_parallel
from fastdpo.integrations.lazy_table import lazy_tensor  # from there, so that the table is filled
from fastdpo.integrations.lazy_values import Memory, Source
from fastdpo.integrations.lm_head import find_linear, head_module, plain_head
from fastdpo.integrations.probe import refuse
from fastdpo.ops.checks import fail
from fastdpo.types import Execution, HeadAdapter, LMHead

LOGITS = ("auto", "lazy", "always_lazy", "real")
ON_MATERIALIZE = ("warn", "error")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError where ``value`` is none of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise fail(name, repr(value), f"one of {choices}")


def check_whole_head(model: Any) -> None:
    """Raise ValueError for a model whose head `why_split`."""
    if (reason := why_split(model)) is not None:
        refuse(model, reason)


def why_split(model: Any) -> str | None:
    """Why lazy logits of a model cannot be: its head is whole only inside the head's own call, or never."""
    linear: Any = find_linear(model)
    parts = [model.get_output_embeddings(), head_module(model), linear]
    engine = engine_of_head(parts) or engine_around(model)
    if engine is None and (hasattr(linear.weight, "device_mesh") or is_tensor_parallel(_own(linear))):
        engine = "tensor parallelism"
    if engine is None:
        return None
    return (
        f"its head is split by {engine}, and lazy logits are computed after the head's own call, when "
        "its weight is no longer whole. Use logits='real' with return_logps=True or pair_loss, which run "
        "inside that call"
    )


def wants_lazy(choice: str, arguments: Mapping[str, Any], *, is_training: bool) -> bool:
    """Whether this call gets lazy logits: not generation, not compiled code, nor a plain evaluation.

    Args:
        choice: one of `LOGITS`.
        arguments: of the model's forward, by name.
        is_training: the model's mode. What a step scores without gradients (a reference that is the model
            without its adapter, KTO's estimate of the KL) is of a model in training mode.
    """
    if choice == "real" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    kept = [arguments.get(name) for name in ("logits_to_keep", "num_logits_to_keep")]
    if any(isinstance(value, int) and value == 1 for value in kept):
        return False  # of the next token
    if arguments.get("use_cache") or any(arguments.get(name) is not None for name in CACHES):
        return False
    is_step = is_training or torch.is_grad_enabled() or arguments.get("labels") is not None
    return choice == "always_lazy" or is_step


def call_lazily(
    model: Any, execution: Execution, choice: str, on_materialize: str, run: Callable[[], Any]
) -> Any:
    """``run()``, the model's own forward, with a head that makes lazy logits.

    Args:
        choice: one of `LOGITS`; with ``auto`` a head that is split makes real logits, and a warning says so.

    Raises:
        ValueError: as `check_whole_head`.
    """
    if not _is_followed(model) and choice == "auto" and (reason := why_split(model)) is not None:
        warnings.warn(f"logits: real ones are made of a {type(model).__name__}: {reason}", stacklevel=4)
        return run()
    with lazy_head(model, execution, on_materialize):
        return run()


@contextmanager
def lazy_head(model: Any, execution: Execution, on_materialize: str = "warn") -> Iterator[None]:
    """The head of a model makes lazy logits, as long as the context lasts.

    What the model's forward does with the head's output (scale, cap, slices, its loss) is done to the lazy
    tensor. The head is read where it is called: adapters may be switched on and off within the context.

    Args:
        model: an unwrapped one.

    Raises:
        ValueError: as `check_whole_head`, or its head is none that the op knows.
    """
    if _is_followed(model):
        yield
        return
    check_whole_head(model)
    outer = model.get_output_embeddings()
    own: Callable[[Tensor], Tensor] = outer.forward

    def forward(hidden: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return own(hidden)
        head = plain_head(model)
        has_dropout = head.adapter is not None and len(head.adapter) > 3 and head.adapter[3] > 0
        if head.weight.is_meta or has_dropout:  # offloaded; or other entries would be dropped at every look
            return own(hidden)
        made = _lazy_logits(hidden, head, execution, on_materialize)
        return own(hidden) if made is None else made

    with forwards_replaced({outer: forward}):
        yield


def _is_followed(model: Any) -> bool:
    """Whether a stand-in for the head is in this very call: a probe's, or that of a context around it."""
    parts = (model.get_output_embeddings(), head_module(model))
    replaced = [part for part in parts if "forward" in vars(part) and not hasattr(part, "_hf_hook")]
    return any(not is_tensor_parallel(_own(part)) for part in replaced)


def _lazy_logits(hidden: Tensor, head: LMHead, execution: Execution, on_materialize: str) -> Tensor | None:
    """``(..., V)``; None where the head's own call has to say what is wrong with ``hidden``."""
    device = head.weight.device
    compute_dtype = None
    if torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(device.type)
    if not hidden.is_floating_point() or (compute_dtype is None and hidden.dtype != head.weight.dtype):
        return None
    states = hidden.to(device).reshape(-1, hidden.shape[-1])
    if execution.mode == "pairs":  # of whole losses, which nobody asks for here
        execution = replace(execution, mode="auto")
    if torch.is_grad_enabled():
        states, head = _apart(states, head)
    source = Source(states, head, execution, compute_dtype, on_materialize)
    has_grad = torch.is_grad_enabled() and any(value.requires_grad for value in source.tensors)
    rows = torch.arange(len(states), device=device).view(hidden.shape[:-1])
    return lazy_tensor(Memory(source, "logits", rows, compute_dtype or hidden.dtype, has_grad))


def _apart(states: Tensor, head: LMHead) -> tuple[Tensor, LMHead]:
    """Views of hidden states and head, whose gradients are those of the logits alone.

    Of a weight that the embedding has too, the backbone adds gradients of its own.
    """
    bias = None if head.bias is None else head.bias.view_as(head.bias)
    adapter = head.adapter
    if isinstance(adapter, HeadAdapter):
        lora_a, lora_b = (value.view_as(value) for value in (adapter.lora_a, adapter.lora_b))
        adapter = adapter._replace(lora_a=lora_a, lora_b=lora_b)
    weight = head.weight.view_as(head.weight)
    return states.view_as(states), replace(head, weight=weight, bias=bias, adapter=adapter)


def _own(module: Any) -> Any:
    return vars(module).get("forward")
