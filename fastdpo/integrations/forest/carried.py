"""Contexts without a limit: keys and values are carried from chunk to chunk, activations are not.

A row goes through the backbone some tokens at a time. The forward pass keeps no graph: of each chunk the
hidden states of labelled tokens, and of each layer keys and values. The backward pass takes the chunks from
the last to the first: it runs each again, with a graph of its own, and hands the gradients of the keys and
values that it saw on to the chunks that they are of. It is two forward passes and one backward pass, as
activation checkpointing is, and a third one of attention alone, which saves nothing of its first two; the
activations of one chunk are all that is ever alive. To the caller it is one differentiable call: of all
losses, in any mode of the head, with one gradient for each parameter, which DDP reduces once.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from fastdpo.integrations.backbone_config import why_no_neighbours
from fastdpo.integrations.engines import engine_around
from fastdpo.integrations.forest.attention import Attention, attention_by
from fastdpo.integrations.forest.backends import attend
from fastdpo.integrations.forest.keys_values import KeysValues
from fastdpo.integrations.forest.segments import Forest, Piece
from fastdpo.integrations.partitioned import is_partitioned
from fastdpo.ops.checks import fail
from fastdpo.types import CarriedContext


def carried_states(
    model: nn.Module,
    backbone: nn.Module,
    inputs: dict[str, Tensor],
    forest: Forest,
    context: CarriedContext,
    wanted: Sequence[int] | None = None,
) -> Tensor:
    """``(1, K, H)``: the backbone's hidden states of a row, at the tokens that are wanted.

    Args:
        model: the causal LM around ``backbone``.
        inputs: ``input_ids``, ``position_ids`` ``(1, N)``; others are handed to every chunk as they are.
        wanted: K places in the row, ascending; None for all N.

    Raises:
        ValueError: layers that carry more than keys and values, checkpointed layers, an engine that splits
            the weights, or a model that refuses forests (`attention_by`).
        OSError: no room on the disk for what does not fit elsewhere.
    """
    _check(model, backbone, inputs)
    if wanted is None:
        wanted = range(forest.num_tokens)
    run = _Run(model, backbone, inputs, forest, context, wanted)
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    if not torch.is_grad_enabled() or not trained:
        with torch.no_grad():
            return run.forward(keeps=False)
    states: Tensor = _Carried.apply(run, tuple(trained), *trained.values())
    return states


def _check(model: nn.Module, backbone: nn.Module, inputs: dict[str, Any]) -> None:
    if (reason := why_no_neighbours(model)) is not None:
        raise fail("context", "a CarriedContext", f"another model: {reason}")
    if any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules()) and model.training:
        raise fail(
            "context", "a CarriedContext with activation checkpointing",
            "one of the two: chunks are run again anyway",
        )  # fmt: skip
    engine = "ZeRO-3" if is_partitioned(model) else engine_around(model)
    if engine is not None:
        raise fail("context", f"a CarriedContext under {engine}", "whole weights: DDP, or one device")
    if inputs.get("output_router_logits"):
        raise fail(
            "output_router_logits", "True with a CarriedContext", "False: chunks have losses of their own"
        )


class _Carried(torch.autograd.Function):
    """The hidden states of a row as a function of the backbone's parameters."""

    @staticmethod
    def forward(ctx: Any, run: _Run, names: Sequence[str], *parameters: Tensor) -> Tensor:
        ctx.run, ctx.names = run, names
        ctx.save_for_backward(*parameters)
        return run.forward(keeps=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        run, ctx.run = ctx.run, None
        if run is None:
            raise RuntimeError(
                "context: got a second backward pass, wanted one: keys and values are gone after it"
            )
        return (None, None, *run.backward(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), grad))


