"""A call of a patched model's backbone: what its own forward would hand on, and what comes back of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdpo.integrations.forest.attention import OverForest, attention_by
from fastdpo.integrations.forest.carried import carried_states
from fastdpo.integrations.forest.over_ranks import OverRanks
from fastdpo.integrations.forest.segments import Forest
from fastdpo.integrations.lm_head import ModelTail, logit_transform
from fastdpo.integrations.probe import HEAD_ARGUMENTS, NotSupportedArgument, load_balancing_loss
from fastdpo.ops.checks import fail
from fastdpo.types import CarriedContext, TokenLayout

Layout = TypeVar("Layout", TokenLayout, TokenLayout | None)
# One thing, by the names that releases of transformers and families have for it.
CACHES = ("cache", "past_key_values", "cache_params")


def run_backbone(model: Any, tail: ModelTail, arguments: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The backbone's inputs and its output.

    ``forest`` among the arguments is of the one row of the call, and ``context`` says that it is carried;
    then ``wanted`` names the tokens of which there are to be states, unless of all. With ``sequence_group``
    the call has this rank's part of rows of that forest.
    """
    forest, context = arguments.pop("forest", None), arguments.pop("context", None)
    wanted, group = arguments.pop("wanted", None), arguments.pop("sequence_group", None)
    backbone = attrgetter(tail.backbone)(model)
    if forest is None and context is None:
        inputs = _backbone_inputs(model, tail, arguments)
        return inputs, backbone(**inputs, return_dict=True)
    if group is not None:  # this rank's part of rows of that forest
        inputs = _backbone_inputs(model, tail, arguments)
        with attention_by(model, OverRanks(forest, group)):
            return inputs, backbone(**inputs, return_dict=True)
    _check_forest(forest, context, arguments)
    if forest is None:
        forest = Forest.of_sequences([arguments["input_ids"].shape[1]])
    if "position_ids" not in arguments:
        arguments["position_ids"] = forest.position_ids.to(arguments["input_ids"].device)
    inputs = _backbone_inputs(model, tail, arguments)
    if context is not None:
        return inputs, SimpleNamespace(
            last_hidden_state=carried_states(model, backbone, inputs, forest, context, wanted), wanted=wanted
        )
    with attention_by(model, OverForest(forest)):
        return inputs, backbone(**inputs, return_dict=True)


def backbone_calls(
    model: Any,
    tail: ModelTail,
    arguments: dict[str, Any],
    row_batches: Sequence[Mapping[str, Any]] | None,
    layout: Layout,
) -> tuple[list[tuple[dict[str, Any], Any]], Layout]:
    """Inputs and output of each of the backbone's calls, and ``layout`` over the states that these give."""
    if row_batches is not None and not row_batches:
        raise fail("row_batches", "an empty list", "at least one dict of inputs")
    if row_batches is not None and (given := [n for n, v in arguments.items() if v is not None]):
        raise fail("row_batches", f"a value together with {sorted(given)}", "the inputs in row_batches alone")
    calls = row_batches or [arguments]
    if layout is not None or row_batches is not None:
        for call in calls:
            _check_packed(call)
    if layout is not None:
        calls, layout = _labelled_alone(calls, layout)
    return [run_backbone(model, tail, dict(call)) for call in calls], layout


def _labelled_alone(
    calls: Sequence[Mapping[str, Any]], layout: TokenLayout
) -> tuple[Sequence[Mapping[str, Any]], TokenLayout]:
    """Calls whose states are those that predict a token, and ``layout`` over these; where all are carried.

    States and their gradients of all of a long context are more than the activations of its chunks.
    """
    if not all(call.get("context") is not None and "input_ids" in call for call in calls):
        return calls, layout
    wanted, index = layout.token_index.cpu().unique(return_inverse=True)
    ends = torch.tensor([call["input_ids"].numel() for call in calls]).cumsum(0)
    if not len(wanted) or wanted[0] < 0 or wanted[-1] >= ends[-1]:
        return calls, layout  # an error of the head's, in the caller's numbers
    parts = torch.tensor_split(wanted, torch.searchsorted(wanted, ends[:-1]).tolist())
    starts = [0, *ends[:-1].tolist()]
    narrowed = [
        {**call, "wanted": (part - start).tolist()}
        for call, part, start in zip(calls, parts, starts, strict=True)
    ]
    return narrowed, replace(layout, token_index=index)


