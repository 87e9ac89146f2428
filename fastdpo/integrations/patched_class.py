"""Dynamic subclasses that look like the class they were made from, and exchanging the class of an object."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any


def make_subclass(
    original: Any, forward: Callable[..., Any], rebuild: tuple[Any, ...], **attributes: Any
) -> Any:
    """A subclass with ``original``'s name, module, docstring and signature of ``forward``.

    Args:
        rebuild: for copy and pickle: a function of a module and its arguments, which gives an empty instance.
        attributes: of the class.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = super(patched, self).__reduce_ex__(protocol)
        return (rebuild[0], rebuild[1:], *reduced[2:]) if type(self) is patched else reduced

    # Not functools.wraps: accelerate unwraps a model by following `__wrapped__` down to the bottom.
    forward.__qualname__ = original.forward.__qualname__
    forward.__doc__ = original.forward.__doc__
    forward.__module__ = original.forward.__module__
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        **attributes,
    }
    patched = type(original)(original.__name__, (original,), namespace)
    return patched


def own_forward(model: Any) -> str | None:
    """The instance attribute through which calls reach the class's forward, if there is one.

    accelerate's hooks (``device_map``) keep the forward they call in ``_old_forward``; unwrapping after
    mixed precision, and PEFT's ``disable_adapter``, leave a bound method of the class's in ``forward``.
    """
    if "forward" not in vars(model):
        return None
    name = "_old_forward" if "_old_forward" in vars(model) else "forward"
    if getattr(vars(model)[name], "__func__", None) is not type(model).forward:
        raise ValueError(
            f"model: got a {type(model).__name__} whose `{name}` was replaced on the instance (accelerate's "
            "mixed precision does that), so its class's forward would not be reached; wanted it patched or "
            "unpatched before accelerator.prepare, or after "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False), and outside disable_adapter()"
        )
    return name


def exchange_class(model: Any, new: Any) -> None:
    """Make ``new`` the class of ``model``, also of a bound method that calls would reach instead."""
    own = own_forward(model)
    model.__class__ = new
    if own is not None:
        setattr(model, own, MethodType(type(model).forward, model))


def restore_class(model: Any) -> None:
    """Undo `exchange_class`."""
    own = own_forward(model)
    model.__class__ = type(model).__mro__[1]
    if own == "forward":
        del model.forward
    elif own is not None:
        setattr(model, own, MethodType(type(model).forward, model))
