"""The load-balancing loss of a mixture of experts: whether a run has one, and what passes gave."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fastdpo.integrations.backbone_config import text_config
from fastdpo.integrations.lm_head import unwrap
from fastdpo.training.settings.config import PreferenceConfig

logger = logging.getLogger(__name__)

# Of the policy's forward passes, where they are asked for the loss.
_FOUND: ContextVar[list[Tensor] | None] = ContextVar("router_losses", default=None)


def router_coefficient(args: PreferenceConfig, model: nn.Module) -> float:
    """What the loss is weighed with, as TRL has it: the setting, or what the model's config says; 0 for none.

    Args:
        model: the policy, patched.

    Raises:
        ValueError: it is asked for and the model has none that is known, or a layout whose rows hold tokens
            that stand for those of several sequences.
    """
    inner: Any = unwrap(model)
    config, given = text_config(inner), args.router_aux_loss_coef
    coefficient = float(getattr(config, "router_aux_loss_coef", None) or 0.0) if given is None else given
    if coefficient == 0:
        return 0.0
    kind = type(inner).__name__
    if not hasattr(config, "output_router_logits") or type(inner)._fastdpo_hook.tail.router is None:
        reason = "gives no router logits that a load-balancing loss is made of"
        if given is not None:
            raise ValueError(f"router_aux_loss_coef: got {given}, but {kind} {reason}; wanted none, or 0")
        if hasattr(config, "output_router_logits"):
            logger.warning("%s %s: it is trained without", kind, reason)
        return 0.0
    if (args.sp_size or 1) > 1:
        raise ValueError(
            f"sp_size: got {args.sp_size} with a router loss of weight {coefficient:g}, made of whole rows; "
            "wanted 1, or router_aux_loss_coef=0"
        )
    _check_layout(args, coefficient)
    return coefficient


def _check_layout(args: PreferenceConfig, coefficient: float) -> None:
    """Raise ValueError for rows that have tokens of several sequences once, or padding without a mask."""
    refused = {
        "batch_layout": args.batch_layout == "shared_prompt",
        "context_chunk": args.context_chunk is not None,
        "row_arrangement": args.row_arrangement == "bucketed",
        "pad_to_multiple_of": args.batch_layout != "padded" and args.pad_to_multiple_of is not None,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ValueError(
                f"{name}: got {getattr(args, name)!r} with a router loss of weight {coefficient:g}, wanted "
                "batches that have each token of each sequence once, and no padding without a mask: "
                "batch_layout 'padded' or 'packed', or router_aux_loss_coef=0"
            )


@contextmanager
def router_losses(*, are_wanted: bool) -> Iterator[list[Tensor]]:
    """Forward passes of the context give their load-balancing loss, ``()`` each, into the list."""
    found: list[Tensor] = []
    token = _FOUND.set(found if are_wanted else None)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def asked_for_router(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, with router logits asked for where the context wants them."""
    if _FOUND.get() is None:
        return dict(inputs)
    if "row_batches" not in inputs:
        return {**inputs, "output_router_logits": True}
    calls = [{**call, "output_router_logits": True} for call in inputs["row_batches"]]
    return {**inputs, "row_batches": calls}


def keep_router_loss(loss: Tensor | None) -> None:
    """What a forward pass gave, for the context."""
    found = _FOUND.get()
    if found is not None and loss is not None:
        found.append(loss)
