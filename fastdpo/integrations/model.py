"""``patch_model``: teach a Hugging Face causal LM to return log-probabilities without making logits.

The model's class is replaced by a dynamic subclass of the same name, module and ``forward`` signature, so
that whatever looks at the class (deepcopy, pickle, ``save_pretrained``, ``generate``, `Trainer`,
accelerate's wrapping and unwrapping) finds what it found before. Nothing is stored on the instance: a copy
of a patched model is a patched model with its own weights. Only ``model(..., return_logps=True)`` takes
another path; every other call is the original's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.integrations.fused_output import FusedLMOutput as FusedLMOutput
from fastdpo.integrations.fused_output import HeadStates, ScoreRequest
from fastdpo.integrations.lm_head import ModelTail, current_head, examine, logit_transform, unwrap
from fastdpo.integrations.probe import HEAD_ARGUMENTS, load_balancing_loss
from fastdpo.ops.checks import check_execution, fail
from fastdpo.types import Execution, LMHead, TokenLayout


@dataclass(frozen=True)
class _Hook:
    """What a patched class knows besides its original: all of it immutable and picklable."""

    tail: ModelTail
    execution: Execution
    ignore_index: int


def patch_model(
    model: nn.Module, *, execution: Execution | None = None, ignore_index: int = -100
) -> nn.Module:
    """Let ``model(input_ids=..., labels=labels, return_logps=True)`` return log-probabilities, not logits.

    A patched model takes, beside its own arguments, ``return_logps`` and ``logps_outputs``, the names of
    further statistics (``lse``, ``entropy``, ``log_sum_sq_probs``, ``mean_logit``, ``is_top1``,
    ``topk_mass``, ``topk_entropy``; ``logps_topk`` is the k of the last two), and returns a
    `FusedLMOutput`. Labels are as Hugging Face has them: ``(B, T)``, aligned with ``input_ids``; in packed
    rows the first token of every sequence must be ignored. The rest reaches the backbone unchanged, except
    that ``use_cache`` is False unless given: nothing will be generated from a scored sequence. Every call
    without ``return_logps`` is the unpatched model's, to the bit.

    Instead of labels, ``token_layout`` (a `TokenLayout`) names the rows of the flattened hidden states and
    the tokens they predict; the results are then ``(N,)``. With it, ``row_batches`` may stand in for the
    inputs: a list of their dicts (``input_ids``, ``position_ids``, ``attention_mask`` ...), for each of which
    the backbone runs once; the layout counts the positions of all of them, one after the other.

    With ``return_states=True`` in place of ``return_logps`` and of labels a patched model returns
    `HeadStates`. Those of another model, or of this one without its adapter, given as ``reference`` to a call
    with ``return_logps`` let ``logps_outputs`` name divergences from it, ``forward_kl``, ``reverse_kl`` or
    ``jsd`` (at least one, and no statistics); ``ref_logps`` come with them. See ``token_divergence``.

    Patch before ``accelerator.prepare``; before or after DDP, torch.compile and PEFT. Adapters of the
    backbone are part of it; of what PEFT does to a head, ``modules_to_save`` and LoRA are supported.

    Args:
        model: a causal language model of transformers, or a PEFT, DDP or compiled wrapper around one.
        execution: how to run the head; see `Execution`.
        ignore_index: the label of tokens that are not scored.

    Returns:
        ``model`` itself. Patching again with the same options changes nothing.

    Raises:
        ValueError: the model's forward is not understood (the message says what), it is patched with other
            options, or it is wrapped so that a patch would not be reached.
        TypeError: ``model`` is no module, or an option is of the wrong type.

    Example:
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained(path))
        >>> out = model(input_ids=ids, attention_mask=mask, labels=labels, return_logps=True)
        >>> sequence_logps = out.logps.sum(-1)
    """
    run = check_execution(execution)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {ignore_index!r}, wanted an int")
    inner: Any = unwrap(model)
    if is_patched(inner):
        hook = type(inner)._fastdpo_hook
        if (hook.execution, hook.ignore_index) != (run, ignore_index):
            raise ValueError("model: got one patched with other options, wanted unpatch_model(model) first")
        return model
    own = own_forward(inner)
    original: Any = type(inner)
    inner.__class__ = _patched_class(original, _Hook(examine(inner), run, ignore_index))
    if own is not None:
        setattr(inner, own, MethodType(type(inner).forward, inner))
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Give a patched model its original class back; a model that is not patched is left as it is.

    Raises:
        ValueError: something wrapped the patched forward; the message says what to undo first.
    """
    inner: Any = unwrap(model)
    if not is_patched(inner):
        return model
    patched = type(inner)
    if "_fastdpo_hook" not in vars(patched):
        raise ValueError(
            f"model: got a {patched.__name__} made from a patched class, wanted the patched model"
        )
    own = own_forward(inner)
    inner.__class__ = patched.__mro__[1]
    if own == "forward":
        del inner.forward
    elif own is not None:
        setattr(inner, own, MethodType(type(inner).forward, inner))
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether a model, wrapped or not, was patched by `patch_model`."""
    return hasattr(type(unwrap(model)), "_fastdpo_hook")


def require_fused_output(output: Any) -> FusedLMOutput:
    """``output`` if a patched model made it.

    An unpatched model with ``**kwargs`` in its forward accepts ``return_logps=True`` silently and returns
    logits; whoever relies on log-probabilities has to look.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(output, FusedLMOutput):
        return output
    raise TypeError(
        f"output: got {type(output).__name__}, wanted FusedLMOutput. The model ignored return_logps=True: "
        "it is not patched (fastdpo.patch_model), or something replaced its forward after patching"
    )


