"""Follow a causal LM's own forward with stand-ins for its backbone and its head.

The stand-ins return known numbers, so that what a forward does around them shows: which arguments reach
the backbone unchanged, what happens to the hidden states before the head and to the logits after it, how
its loss lines labels up, what it makes of router logits. No layer runs, no weight is read and no random
number is drawn: a probe takes milliseconds at any model size and works on the meta device.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fastdpo.integrations.engines import forwards_replaced, weight_shape, without_hooks

# Arguments of a forward that concern the logits or the loss, not the backbone.
HEAD_ARGUMENTS = frozenset({"labels", "shift_labels", "logits_to_keep", "num_items_in_batch", "return_dict"})

# What a forward may hand to its backbone on its own: switches of what is returned beside the states.
_SWITCHES = frozenset({"use_cache", "return_dict"})

_NUM_POSITIONS = 4
_ROW_SCALES = (0.1, 1.0, 30.0, 300.0)  # from where a cap of 15 to 50 changes nothing to where it is all


class NotSupported(ValueError):
    """Of a model, or of what is asked of it: the hook cannot do it, though the model itself may."""


class NotSupportedArgument(NotSupported, TypeError):
    """The same of an argument's name."""


def refuse(model: nn.Module, reason: str) -> NoReturn:
    raise NotSupported(f"{type(model).__name__} is not supported: {reason}.")


def load_balancing_loss(model: nn.Module) -> Callable[..., Tensor] | None:
    """The ``load_balancing_loss_func`` of the file that defines the model's class, or None.

    FSDP2 gives a model a class of its own, in a file of its own.
    """
    files = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    named = (getattr(file, "load_balancing_loss_func", None) for file in files)
    return next((function for function in named if function is not None), None)


class _BackboneOutput:
    """Stands for the backbone's output: hidden states, and None for whatever else a forward looks up."""

    def __init__(self, hidden: Tensor, router_logits: tuple[Tensor, ...] | None) -> None:
        self.last_hidden_state = hidden
        self.router_logits = router_logits

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _Trace(NamedTuple):
    """What was seen while a forward ran around the stand-ins."""

    output: Any
    backbone: nn.Module
    arguments: dict[str, Any]  # as the backbone got them
    head_input: Tensor | None


class Tail(NamedTuple):
    """What a forward does around backbone and head, besides handing its arguments on."""

    backbone: nn.Module
    logit_scale: float
    softcap: float | None
    from_config: frozenset[str]  # arguments of the backbone that are fields of the model's config


