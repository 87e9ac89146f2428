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
from fastdpo.integrations.engines import (
    FSDP1,
    engine_around,
    engine_of_head,
    forwards_replaced,
    hooks_replaced,
    is_tensor_parallel,
    without_hooks,
)
from fastdpo.integrations.lazy_split import SplitHead, SplitSource, idle_hooks, split_head
from fastdpo.integrations.lazy_table import lazy_tensor  # from there, so that the table is filled
from fastdpo.integrations.lazy_values import Memory, Source
from fastdpo.integrations.lm_head import (
    adapter_of,
    bare_linear,
    find_linear,
    head_module,
    head_parts,
    plain_head,
)
from fastdpo.integrations.probe import refuse
from fastdpo.ops.checks import fail
from fastdpo.types import Execution, HeadAdapter, LMHead

LOGITS = ("auto", "lazy", "always_lazy", "real")
ON_MATERIALIZE = ("warn", "error")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError where ``value`` is none of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise fail(name, repr(value), f"one of {choices}")


def check_head(model: Any) -> None:
    """Raise ValueError for a model whose logits cannot be lazy: `why_real`."""
    if (reason := why_real(model)) is not None:
        refuse(model, reason)


def why_real(model: Any) -> str | None:
    """Why lazy logits of a model cannot be: FSDP1 gathers its head within its own forward pass alone."""
    find_linear(model)  # which refuses
    if _engine(model) != FSDP1:
        return None
    return (
        "its head is split by FSDP1, and lazy logits are computed after the model's own call, when "
        "its weight is no longer whole. Use logits='real' with return_logps=True or pair_loss, which run "
        "inside that call, or FSDP2 (fully_shard)"
    )


def _engine(model: Any) -> str | None:
    return engine_of_head(head_parts(model)) or engine_around(model)


def wants_lazy(choice: str, arguments: Mapping[str, Any], *, is_training: bool) -> bool:
    """Whether this call gets lazy logits: not generation, not traced code, nor a plain evaluation.

    Args:
        choice: one of `LOGITS`.
        arguments: of the model's forward, by name.
        is_training: the model's mode. What a step scores without gradients (a reference that is the model
            without its adapter, KTO's estimate of the KL) is of a model in training mode.
    """
    if choice == "real" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    kept = [arguments.get(name) for name in ("logits_to_keep", "num_logits_to_keep")]
    if any(isinstance(value, int) and value == 1 for value in kept):
        return False  # of the next token
    if arguments.get("use_cache") or any(arguments.get(name) is not None for name in CACHES):
        return False
    is_step = is_training or torch.is_grad_enabled() or arguments.get("labels") is not None
    return choice == "always_lazy" or is_step


@torch.compiler.disable(recursive=False, reason="lazy logits: a whole graph needs logits='real'")
def call_lazily(
    model: Any, execution: Execution, choice: str, on_materialize: str, run: Callable[[], Any]
) -> Any:
    """``run()``, the model's own forward, with a head that makes lazy logits.

    In a compiled model the graph ends here, and the backbone has one of its own: a lazy tensor is nothing to
    trace.

    Args:
        choice: one of `LOGITS`; with ``auto`` a head under FSDP1 makes real logits, and a warning says so.

    Raises:
        ValueError: as `check_head`.
    """
    if not _is_followed(model) and choice == "auto" and (reason := why_real(model)) is not None:
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
        ValueError: as `check_head`, or its head is none that the op knows.
    """
    if _is_followed(model):
        yield
        return
    check_head(model)
    outer = model.get_output_embeddings()
    own: Callable[[Tensor], Tensor] = outer.forward
    engine, inner = _engine(model), vars(bare_linear(model)).get("forward", own)
    idle = [] if engine is None else idle_hooks(model)

    def real(hidden: Tensor) -> Tensor:
        if not idle:
            return own(hidden)
        with hooks_replaced(idle), forwards_replaced({outer: own}):
            logits: Tensor = outer(hidden)
            return logits

    @torch.compiler.disable
    def forward(hidden: Tensor) -> Tensor:
        adapter = adapter_of(model)
        # Where entries are dropped, others would be at every look.
        if adapter is not None and adapter.dropout:
            return real(hidden)
        if engine is None:
            made = _lazy_logits(hidden, plain_head(model), inner, execution, on_materialize)
        else:
            made = _split_logits(hidden, split_head(model, idle, inner), execution, on_materialize)
        return real(hidden) if made is None else made

    with forwards_replaced({outer: forward}), without_hooks([module for module, _, _ in idle]):
        yield


def _is_followed(model: Any) -> bool:
    """Whether a stand-in for the head is in this very call: a probe's, or that of a context around it."""
    parts = (model.get_output_embeddings(), head_module(model))
    replaced = [part for part in parts if "forward" in vars(part) and not hasattr(part, "_hf_hook")]
    return any(not is_tensor_parallel(_own(part)) for part in replaced)


def _lazy_logits(
    hidden: Tensor,
    head: LMHead,
    own: Callable[[Tensor], Tensor],
    execution: Execution,
    on_materialize: str,
) -> Tensor | None:
    """``(..., V)``; None where the head's own call has to say what is wrong with ``hidden``."""
    compute_dtype, is_fit = _product_dtype(hidden, head.weight.device, head.weight.dtype)
    if not is_fit or head.weight.is_meta:  # offloaded
        return None
    states = hidden.to(head.weight.device).reshape(-1, hidden.shape[-1])
    if torch.is_grad_enabled():
        states, head = _apart(states, head)
    return _of_source(hidden, Source(states, head, _of_rows(execution), compute_dtype, on_materialize, own))


def _split_logits(
    hidden: Tensor, split: SplitHead, execution: Execution, on_materialize: str
) -> Tensor | None:
    """The same of a head that an engine splits."""
    if split.casts_to is not None and hidden.is_floating_point():
        hidden = hidden.to(split.casts_to)
    compute_dtype, is_fit = _product_dtype(hidden, hidden.device, split.dtype)
    if not is_fit:
        return None
    states = hidden.reshape(-1, hidden.shape[-1])
    how = (_of_rows(execution), compute_dtype, on_materialize, split.own)
    made = _of_source(hidden, SplitSource(states, None, *how, split=split))  # type: ignore[arg-type]
    return made if split.returns is None else made.to(split.returns)


def _of_source(hidden: Tensor, source: Source) -> Tensor:
    has_grad = torch.is_grad_enabled() and any(value.requires_grad for value in source.tensors)
    rows = torch.arange(len(source.hidden), device=source.hidden.device).view(hidden.shape[:-1])
    return lazy_tensor(Memory(source, "logits", rows, source.compute_dtype or hidden.dtype, has_grad))


def _product_dtype(
    hidden: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[torch.dtype | None, bool]:
    """The dtype that autocast, where it is on, gives to the logits; whether ``hidden`` fits the weight."""
    compute_dtype = None
    if torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(device.type)
    return compute_dtype, hidden.is_floating_point() and (compute_dtype is not None or hidden.dtype == dtype)


def _of_rows(execution: Execution) -> Execution:
    """Without mode ``pairs``, which is of whole losses: nobody asks for one here."""
    return replace(execution, mode="auto") if execution.mode == "pairs" else execution


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
