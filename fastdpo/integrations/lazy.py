"""Logits that are not made until somebody looks: the tensor that stands for them.

A `LazyLogits` has shape, dtype and device, but no memory. It knows what it stands for (`lazy_values.py`), and
which part of that. `lazy_views.py` and `lazy_table.py` have the operations that keep it lazy or that run in
the fused op. Any other operation gets real values.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastdpo.integrations.lazy_values import Memory

# Operations by the function that torch hands over; `lazy_table.py` fills it. Each may answer NotImplemented.
TABLE: dict[Any, Callable[..., Any]] = {}

_HERE = os.path.dirname(os.path.abspath(__file__))
_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.join(_HERE, "lazy"))
_SEEN: dict[Any, Any] = {}  # the registry of `warnings`: a line that makes real logits is named once


class MadeLogits(RuntimeError):
    """With ``on_materialize="error"``: an operation on lazy logits needs their real values."""


class _InGraph(torch.autograd.Function):
    """A lazy tensor's place in autograd's graph.

    DDP looks here for the parameters that were used. A gradient comes this way only from functions with a
    backward pass of their own (kernels that took the tensor's memory); it goes on through the real values.
    """

    @staticmethod
    def forward(ctx: Any, make: Callable[[], LazyLogits], *tensors: Tensor) -> Tensor:
        made = make()
        ctx.memory, ctx.views = made.memory, made.views  # not the tensor: it would keep itself alive
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.memory.real is None and ctx.memory.has_vocab:
            _report(ctx.memory, "backward")
        value = ctx.memory.values()
        with torch.enable_grad():
            for view in ctx.views:
                value = view(value)
        tensors = ctx.memory.source.tensors
        if ctx.memory.source.is_split:
            raise RuntimeError(
                "logits: got lazy ones of a head that an engine splits in a function with a backward pass of "
                "its own, whose gradient would not reach the head, wanted real ones: logits='real'"
            )
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, grads[0], retain_graph=True, allow_unused=True))
        return None, *(next(found) if tensor.requires_grad else None for tensor in tensors)


class LazyLogits(Tensor):
    """A tensor that is not there: logits ``(..., V)``, or what was asked of them, ``(..., V)`` or ``(...)``.

    Make one with `lazy_tensor`. What a view would share with it is in ``memory``; ``views`` lead from there
    to this tensor, and ``meta`` has its shape and strides. Of one that ``is_turned`` V is not the last of the
    dimensions but the second, as `cross_entropy` takes it; nothing else does.
    """

    memory: Memory
    rows: Tensor
    labels: Tensor | None
    views: tuple[Callable[[Tensor], Tensor], ...]
    meta: Tensor
    is_turned: bool

    @property
    def kind(self) -> str:
        return self.memory.kind

    @property
    def has_vocab(self) -> bool:
        return self.memory.has_vocab

    def of_memory(self, value: Tensor) -> Tensor:
        """The part of ``value``, a tensor of the memory's shape, that this tensor is."""
        is_tied = self.requires_grad  # again, by an engine, whose own functions detach and change nothing
        for view in self.views:
            value = value if is_tied and view is Tensor.detach else view(value)
        return value

    def real_values(self, func: Any = None) -> Tensor:
        """The values, a plain tensor. ``func``: who asks, for the warning."""
        if self.memory.real is None and self.has_vocab:
            _report(self.memory, func)
        return self.of_memory(self.memory.values())

    def kept_values(self, keep: Tensor) -> Tensor:
        """The values where ``keep``, a bool tensor of this shape, is True; anything elsewhere."""
        if self.numel() != self.memory.rows.numel():  # the memory has rows that this tensor has not
            return self.of_memory(self.memory.values())
        whole = torch.ones_like(self.memory.rows, dtype=torch.bool)
        self.of_memory(whole).copy_(keep)
        return self.of_memory(self.memory.values(whole))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PROPERTIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        operation = TABLE.get(func)
        if operation is not None and not _needs_real(func, (args, kwargs)):
            try:
                result = operation(func, *args, **kwargs)
            except TypeError:
                if _takes(operation, func, *args, **kwargs):
                    raise
                result = NotImplemented  # by one of torch's other names of an argument, or into `out`
            if result is not NotImplemented:
                return result
        return on_real(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return on_real(func, args, kwargs or {})  # of a call in C++, which no function announced


_ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_leaf", "is_sparse", "is_quantized"),
    *("is_nested", "is_cuda", "is_cpu", "is_meta", "is_xpu", "is_mps"),
)
_METHODS = (
    *(
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "__len__",
        "is_floating_point",
        "is_complex",
    ),
    *("is_contiguous", "element_size", "get_device", "is_inference"),
)
# What the wrapper itself can answer.
_PROPERTIES = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name) for name in _METHODS),
    *(torch.is_floating_point, torch.is_complex, torch.is_inference, torch.numel),
}