class Probe:
    """A causal LM whose backbone and head can be replaced for the length of one call of its forward.

    Args:
        model: the causal LM itself (an ``nn.Module``), not a wrapper. Every check leaves it as it was.
        linear: its head, an ``nn.Linear``.
        head: the module that its forward calls for the logits: ``linear``, or an adapter's layer around it.

    Every check raises a ValueError with the reason where the forward does something else.
    """

    def __init__(self, model: Any, linear: Any, head: Any) -> None:
        self.model = model
        self.linear = linear
        self.head = head
        # Stand-ins for all that may be the backbone: the outermost is called and never gets to another.
        found = [model.base_model, model.get_decoder(), *model.children()]
        modules = [m for m in found if m is not model and m is not head and hasattr(m, "config")]
        self.backbones = {module: inspect.signature(module.forward) for module in modules}

        parameters = inspect.signature(type(model).forward).parameters
        self.has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.names = {n for n, p in parameters.items() if n != "self" and p.kind is p.POSITIONAL_OR_KEYWORD}

        weight = linear._parameters["weight"]
        device = torch.device("cpu") if weight.is_meta else weight.device
        vocab, hidden_size = weight_shape(linear)
        self.hidden = torch.linspace(-2, 3, _NUM_POSITIONS * hidden_size, device=device)
        self.hidden = self.hidden.view(1, _NUM_POSITIONS, hidden_size)
        rows = torch.tensor(_ROW_SCALES, device=device)
        self.raw = rows[None, :, None] * torch.linspace(-1, 1, vocab, device=device)
        # Without router logits to give, a balancing loss that the config asks for would fail.
        self.defaults = {"output_router_logits": False} if "output_router_logits" in self.names else {}
        self.inputs = {"input_ids": torch.arange(_NUM_POSITIONS, device=device)[None] % vocab}

    def run(self, arguments: Mapping[str, Any], router_logits: tuple[Tensor, ...] | None = None) -> _Trace:
        """The model's own forward around the stand-ins."""
        calls: list[tuple[nn.Module, dict[str, Any]]] = []
        head_inputs: list[Tensor] = []

        def backbone_forward(module: nn.Module) -> Callable[..., _BackboneOutput]:
            def forward(*args: Any, **kwargs: Any) -> _BackboneOutput:
                calls.append((module, _by_name(self.backbones[module], args, kwargs)))
                return _BackboneOutput(self.hidden.clone(), router_logits)

            return forward

        def head_forward(hidden: Tensor) -> Tensor:
            head_inputs.append(hidden)
            return self.raw.clone()

        stand_ins = {module: backbone_forward(module) for module in self.backbones}
        modules = [*stand_ins, self.head, self.linear]
        replaced = forwards_replaced({**stand_ins, self.head: head_forward})
        with without_hooks(modules), replaced, torch.no_grad():
            output = type(self.model).forward(self.model, **{**self.defaults, **arguments})
        if len(calls) != 1 or len(head_inputs) > 1:
            seen = f"{len(calls)} calls of what may be its backbone and {len(head_inputs)} of its head"
            raise RuntimeError(f"it makes {seen}, wanted one of each")
        return _Trace(output, *calls[0], head_inputs[0] if head_inputs else None)

    def find_tail(self, transforms: Sequence[tuple[float, float | None]]) -> Tail:
        """The backbone, and what is made of its states in training as in evaluation.

        Args:
            transforms: scales and softcaps of which the first that the logits confirm is taken.
        """
        was_training = self.model.training
        traces, from_config = [], set()
        try:
            for training in (True, False):
                self.model.training = training  # of this module alone: no layer runs
                trace = self._followed(self.inputs)
                from_config |= self._check_received(trace)
                traces.append((trace, self._check_head_input(trace)))
        finally:
            self.model.training = was_training
        for scale, softcap in transforms:
            if all(self._are_logits(trace, scale / before, softcap) for trace, before in traces):
                return Tail(traces[-1][0].backbone, scale, softcap, frozenset(from_config))
        scale, softcap = transforms[0]
        refuse(
            self.model,
            "the logits of its forward are not softcap(scale * head(hidden)) with the scale "
            f"({scale:g}) and the softcap ({softcap}) of its config",
        )

    def check_labels(self) -> None:
        """The model's own loss must ignore the first label and depend on the last: a shift by one."""
        vocab = self.raw.shape[-1]
        losses = []
        for changed in (None, 0, -1):
            labels = torch.arange(_NUM_POSITIONS, device=self.raw.device)[None] % vocab
            if changed is not None:
                labels[0, changed] = vocab - 1 - labels[0, changed]
            output = self._followed({**self.inputs, "labels": labels}).output
            losses.append(getattr(output, "loss", None))
        if not all(isinstance(loss, Tensor) and loss.numel() == 1 for loss in losses):
            refuse(self.model, "its forward makes no loss from labels, so how it shifts them cannot be seen")
        if losses[0] != losses[1] or losses[0] == losses[2]:
            refuse(self.model, "its own loss does not shift labels by one, as a causal language model's does")

    def arguments_passed_on(self) -> frozenset[str]:
        """Every name that the forward takes and hands to the backbone as it came."""
        names = set(self.names)
        if self.has_kwargs:
            import transformers.utils as utils

            # Before transformers 4.54 there is no list of what a forward may be given beside its own names.
            names |= getattr(utils, "TransformersKwargs", Any).__annotations__.keys()
            for signature in self.backbones.values():
                names |= {n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
        names -= HEAD_ARGUMENTS | self.inputs.keys()
        passed = self._passed_on(names - {"inputs_embeds"})
        for name in sorted(names - passed):
            passed |= self._passed_on({name})
        return frozenset(passed | self.inputs.keys())

    def _passed_on(self, names: Iterable[str]) -> set[str]:
        """Those of ``names`` that arrive when all are given at once; none if the forward fails."""
        inputs = {} if "inputs_embeds" in names else self.inputs
        # A marker that nothing can be done with or, where a forward asks for its shape, a tensor.
        for make_marker in (object, self.hidden.clone):
            markers = {name: make_marker() for name in names}
            try:
                received = self.run({**inputs, **markers}).arguments
            except Exception:
                continue
            return {name for name, marker in markers.items() if received.get(name) is marker}
        return set()

    def router(self) -> tuple[int, int] | None:
        """Experts and experts per token of the load-balancing loss; None where the model has no such loss.

        Raises:
            LookupError: it has one, and it is not ``load_balancing_loss_func`` of these two numbers.
        """
        attention_mask = torch.ones_like(self.inputs["input_ids"])
        arguments = {**self.inputs, "attention_mask": attention_mask, "output_router_logits": True}
        balancing = load_balancing_loss(self.model)
        for experts, per_token in self._router_sizes():
            logits = torch.linspace(-9, 9, _NUM_POSITIONS * experts, device=self.raw.device).sin()
            layers = (logits.view(-1, experts), logits.flip(0).view(-1, experts))
            try:
                own = getattr(self.run(arguments, layers).output, "aux_loss", None)
                if own is None:
                    return None
                if balancing and torch.equal(own, balancing(layers, experts, per_token, attention_mask)):
                    return experts, per_token
            except Exception:
                continue
        if balancing is None:
            return None
        raise LookupError

    def _router_sizes(self) -> Iterator[tuple[int, int]]:
        for source in (self.model, self.model.config.get_text_config()):
            per_token = getattr(source, "num_experts_per_tok", None)
            for name in ("num_experts", "num_local_experts"):
                experts = getattr(source, name, None)
                if isinstance(experts, int) and isinstance(per_token, int):
                    yield experts, per_token

    def _followed(self, arguments: Mapping[str, Any]) -> _Trace:
        try:
            return self.run(arguments)
        except Exception as error:
            kind = type(error).__name__
            refuse(self.model, f"its forward cannot be followed with {sorted(arguments)} ({kind}: {error})")

    def _check_received(self, trace: _Trace) -> set[str]:
        """The names that the forward fills in from its config; an error for what it makes otherwise."""
        received = trace.arguments
        if received.get("input_ids") is not self.inputs["input_ids"]:
            instead = " but embeddings that it made" if received.get("inputs_embeds") is not None else ""
            refuse(self.model, f"its forward does not hand `input_ids` to the backbone as it came{instead}")
        parameters = self.backbones[trace.backbone].parameters
        from_config = set()
        for name, value in received.items():
            default = parameters[name].default if name in parameters else None
            if name in self.inputs or name in _SWITCHES or value is None or value is default:
                continue
            if value is False and name.startswith("output_"):
                continue  # as None is
            if not isinstance(value, Tensor) and getattr(self.model.config, name, None) == value:
                from_config.add(name)
            elif name not in HEAD_ARGUMENTS or value != 0:
                refuse(self.model, f"its forward makes `{name}` for the backbone")
        return from_config

    def _check_head_input(self, trace: _Trace) -> float:
        """The factor between the backbone's states and what the head gets."""
        if trace.head_input is None or trace.head_input.shape != self.hidden.shape:
            refuse(self.model, "its forward does not give all of the backbone's hidden states to its head")
        before = (trace.head_input.flatten()[-1] / self.hidden.flatten()[-1]).item()
        if before == 0 or not _alike(trace.head_input, before * self.hidden):
            refuse(self.model, "its forward changes the hidden states between backbone and head")
        if self.linear.bias is not None and not _alike(trace.head_input, self.hidden):
            refuse(self.model, "its forward scales the hidden states before a head with a bias")
        return before

    def _are_logits(self, trace: _Trace, scale: float, softcap: float | None) -> bool:
        logits = getattr(trace.output, "logits", None)
        expected = self.raw.double() * scale
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        return isinstance(logits, Tensor) and _alike(logits, expected)


def _alike(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to the few roundings of an elementwise scale and cap: 8 of them in the dtype of ``actual``."""
    if actual.shape != expected.shape or actual.is_meta:
        return False
    error = (actual.double() - expected.double()).abs()
    return bool((error <= 8 * torch.finfo(actual.dtype).eps * expected.double().abs()).all())


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound
