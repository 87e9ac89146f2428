"""Models that ZeRO-3 has split over the ranks, also before an engine runs them.

transformers splits a model as it loads it, so that no rank has it whole; its engine, which gathers each
module's weights for the module's call, comes with training. What is to be known before (which layouts change
nothing, what a reference says, what weights they are) is found with each module whole in its call alone, in
which all ranks take part.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split a model's weights, which are whole in calls alone."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole_shape(tensor: Any) -> torch.Size:
    """Of a weight that may be split: then its own shape says nothing."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def gathered(parameters: Iterable[Any]) -> AbstractContextManager[Any]:
    """A context in which parameters that ZeRO-3 has split are whole; those that are so are left alone."""
    split = {id(p): p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"}
    if not split:
        return nullcontext()
    context: AbstractContextManager[Any] = sys.modules["deepspeed"].zero.GatheredParameters([*split.values()])
    return context


def has_own_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed's engine gathers a partitioned model's weights in its modules' calls."""
    return any(type(module._parameters).__name__ == "ZeROOrderedDict" for module in model.modules())


@contextmanager
def gathered_in_calls(model: nn.Module) -> Iterator[None]:
    """A context in which each module's own weights are whole in its forward pass, if no engine sees to it.

    For passes without a graph, of which all ranks make as many.
    """
    handles: list[Any] = []
    open_calls: list[AbstractContextManager[Any]] = []

    def begin(module: nn.Module, _: Any) -> None:
        open_calls.append(gathered(module._parameters.values()))
        open_calls[-1].__enter__()

    def end(*_: Any) -> None:
        open_calls.pop().__exit__(None, None, None)

    if is_partitioned(model) and not has_own_engine(model):
        for module in model.modules():
            if any(hasattr(parameter, "ds_id") for parameter in module._parameters.values()):
                handles.append(module.register_forward_pre_hook(begin))
                handles.append(module.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def partitioned_copy(model: Any) -> Any:
    """A copy of a model that was split as it was loaded: of its config, with this rank's parts of weights.

    Raises:
        ValueError: its config does not make such a model again, or its parts are not in memory.
    """
    wanted = "wanted a ref_model, the same path once more (--ref_model)"
    start = "reference: got 'copy' of a model that ZeRO-3 has split over the ranks as it was loaded, "
    if not hasattr(type(model), "_from_config"):
        raise ValueError(f"{start}which is a {type(model).__name__} and no model of transformers: {wanted}")
    twin = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    weights, own = dict(twin.named_parameters()), dict(model.named_parameters())
    others = [name for name in own.keys() | weights.keys() if _form(own, name) != _form(weights, name)]
    if others:
        raise ValueError(f"{start}whose {min(others)} its config does not make: {wanted}")
    for name, weight in own.items():
        part, to = _part(weight), _part(weights[name])
        if getattr(getattr(part, "status", None), "name", "AVAILABLE") != "AVAILABLE":
            raise ValueError(f"{start}with {name} on NVMe: {wanted}")
        to.data.copy_(part.data)
    buffers: dict[str, Any] = dict(model.named_buffers())
    for name, buffer in twin.named_buffers():
        buffer.copy_(buffers[name])
    return twin.to(model.device)


def _form(weights: Mapping[str, Any], name: str) -> tuple[Any, ...] | None:
    weight = weights.get(name)
    return None if weight is None else (whole_shape(weight), weight.dtype, hasattr(weight, "ds_id"))


def _part(weight: Any) -> Any:
    """What this rank has of a weight."""
    return getattr(weight, "ds_tensor", weight)