def own_forward(model: Any) -> str | None:
    """The instance attribute through which calls reach the class's forward, if there is one.

    accelerate's hooks (``device_map``) keep the forward they call in ``_old_forward``; unwrapping after
    mixed precision leaves a bound method of the class's forward in ``forward``.
    """
    if "forward" not in vars(model):
        return None
    name = "_old_forward" if "_old_forward" in vars(model) else "forward"
    if getattr(vars(model)[name], "__func__", None) is not type(model).forward:
        raise ValueError(
            f"model: got a {type(model).__name__} whose `{name}` was replaced on the instance (accelerate's "
            "mixed precision does that), so its class's forward would not be reached; wanted it patched or "
            "unpatched before accelerator.prepare, or after "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    return name


@functools.cache
def _patched_class(original: Any, hook: _Hook) -> Any:
    """One class per original and hook, shared by all copies of a model."""
    signature = inspect.signature(original.forward)
    names = tuple(signature.parameters)[1:]

    def forward(
        self: Any,
        *args: Any,
        return_logps: bool = False,
        return_states: bool = False,
        logps_outputs: Sequence[str] = (),
        logps_topk: int | None = None,
        reference: HeadStates | None = None,
        token_layout: TokenLayout | None = None,
        row_batches: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        if not return_logps:
            given: dict[str, Any] = {"logps_outputs": logps_outputs or None, "logps_topk": logps_topk}
            given |= {"reference": reference, "token_layout": token_layout}
            given |= {} if return_states else {"row_batches": row_batches}
            for name, value in given.items():
                if value is not None:
                    raise fail(name, "a value", "return_logps=True with it")
            if not return_states:
                return original.forward(self, *args, **kwargs)
        elif return_states:
            raise fail("return_states", "True with return_logps", "one of the two")
        if repeated := set(names[: len(args)]) & kwargs.keys():
            raise TypeError(f"forward() got multiple values for {sorted(repeated)}")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if return_states:
            return _head_states(self, hook, arguments, row_batches)
        request = ScoreRequest(logps_outputs, logps_topk, reference)  # type: ignore[arg-type]
        if token_layout is None and row_batches is None:
            return _fused_forward(self, hook, arguments, request)
        return _layout_forward(self, hook, arguments, request, token_layout, row_batches)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = super(patched, self).__reduce_ex__(protocol)
        return (_rebuild, (original, hook), *reduced[2:]) if type(self) is patched else reduced

    # Not functools.wraps: accelerate unwraps a model by following `__wrapped__` down to the bottom.
    forward.__qualname__ = original.forward.__qualname__
    forward.__doc__ = original.forward.__doc__
    forward.__module__ = original.forward.__module__
    forward.__signature__ = signature  # type: ignore[attr-defined]
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "_fastdpo_hook": hook,
    }
    patched = type(original)(original.__name__, (original,), namespace)
    return patched


def _rebuild(original: Any, hook: _Hook) -> Any:
    """An empty patched model, for copy and pickle to fill."""
    patched = _patched_class(original, hook)
    return patched.__new__(patched)


def _fused_forward(
    model: Any, hook: _Hook, arguments: dict[str, Any], request: ScoreRequest
) -> FusedLMOutput:
    labels = arguments.get("labels")
    if not isinstance(labels, Tensor):
        raise fail("labels", type(labels).__name__, "a (B, T) tensor with return_logps=True")
    inputs, result = _run_backbone(model, hook.tail, arguments)
    hidden = result.last_hidden_state
    if labels.shape != hidden.shape[:-1]:
        raise fail("labels", f"shape {tuple(labels.shape)}", f"{tuple(hidden.shape[:-1])} to match the input")

    head, device = _head_for(model, hidden)
    # Position t predicts the label at t + 1; the last predicts none.
    targets = F.pad(labels.to(device)[:, 1:], (0, 1), value=hook.ignore_index)
    scored: dict[str, Any] = request.run(
        hidden.to(device), head, targets, ignore_index=hook.ignore_index, execution=hook.execution
    )
    return FusedLMOutput(
        # From where a token is predicted to where it stands; the last column, never scored, comes first.
        **{name: value.roll(1, dims=1) for name, value in scored.items()},
        logps_mask=(targets != hook.ignore_index).roll(1, dims=1),
        **_passed_through(model, hook.tail, inputs, result),
    )


def _layout_forward(
    model: Any,
    hook: _Hook,
    arguments: dict[str, Any],
    request: ScoreRequest,
    layout: TokenLayout | None,
    row_batches: Sequence[Mapping[str, Any]] | None,
) -> FusedLMOutput:
    """``(N,)`` results for the tokens that ``layout`` names."""
    if not isinstance(layout, TokenLayout):
        raise fail("token_layout", type(layout).__name__, "a TokenLayout")
    if arguments.get("labels") is not None:
        raise fail("labels", "a value together with token_layout", "one of the two")
    calls = _backbone_calls(model, hook.tail, arguments, row_batches)
    hidden, head, device = _all_positions(model, calls)
    on_device = TokenLayout(
        layout.token_index.to(device, torch.int64),
        layout.target_ids.to(device),
        layout.sequence_ids.to(device, torch.int64),
        layout.lengths,
    )
    values: dict[str, Any] = request.run(
        hidden, head, on_device, ignore_index=hook.ignore_index, execution=hook.execution
    )
    if len(calls) == 1:
        return FusedLMOutput(**values, **_passed_through(model, hook.tail, *calls[0]))
    if any(inputs.get("output_router_logits") for inputs, _ in calls):
        raise fail("output_router_logits", "True with several row_batches", "one, or False")
    return FusedLMOutput(**values)


def _head_states(
    model: Any,
    hook: _Hook,
    arguments: dict[str, Any],
    row_batches: Sequence[Mapping[str, Any]] | None,
) -> HeadStates:
    """What the head would see."""
    if arguments.get("labels") is not None:
        raise fail("labels", "a value together with return_states", "return_logps=True with it")
    calls = _backbone_calls(model, hook.tail, arguments, row_batches)
    hidden, head, device = _all_positions(model, calls)
    if row_batches is None:
        hidden = calls[0][1].last_hidden_state.to(device)
    return HeadStates(hidden, head)


def _backbone_calls(
    model: Any,
    tail: ModelTail,
    arguments: dict[str, Any],
    row_batches: Sequence[Mapping[str, Any]] | None,
) -> list[tuple[dict[str, Any], Any]]:
    """Inputs and output of each of the backbone's calls."""
    if row_batches is not None and not row_batches:
        raise fail("row_batches", "an empty list", "at least one dict of inputs")
    if row_batches is not None and (given := [n for n, v in arguments.items() if v is not None]):
        raise fail("row_batches", f"a value together with {sorted(given)}", "the inputs in row_batches alone")
    return [_run_backbone(model, tail, dict(call)) for call in row_batches or [arguments]]


def _all_positions(
    model: Any, calls: Sequence[tuple[dict[str, Any], Any]]
) -> tuple[Tensor, LMHead, torch.device]:
    """``(M, H)``: the positions of all calls one after the other, where the head is."""
    flat = [result.last_hidden_state.flatten(0, -2) for _, result in calls]
    head, device = _head_for(model, flat[0])
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).to(device), head, device


