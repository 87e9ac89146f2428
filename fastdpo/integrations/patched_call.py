"""`patch_model` for the length of one call, for trainers whose forward pass a patch replaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from fastdpo.integrations.lm_head import wrappers_and_model
from fastdpo.integrations.model import is_patched, patch_model, unpatch_model
from fastdpo.integrations.virtual_tokens import has_virtual_tokens, is_switched_off
from fastdpo.types import Execution


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