def lazy_tensor(
    memory: Memory,
    *,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
    views: tuple[Callable[[Tensor], Tensor], ...] = (),
    meta: Tensor | None = None,
    is_recorded: bool = True,
    is_turned: bool = False,
) -> LazyLogits:
    """A lazy tensor of all of ``memory``, or of the part that ``views`` lead to.

    ``is_recorded``: False where autograd is to see nothing of this view.
    """
    if memory.has_grad and not is_recorded:
        views = (*views, Tensor.detach)
    if rows is None:
        rows, labels = memory.rows, memory.labels
    if meta is None:
        meta = torch.empty(memory.shape, dtype=memory.dtype, device="meta")
    like = meta

    def make() -> LazyLogits:
        made: Any = Tensor._make_wrapper_subclass(
            LazyLogits,
            like.shape,
            strides=like.stride(),
            dtype=memory.dtype,
            device=memory.source.hidden.device,
            requires_grad=False,
        )
        made.memory, made.rows, made.labels, made.views = memory, rows, labels, views
        made.meta, made.is_turned = like, is_turned
        return made

    made: LazyLogits = (
        _InGraph.apply(make, *memory.source.tensors) if memory.has_grad and is_recorded else make()
    )
    return made


def records(x: Tensor) -> bool:
    """Whether autograd would record what is made of ``x`` now."""
    return torch.is_grad_enabled() and x.requires_grad


def _needs_real(func: Any, arguments: Any) -> bool:
    """Whether one of them has values already, which may have been changed in place since, or is turned."""
    found = [x for x in tree_leaves(arguments) if isinstance(x, LazyLogits)]
    takes_turned = func in (F.cross_entropy, F.nll_loss)
    return any(x.memory.real is not None or (x.is_turned and not takes_turned) for x in found)


def _takes(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(operation).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def on_real(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` of the real values of all lazy tensors among its arguments, in indices too."""

    def real(value: Any) -> Any:
        return value.real_values(func) if isinstance(value, LazyLogits) else value

    return func(*tree_map(real, args), **tree_map(real, kwargs))


def _report(memory: Memory, func: Any) -> None:
    """Say which operation makes real logits, and where the caller asks for it."""
    name = func if isinstance(func, str) else getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    file, line = (frame.f_code.co_filename, frame.f_lineno) if frame else ("<unknown>", 0)
    message = (
        f"logits: {name} at {file}:{line} needs the real values of lazy {memory.kind} of shape "
        f"{tuple(memory.shape)}"
    )
    lists = "docs/lazy.md lists what needs none"
    if memory.source.on_materialize == "error":
        raise MadeLogits(f"{message}, which on_materialize='error' does not make. {lists}")
    message = f"{message}, so they are made, as without fastdpo. {lists}"
    warnings.warn_explicit(message, UserWarning, file, line, registry=_SEEN)


def register(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put an operation into the table: it is called with the function of torch and its arguments."""

    def decorate(operation: Callable[..., Any]) -> Callable[..., Any]:
        TABLE.update(dict.fromkeys(functions, operation))
        return operation

    return decorate
