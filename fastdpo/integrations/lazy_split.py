"""Lazy logits of a head that an engine splits: each look at them is a call of the head, by the engine's own.

The weights are put away when the model's forward pass is over. So what is asked of the logits later runs in
one more call of the modules of the head, or of the unit that it belongs to, whose hooks gather the weights,
gather them again for the backward pass, and reduce their gradient. Such a call takes all ranks. They say to
each other what they are about to look at, over a group of their own (gloo): where one asks for something
else, or for nothing, an error says so, and no gather of one rank meets another one's.
"""

from __future__ import annotations

import functools
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fastdpo.integrations.engines import (
    ZERO3,
    Hooks,
    call_through,
    engine_of_head,
    hooks_of,
    hooks_replaced,
    is_tensor_parallel,
    is_unit_alone,
    kept_weight,
    policy_of,
    shards_of,
    units_of,
    weight_shape,
)
from fastdpo.integrations.head_adapter import FoundAdapter
from fastdpo.integrations.lazy_values import Source
from fastdpo.integrations.lm_head import adapter_of, bare_linear, head_chain, head_parts, read_parts
from fastdpo.types import LMHead

# How long a rank waits for the others to look at the same thing.
PATIENCE = timedelta(minutes=10)


def idle_hooks(model: Any) -> Hooks:
    """Hooks of the head that are not to run in the model's own forward pass, where no logits are made.

    The engine's, of a head that is gathered for itself; a unit with other weights has to run as a whole.
    """
    outer = model.get_output_embeddings()
    is_for_itself = engine_of_head(head_parts(model)) == ZERO3 or is_unit_alone(outer)
    return hooks_of(outer.modules()) if is_for_itself else []


