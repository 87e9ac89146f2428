"""`patch_model` for the length of one call, for trainers whose forward pass a patch replaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.model import is_patched, patch_model, unpatch_model
from fastdpo.types import Execution


@contextmanager
def without_logits(trainer: Any, model: Any, execution: Execution | None) -> Iterator[None]:
    """`patch_model` for one call, under the trainer's autocast.

    accelerate's mixed precision puts an autocast wrapper in ``model.forward``, which would hide the patched
    class; it steps aside for the call, and `accelerator.autocast` stands in for it.
    """
    inner = unwrap(model)
    if is_patched(inner):
        with trainer.accelerator.autocast():
            yield
        return
    wrapper = vars(inner).pop("forward") if _is_mixed_precision(inner) else None
    try:
        patch_model(inner, execution=execution)
        try:
            with trainer.accelerator.autocast():
                yield
        finally:
            unpatch_model(inner)
    finally:
        if wrapper is not None:
            inner.forward = wrapper


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