class _Run:
    """One row on its way through the backbone and back."""

    def __init__(
        self,
        model: nn.Module,
        backbone: nn.Module,
        inputs: dict[str, Tensor],
        forest: Forest,
        context: CarriedContext,
        wanted: Sequence[int],
    ) -> None:
        self.model, self.backbone, self.inputs, self.forest = model, backbone, inputs, forest
        self.starts = range(0, forest.num_tokens, context.chunk)
        self.chunk = context.chunk
        device = inputs["input_ids"].device
        # Of each chunk the wanted tokens, counted from its first, and where their states lie among all.
        bounds = [0, *(bisect_left(wanted, start) for start in self.starts[1:]), len(wanted)]
        self.slices = [slice(*pair) for pair in pairwise(bounds)]
        self.places = [
            torch.tensor([place - start for place in wanted[part]], dtype=torch.int64, device=device)
            for start, part in zip(self.starts, self.slices, strict=True)
        ]
        self.kept = KeysValues(
            forest.num_tokens, device, context.device_mib, context.host_mib, context.directory
        )
        self.random: list[Any] = []  # states of the generators, before each chunk
        self.surroundings = _surroundings(device)

    def forward(self, *, keeps: bool) -> Tensor:
        """Without a graph. ``keeps`` what a backward pass needs."""
        states: Tensor | None = None
        for number, place in enumerate(self.slices):
            if keeps and self.model.training:
                self.random.append(_random_state(self.inputs["input_ids"].device))
            part = self._chunk(number)
            if states is None:
                states = part.new_empty(1, self.slices[-1].stop, part.shape[-1])
            states[:, place] = part
        if not keeps:
            self.kept.close()
        assert states is not None  # a forest has a token
        return states

    def backward(self, trained: dict[str, Tensor], grad: Tensor) -> list[Tensor | None]:
        """Of each parameter its gradient, given that of the hidden states ``(1, K, H)``."""
        # In the parameters' place, so that gradients add up layer by layer, and no hook of a parameter is
        # called before its gradient is whole.
        stand_ins = {name: parameter.detach().requires_grad_() for name, parameter in trained.items()}
        self.kept.expect_gradients()
        for number in reversed(range(len(self.starts))):
            with torch.enable_grad(), self.surroundings(), _replayed(self.random, number, grad.device):
                states = self._chunk(number, stand_ins)
            torch.autograd.backward(states, grad[:, self.slices[number]])
        self.kept.close()
        return [stand_in.grad for stand_in in stand_ins.values()]

    def _chunk(self, number: int, stand_ins: dict[str, Tensor] | None = None) -> Tensor:
        """Hidden states of a chunk's wanted tokens; with parameters to run it again with, for its backward
        pass, in which a chunk of which nothing is wanted has its part too: keys and values."""
        start = self.starts[number]
        stop = min(start + self.chunk, self.forest.num_tokens)
        inputs = {
            name: value[:, start:stop] if name in ("input_ids", "position_ids") else value
            for name, value in self.inputs.items()
        }
        use = _OverChunk(self.forest.pieces(start, stop), self.kept, is_again=stand_ins is not None)
        with attention_by(self.model, use):
            result = functional_call(self.backbone, stand_ins or {}, (), {**inputs, "return_dict": True})
        states: Tensor = result.last_hidden_state
        places = self.places[number]
        return states if len(places) == stop - start else states[:, places]


class _OverChunk(Attention):
    """Attention of a chunk's queries, layer after layer, to all that their paths hold up to them."""

    def __init__(self, pieces: Sequence[Piece], kept: KeysValues, *, is_again: bool) -> None:
        self.pieces, self.kept, self.is_again = pieces, kept, is_again
        self.layer = 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        s_aux: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        layer, self.layer = self.layer, self.layer + 1

        def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            return attend(q, k, v, self.pieces, scaling, dropout, s_aux=sinks, **options)

        start, stop = self.pieces[0].start, self.pieces[-1].stop
        if not self.is_again:
            self.kept.write(layer, start, key, value)
            return attention(query, *self.kept.read(layer, self._first, stop), s_aux)
        place = _Place(self.kept, layer, self._first, start, stop, has_dropout=dropout > 0)
        out: Tensor = _CarriedAttention.apply(attention, place, query, key, value, s_aux)
        return out

    @property
    def _first(self) -> int:
        """The first token of the row that any of the queries sees."""
        return min(piece.spans[0][0] for piece in self.pieces)


@dataclass(frozen=True)
class _Place:
    """Where keys and values of a layer's attention lie: those of the row's tokens ``first`` to ``stop``."""

    kept: KeysValues
    layer: int
    first: int
    start: int  # of the chunk itself
    stop: int
    has_dropout: bool


class _CarriedAttention(torch.autograd.Function):
    """Attention that saves its queries alone: keys and values are kept elsewhere, and gradients go there.

    A gradient of earlier chunks' keys is added to what is kept of them; that of the chunk's own is what later
    chunks have left there, and its own part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        attention: Callable[..., Tensor],
        place: _Place,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        ctx.attention, ctx.place = attention, place
        ctx.random = _random_state(query.device) if place.has_dropout else None
        ctx.surroundings = _surroundings(query.device)
        ctx.save_for_backward(query, sinks)
        return attention(query, *place.kept.read(place.layer, place.first, place.stop), sinks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        place: _Place = ctx.place
        query, sinks = ctx.saved_tensors
        keys, values = place.kept.read(place.layer, place.first, place.stop)
        leaves = [None if t is None else t.detach().requires_grad_() for t in (query, keys, values, sinks)]
        wanted = [leaf for leaf in leaves if leaf is not None]
        random = [] if ctx.random is None else [ctx.random]
        with torch.enable_grad(), ctx.surroundings(), _replayed(random, 0, query.device):
            out = ctx.attention(*leaves)
        found = list(torch.autograd.grad(out, wanted, grad))
        of_query, of_keys, of_values = found[:3]
        of_key, of_value = place.kept.add_gradients(place.layer, place.first, place.start, of_keys, of_values)
        of_sinks = found[3] if sinks is not None else None
        return None, None, of_query, of_key, of_value, of_sinks


def _surroundings(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Autocast as it is now, to be entered again in a backward pass."""
    kind = device.type
    is_on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    is_cached = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(kind, dtype=dtype, enabled=is_on, cache_enabled=is_cached)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


@contextlib.contextmanager
def _replayed(
    states: Sequence[tuple[Tensor, Tensor | None]], number: int, device: torch.device
) -> Iterator[None]:
    """The generators as they were; where nothing was noted nothing is drawn."""
    if not states:
        yield
        return
    on_cpu, on_device = states[number]
    with torch.random.fork_rng([device] if on_device is not None else []):
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        yield
