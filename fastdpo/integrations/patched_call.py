"""`patch_model` for the length of one call, for trainers whose forward pass a patch replaces."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from fastdpo.integrations.lm_head import wrappers_and_model
from fastdpo.integrations.model import is_patched, patch_model, unpatch_model
from fastdpo.integrations.probe import NotSupported
from fastdpo.integrations.source_patch import Around
from fastdpo.integrations.virtual_tokens import has_virtual_tokens, is_switched_off
from fastdpo.types import Execution

logger = logging.getLogger(__name__)


def or_own(ours: Callable[..., Any]) -> Around:
    """``ours`` in the place of a trainer's method, which goes on with what ours does not serve.

    ``ours`` finds that out before the model runs, and raises `NotSupported`. One line says so, once a reason.
    """

    def around(own: Callable[..., Any]) -> Callable[..., Any]:
        said: set[str] = set()

        @functools.wraps(ours)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return ours(self, *args, **kwargs)
            except NotSupported as error:
                say_own(f"{type(self).__name__}.{own.__name__}", error, said)
            return own(self, *args, **kwargs)

        return method

    return Around(around)


def say_own(what: str, error: Exception, said: set[str]) -> None:
    """One line for each of the reasons why the code of another package runs in its own way."""
    reason = " ".join(str(error).split())
    if reason not in said:
        said.add(reason)
        logger.warning("%s runs its own code, with the logits: %s", what, reason)


@contextmanager
def without_logits(trainer: Any, model: Any, execution: Execution | None) -> Iterator[None]:
    """`patch_model` for one call, under the trainer's autocast.

    accelerate's mixed precision puts an autocast wrapper in ``model.forward``, which would hide the patched
    class; it steps aside for the call, and `accelerator.autocast` stands in for it. So does what PEFT's
    ``disable_adapter`` puts there for a model with virtual tokens.
    """
    *around, inner = wrappers_and_model(model)
    if is_patched(inner):
        with trainer.accelerator.autocast():
            yield
        return
    around = [wrapper for wrapper in around if has_virtual_tokens(wrapper)]
    set_aside = [(m, vars(m).pop("forward")) for m in (*around, inner) if _is_mixed_precision(m)]
    switched_off = [wrapper for wrapper in around if is_switched_off(wrapper)]
    set_aside += [(wrapper, vars(wrapper).pop("forward")) for wrapper in switched_off]
    try:
        patch_model(model, execution=execution)
        try:
            for wrapper in switched_off:
                base = wrapper.base_model
                wrapper.forward = MethodType(type(base).forward, base)
            with trainer.accelerator.autocast():
                yield
        finally:
            for wrapper in switched_off:
                vars(wrapper).pop("forward", None)
            unpatch_model(model)
    finally:
        for wrapper, forward in set_aside:
            wrapper.forward = forward


def _is_mixed_precision(model: Any) -> bool:
    """Whether ``model.forward`` is accelerate's wrapper, once or more, around the class's own forward."""
    own = vars(model)
    if "forward" not in own or "_original_forward" not in own:
        return False
    inside = own["forward"]
    inside = getattr(inside, "__func__", inside)
    while inside is not type(model).forward and hasattr(inside, "__wrapped__"):
        inside = inside.__wrapped__
        inside = getattr(inside, "__func__", inside)
    return inside is type(model).forward