@dataclass(frozen=True, eq=False)
class SplitHead:
    """The modules of a head as they are in a forward pass: adapters may be switched off and on after it.

    Args:
        idle: hooks of theirs that run when the logits are looked at.
        own: the head's own forward.
    """

    model: Any
    linear: nn.Linear
    adapter: FoundAdapter | None
    idle: Hooks
    own: Callable[[Tensor], Tensor]
    chain: list[Any] = field(init=False)
    is_argument: bool = field(init=False)
    shards: list[Tensor] = field(init=False)
    dtype: torch.dtype = field(init=False)  # of the weight when it is gathered
    # What the idle hooks make of hidden states, and of the logits.
    casts_to: torch.dtype | None = field(init=False)
    returns: torch.dtype | None = field(init=False)
    is_trained: bool = field(init=False)
    group: Any = field(init=False)

    def __post_init__(self) -> None:
        outer = self.model.get_output_embeddings()
        modules, weight = set(outer.modules()), kept_weight(self.linear)
        units = units_of(self.model, modules)
        around = [module for unit in units for module in unit._modules]
        shards = shards_of(units, modules)
        group, dtype = getattr(weight, "ds_process_group", None), weight.dtype
        ranks = [] if group is None else dist.get_process_group_ranks(group)
        casts_to = returns = None
        if units:
            ranks = shards[0].device_mesh.mesh.flatten().tolist()
            policy = policy_of(units[-1])
            dtype = policy.param_dtype or shards[0].dtype
            if self.idle:
                casts_to = policy.param_dtype if policy.cast_forward_inputs else None
                returns = policy.output_dtype
        made = {
            "chain": list(dict.fromkeys([*around, *head_chain(self.model)])),
            "is_argument": not units or around == [outer],
            "shards": shards or [getattr(p, "ds_tensor", p) for p in outer.parameters()],
            "dtype": dtype,
            "casts_to": casts_to,
            "returns": returns,
            "is_trained": any(p.requires_grad for p in outer.parameters()),
            "group": _meeting(tuple(ranks), dist.group.WORLD) if len(ranks) > 1 else None,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def vocab_size(self) -> int:
        return weight_shape(self.linear)[0]

    def read(self) -> LMHead:
        """The head, inside a call."""
        return read_parts(self.model, self.linear, self.adapter)


def split_head(model: Any, idle: Hooks, own: Callable[[Tensor], Tensor]) -> SplitHead:
    """The head of a model as it is now."""
    return SplitHead(model, bare_linear(model), adapter_of(model), idle, own)


# By the world they are in, and gone with it: a group that is kept has threads that outlive it.
_MEETINGS: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def _meeting(ranks: tuple[int, ...], world: Any) -> Any:
    """A group of these ranks for what they say to each other, in the processes that ``world`` is of."""
    known = _MEETINGS.setdefault(world, {})
    if ranks not in known:
        known[ranks] = dist.new_group(
            list(ranks), timeout=PATIENCE, backend="gloo", use_local_synchronization=True
        )
    return known[ranks]


class _Steps:
    """Steps of optimizers in this process: what they change of shards changes no version of a tensor."""

    def __init__(self) -> None:
        self.number = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


@functools.cache
def _steps_taken() -> _Steps:
    return _Steps()


@dataclass(frozen=True, eq=False)
class SplitSource(Source):
    """Hidden states, and a head whose weights are there in its own calls only.

    Args:
        hooks: what an engine hung on the lazy logits, for all that is made of them.
    """

    split: SplitHead = None  # type: ignore[assignment]
    hooks: OrderedDict[int, Callable[[Tensor], Any]] = field(default_factory=OrderedDict)
    looks: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        # A number with a gradient stands for the weights, which are not here.
        anchor = [self.hidden.new_zeros((), requires_grad=True)] if self.split.is_trained else []
        return [self.hidden, *anchor]

    @property
    def vocab_size(self) -> int:
        return self.split.vocab_size

    def _versions(self) -> tuple[int, ...]:
        kept = (0 if v.is_inference() else v._version for v in (self.hidden, *self.split.shards))
        return (*kept, _steps_taken().number)

    @property
    def is_shard(self) -> bool:
        return is_tensor_parallel(self.split.own)

    @property
    def is_split(self) -> bool:
        return True

    def within(self, run: Callable[[Source], Tensor]) -> Tensor:
        def inside(states: Tensor) -> dict[str, Any]:
            whole = (states, self.split.read(), self.execution, self.compute_dtype, self.on_materialize)
            return {"values": run(Source(*whole, self.split.own))}

        chain = self.split.chain
        with hooks_replaced(self.split.idle):
            found = call_through(chain[0], chain, self.hidden, inside, is_argument=self.split.is_argument)
        values: Tensor = found["values"]
        if values.requires_grad:
            for hook in self.hooks.values():
                values.register_hook(hook)
        return values

    def take_hook(self, hook: Callable[[Tensor], Any]) -> RemovableHandle:
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def agree(self, what: str, is_needed: bool) -> bool:
        """Whether some rank needs to look at ``what``: then all do.

        Raises:
            RuntimeError: another rank looks at something else, or one has not come.
        """
        group = self.split.group
        if group is None:
            return is_needed
        self.looks.append(what)
        code = zlib.crc32(f"{len(self.looks)} {what}".encode())
        said = torch.tensor([int(is_needed), code, -code])
        try:
            dist.all_reduce(said, dist.ReduceOp.MAX, group=group)
        except RuntimeError as error:
            raise RuntimeError(
                f"logits: got {what} asked for on rank {dist.get_rank()} and not on all ranks within "
                f"{PATIENCE}: the head is split over them, so each look at lazy logits takes all of them. "
                f"Ask on every rank, or use logits='real'. ({error})"
            ) from error
        if said[1] != -said[2]:
            looks: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(looks, self.looks[-1], group=group)
            raise RuntimeError(
                f"logits: got ranks that ask for {looks} of lazy logits, wanted the same on all: the head is "
                "split over them. Ask for the same in the same order on every rank, or use logits='real'"
            )
        return bool(said[0])
