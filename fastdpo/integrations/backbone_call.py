"""A call of a patched model's backbone: what its own forward would hand on, and what comes back of it."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor

from fastdpo.integrations.lm_head import ModelTail, logit_transform
from fastdpo.integrations.probe import HEAD_ARGUMENTS, NotSupportedArgument, load_balancing_loss
from fastdpo.ops.checks import fail

# One thing, by the names that releases of transformers and families have for it.
CACHES = ("cache", "past_key_values", "cache_params")


def run_backbone(model: Any, tail: ModelTail, arguments: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The backbone's inputs and its output."""
    inputs = _backbone_inputs(model, tail, arguments)
    return inputs, attrgetter(tail.backbone)(model)(**inputs, return_dict=True)


def passed_through(model: Any, tail: ModelTail, inputs: dict[str, Any], result: Any) -> dict[str, Any]:
    """What else the backbone returned."""
    names = ("hidden_states", "attentions", "router_logits")
    passed = {name: getattr(result, name, None) for name in names}
    cache = next((getattr(result, name) for name in CACHES if hasattr(result, name)), None)
    return {"aux_loss": _aux_loss(model, tail, result, inputs), "cache": cache, **passed}


def _backbone_inputs(model: Any, tail: ModelTail, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the model's own forward would hand to its backbone; an error for all that it would do besides."""
    if logit_transform(model) != tail.config_transform:
        raise ValueError(
            "model.config: scale or softcap of the logits changed; unpatch_model and patch_model again"
        )
    inputs = {
        name: value for name, value in arguments.items() if value is not None and name not in HEAD_ARGUMENTS
    }
    for name in HEAD_ARGUMENTS - {"labels", "return_dict"}:
        value = arguments.get(name)
        if value is not None and not (name == "logits_to_keep" and isinstance(value, int) and value == 0):
            raise fail(
                name,
                type(value).__name__,
                "nothing with return_logps=True, where ignored labels cost nothing",
            )
    if arguments.get("return_dict") is False:
        raise fail("return_dict", False, "True or None with return_logps=True")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)
    for name in (inputs.keys() & set(CACHES)) - tail.arguments:  # a release's other name for it
        own = [other for other in CACHES if other in tail.arguments and other not in inputs]
        inputs.update({other: inputs.pop(name) for other in own[:1]})
    if unknown := inputs.keys() - tail.arguments:
        raise NotSupportedArgument(
            f"{sorted(unknown)}: not supported with return_logps=True, wanted {sorted(tail.arguments)}"
        )
    for name in tail.from_config - inputs.keys():
        inputs[name] = getattr(model.config, name)
    if "use_cache" in tail.arguments and inputs.keys().isdisjoint(CACHES):
        inputs.setdefault("use_cache", False)
    return inputs


def _aux_loss(model: Any, tail: ModelTail, result: Any, inputs: dict[str, Any]) -> Tensor | None:
    balancing: Callable[..., Tensor] | None = load_balancing_loss(model)
    if tail.router is None or not inputs.get("output_router_logits") or balancing is None:
        return None
    return balancing(result.router_logits, *tail.router, inputs.get("attention_mask"))