def backbone_states(model: nn.Module, **inputs: Any) -> Tensor:
    """``(B, T, H)``: the hidden states that a patched model gives to its head.

    Raises:
        TypeError: its backbone does not take one of ``inputs`` as it comes.
    """
    inner: Any = unwrap(model)
    states: Tensor = _run_backbone(inner, type(inner)._fastdpo_hook.tail, inputs)[1].last_hidden_state
    return states


def _run_backbone(model: Any, tail: ModelTail, arguments: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The backbone's inputs and its output."""
    inputs = _backbone_inputs(model, tail, arguments)
    return inputs, attrgetter(tail.backbone)(model)(**inputs, return_dict=True)


def _head_for(model: Any, hidden: Tensor) -> tuple[LMHead, torch.device]:
    """The head, and its device: with device_map the backbone may end on another."""
    head = current_head(model)
    if head.weight.is_meta and not hidden.is_meta:
        raise fail("model", "a head whose weight is offloaded", "its weight on a device")
    return head, head.weight.device


def _passed_through(model: Any, tail: ModelTail, inputs: dict[str, Any], result: Any) -> dict[str, Any]:
    """What else the backbone returned."""
    names = ("past_key_values", "hidden_states", "attentions", "router_logits")
    passed = {name: getattr(result, name, None) for name in names}
    return {"aux_loss": _aux_loss(model, tail, result, inputs), **passed}


def _backbone_inputs(model: Any, tail: ModelTail, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the model's own forward would hand to its backbone; an error for all that it would do besides."""
    if logit_transform(model) != (tail.logit_scale, tail.softcap):
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
    if unknown := inputs.keys() - tail.arguments:
        raise TypeError(
            f"{sorted(unknown)}: not supported with return_logps=True, wanted {sorted(tail.arguments)}"
        )
    if "use_cache" in tail.arguments and "past_key_values" not in inputs:
        inputs.setdefault("use_cache", False)
    return inputs


def _aux_loss(model: Any, tail: ModelTail, result: Any, inputs: dict[str, Any]) -> Tensor | None:
    balancing: Callable[..., Tensor] | None = load_balancing_loss(model)
    if tail.router is None or not inputs.get("output_router_logits") or balancing is None:
        return None
    return balancing(result.router_logits, *tail.router, inputs.get("attention_mask"))