def _check_packed(call: Mapping[str, Any]) -> None:
    """Refuse what lets the sequences of a row see each other.

    transformers tells them apart by positions that start again, only without a cache and without a 2-D mask,
    and is silent otherwise.
    """
    if call.get("forest") is not None:
        return  # says itself what sees what
    if call.get("use_cache"):
        raise fail("use_cache", True, "False or None with token_layout: sequences of a row would mix")
    mask = call.get("attention_mask")
    if call.get("position_ids") is not None and isinstance(mask, Tensor) and mask.dim() == 2:
        wanted = "None (positions that start again separate sequences) or a 4-D mask"
        raise fail("attention_mask", "a 2-D mask together with position_ids and token_layout", wanted)


def _check_forest(forest: Any, context: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse what a forest does not go with: it is all that attention knows of a row."""
    for name, value, kind in (("forest", forest, Forest), ("context", context, CarriedContext)):
        if value is not None and not isinstance(value, kind):
            raise fail(name, type(value).__name__, f"a {kind.__name__}")
    beside = "context" if forest is None else "forest"
    for name in ("attention_mask", *CACHES, "use_cache", "inputs_embeds"):
        if arguments.get(name) is not None and arguments[name] is not False:
            raise fail(name, f"a value together with {beside}", "input_ids and position_ids alone")
    ids = arguments.get("input_ids")
    shape = None if ids is None else tuple(ids.shape)
    if forest is None and (shape is None or shape[0] != 1):
        raise fail("input_ids", f"shape {shape} with context", "(1, N): one row")
    if forest is not None and shape != (1, forest.num_tokens):
        raise fail("input_ids", f"shape {shape}", f"(1, {forest.num_tokens}), the row of the forest")


def all_positions(calls: Sequence[tuple[dict[str, Any], Any]], num_virtual: int) -> Tensor:
    """``(M, H)``: the caller's positions of all calls one after the other, or the wanted ones of them."""
    states = [result.last_hidden_state[:, num_virtual:] for _, result in calls]  # (R, T, H) each
    for (inputs, result), rows in zip(calls, states, strict=True):
        is_whole = getattr(result, "wanted", None) is None
        if is_whole and "input_ids" in inputs and rows.shape[:-1] != inputs["input_ids"].shape:
            raise fail(
                "input_ids",
                f"shape {tuple(inputs['input_ids'].shape)}, of which the backbone made rows "
                f"{tuple(rows.shape[:-1])}",
                "one row for each, which token_layout counts",
            )
    flat = [rows.flatten(0, -2) for rows in states]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


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


def aux_loss_of_calls(
    model: Any, tail: ModelTail, calls: Sequence[tuple[dict[str, Any], Any]]
) -> Tensor | None:
    """The load-balancing loss of the tokens of several calls, as if they had been one; padding left out."""
    if not all(inputs.get("output_router_logits") for inputs, _ in calls):
        return None
    layers = zip(*(result.router_logits for _, result in calls), strict=True)
    together = SimpleNamespace(router_logits=tuple(torch.cat(layer) for layer in layers))
    masks = [inputs.get("attention_mask") for inputs, _ in calls]
    if any(mask is not None for mask in masks):
        rows = [
            torch.ones_like(inputs["input_ids"]) if mask is None else mask
            for mask, (inputs, _) in zip(masks, calls, strict=True)
        ]
        mask = torch.cat([row.reshape(1, -1) for row in rows], dim=1)
        return _aux_loss(model, tail, together, {"output_router_logits": True, "attention_mask": mask})
    return _aux_loss(model, tail, together, {"output_router_logits": True})
