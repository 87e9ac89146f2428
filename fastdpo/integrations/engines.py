"""The head of a model that an engine splits: the fused op inside the head's own call, or on its shard.

FSDP2, FSDP1 and ZeRO-3 gather a module's weight for that module's call, gather it again for its backward
pass, and reduce its gradient there, by hooks on the module. So the op runs where the logits would be made:
the head's ``forward`` is replaced for one call, and the head is called. Nothing is gathered by hand. Tensor
parallelism leaves each rank its rows of the head, which the op takes as they are (`VocabShard`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.integrations.partitioned import is_partitioned, partitioned_copy, whole_shape
from fastdpo.ops.checks import fail
from fastdpo.types import VocabShard

FSDP1, FSDP2, ZERO3 = "FSDP1", "FSDP2", "ZeRO-3"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_16_BIT = (torch.bfloat16, torch.float16)
Hooks: TypeAlias = list[tuple[nn.Module, str, Any]]  # of a module, by the name that it has for them


def bare(module: Any) -> Any:
    """The module inside FSDP1's wrapper, where it is a unit of its own."""
    return module._modules.get("_fsdp_wrapped_module", module)


def engine_of_head(parts: Sequence[nn.Module]) -> str | None:
    """Who gathers the head's weight for the head's own call; None where it is whole without one.

    Args:
        parts: the head, from what the model calls for the logits to the ``nn.Linear`` inside.
    """
    if any(bare(part) is not part for part in parts):
        return FSDP1
    # The dict, not the attribute: what is read of a partitioned module is gathered for the module that reads.
    if any(hasattr(weight, "ds_id") for part in parts for weight in part._parameters.values()):
        return ZERO3
    return FSDP2 if any(map(_is_fsdp2, parts)) else None


def engine_around(model: nn.Module) -> str | None:
    """Whose units a model has, FSDP1's or FSDP2's, wherever its head belongs."""
    for module in model.modules():
        if bare(module) is not module:
            return FSDP1
        if _is_fsdp2(module):
            return FSDP2
    return None


def reshard(model: nn.Module) -> None:
    """Have FSDP2's units give up what they gathered, so that an optimiser finds their parts."""
    for module in model.modules():
        if _is_fsdp2(module):
            module.reshard()  # type: ignore[operator]


def _is_fsdp2(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def weight_shape(linear: Any) -> torch.Size:
    """``(V, H)``, also of a weight that is partitioned."""
    return whole_shape(kept_weight(linear))


def kept_weight(linear: Any) -> Any:
    """The weight as it lies: read as an attribute or an item, ZeRO-3 would gather it for who reads."""
    return linear._parameters.get("weight")


def is_split_by_vocabulary(model: nn.Module, weight: Any) -> bool:
    """Whether a weight is a DTensor whose rows are split over the one dimension of its mesh.

    Not over one of FSDP2's, whose ranks have other data: those rows are a shard to gather.
    """
    placements: Any = getattr(weight, "placements", ())
    if len(placements) != 1 or not placements[0].is_shard(0):
        return False
    groups = (group for state in _fsdp2_states(model) for group in groups_of(state))
    return all(weight.device_mesh != group.mesh_info.mesh for group in groups)


def groups_of(state: Any) -> list[Any]:
    """The parameters of a unit, by the names of torch 2.13 and before."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] * (state._fsdp_param_group is not None) if groups is None else groups


def is_tensor_parallel(forward: Any) -> bool:
    """Whether a module's own forward is what transformers' ``tp_plan`` put there."""
    return getattr(forward, "__qualname__", "").startswith("TensorParallelLayer.")


def vocab_shard(model: nn.Module, linear: nn.Module) -> VocabShard | None:
    """Which rows of a head this rank has, under tensor parallelism; None of one that is whole."""
    weight: Any = linear.weight
    return shard_of(weight) if is_split_by_vocabulary(model, weight) else None


def shard_of(weight: Any, *, has_own_rows: bool = False) -> VocabShard:
    """This rank's rows of a DTensor that is split by rows over one dimension of its mesh."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, (start, *_) = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    (dimension,) = (i for i, placement in enumerate(weight.placements) if placement.is_shard())
    return _kept_shard(start, weight.shape[0], weight.device_mesh.get_group(dimension), has_own_rows)


@functools.lru_cache(maxsize=64)
def _kept_shard(start: int, vocab_size: int, group: Any, has_own_rows: bool) -> VocabShard:
    """One for all calls: its first use takes an exchange of the ranks."""
    return VocabShard(start, vocab_size, group, has_own_rows)


def is_split_by_tensors(model: nn.Module) -> bool:
    """Whether transformers has split a model's layers over ranks (``tp_plan``), or its experts."""
    return any(is_tensor_parallel(vars(module).get("forward")) for module in model.modules())


def copied(model: Any) -> Any:
    """A deep copy of a model, also of one that is split over ranks by tensors or as ZeRO-3 loads it.

    Raises:
        ValueError: FSDP2 has units in it, or it is no model of transformers that ZeRO-3 has split.
    """
    if is_partitioned(model):
        return partitioned_copy(model)
    if not is_split_by_tensors(model):
        return copy.deepcopy(model)
    if engine_around(model) is not None:
        raise ValueError(
            "reference: got 'copy' of a model that is split by tensors and by FSDP2, which cannot be copied: "
            "wanted a ref_model, the same path once more (--ref_model)"
        )
    known: dict[int, Any] = {
        id(value): value for module in model.modules() for value in vars(module).values() if _is_mesh(value)
    }
    # torch's own copy of a DTensor looks for a storage, of which it has none.
    known |= {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in model.parameters()}
    twin = copy.deepcopy(model, known)
    for module in twin.modules():
        forward: Any = vars(module).pop("forward", None)
        if forward is None:
            continue
        made = inspect.getclosurevars(forward).nonlocals if is_tensor_parallel(forward) else {}
        if getattr(made.get("original_forward"), "__func__", None) is not type(module).forward:
            raise ValueError(
                f"reference: got 'copy' of a model whose {type(module).__name__} has a forward of its own: "
                "wanted a ref_model, the same path once more (--ref_model)"
            )
        # What was copied runs the module that it was made for.
        made["self"].install_forward(module, made["mesh"])
    return twin


def _is_mesh(value: Any) -> bool:
    return type(value).__name__ in ("DeviceMesh", "TransformersDeviceMesh")


def check_precision(model: Any, dtype: torch.dtype, arguments: Mapping[str, Any] | None) -> None:
    """Raise ValueError for what an engine's mixed precision would round on its way in or out.

    Args:
        dtype: of the weight as the engine gathers it.
        arguments: of ``pair_loss``: engines cast the tensors of dicts, which a call is given or returns.
    """
    may_round = dtype in _16_BIT and "torch.distributed.fsdp" in sys.modules and dist.is_initialized()
    if not may_round or torch.compiler.is_compiling():
        return
    engine = engine_around(model)
    if engine is None:
        return
    if type(arguments) is dict:
        rounded = [n for n, value in arguments.items() if isinstance(value, Tensor) and value.dtype == dtype]
        if rounded:
            raise fail(
                "pair_loss",
                f"{', '.join(rounded)} in {dtype}: {engine} casts the tensors of a dict",
                "types.MappingProxyType(arguments), which it leaves alone",
            )
    for policy in _policies_around(model) if engine == FSDP2 else ():
        if policy.output_dtype in _16_BIT:
            raise fail(
                "MixedPrecisionPolicy.output_dtype",
                f"{policy.output_dtype}, in which log-probabilities and losses would be rounded",
                "None or torch.float32; accelerate's plugin has the policy as mixed_precision_policy, and "
                "dataclasses.replace(policy, output_dtype=None) mends it",
            )


def _policies_around(model: Any) -> Iterator[Any]:
    """FSDP2's mixed precision of the model and of the root around it, which round what a call returns."""
    own = list(_fsdp2_states(model))
    states = {id(state): state for known in own for state in known._state_ctx.all_states or [known]}
    for state in states.values():
        if state._is_root or model in state._modules:
            yield policy_of(state)


def _fsdp2_states(model: nn.Module) -> Iterator[Any]:
    """What FSDP2 knows of each of a model's units."""
    states = (getattr(module, "_get_fsdp_state", lambda: None)() for module in model.modules())
    return (state for state in states if state is not None)


def units_of(model: nn.Module, modules: Iterable[nn.Module]) -> list[Any]:
    """What FSDP2 knows of the units that have weights of ``modules``, the outermost first."""
    wanted = set(modules)
    known = (state for one in _fsdp2_states(model) for state in one._state_ctx.all_states or [one])
    return [state for state in dict.fromkeys(known) if any(_owned(state, wanted))]


def _owned(state: Any, modules: set[nn.Module]) -> Iterator[Any]:
    for group in groups_of(state):
        for parameter in group.fsdp_params:
            place = parameter._module_info
            if not modules.isdisjoint({place.module, *place.shared_modules}):
                yield parameter


def shards_of(units: Iterable[Any], modules: Iterable[nn.Module]) -> list[Any]:
    """The weights of ``modules`` as FSDP2's units keep them: DTensors, whatever a module has now."""
    wanted = set(modules)
    return [parameter.sharded_param for state in units for parameter in _owned(state, wanted)]


def policy_of(unit: Any) -> Any:
    """The mixed precision of one of FSDP2's units."""
    return unit._mp_policy


def is_unit_alone(module: nn.Module) -> bool:
    """Whether a module, with what is in it, is a unit of FSDP2's, and nothing else is."""
    state: Any = getattr(module, "_get_fsdp_state", lambda: None)()
    return state is not None and tuple(state._modules) == (module,)


def call_through(
    outer: nn.Module,
    chain: Sequence[nn.Module],
    hidden: Tensor,
    run: Callable[[Tensor], dict[str, Any]],
    *,
    is_argument: bool = True,
) -> dict[str, Any]:
    """``run(hidden)`` inside the call of the head.

    Args:
        outer: what the model calls for the logits.
        chain: the modules whose weights ``run`` reads, each called by the one before it.
        is_argument: whether ``hidden`` is an argument of the call. FSDP2 takes a unit's gradients to be done
            where that of its argument is: not so where the unit has weights of before the head.

    Returns:
        What ``run`` returned: its tensors bear the engine's hooks for the backward pass.
    """
    found: list[dict[str, Any]] = []

    def innermost(states: Tensor = hidden) -> dict[str, Any]:
        # An engine's hook on a view would be lost where somebody changes it in place.
        found.append({name: _whole(value) for name, value in run(states).items()})
        # A dict of tensors, which every engine looks into.
        return {name: value for name, value in found[0].items() if isinstance(value, Tensor)}

    # Each module's forward calls the next; the last one's is `innermost`.
    following: list[Callable[..., Any]] = [*chain[1:], innermost]
    with forwards_replaced(dict(zip(chain, map(_calls, following), strict=True))):
        returned = outer(hidden) if is_argument else outer()
    # FSDP hooks the tensors in place, and may return rounded copies; ZeRO-3 hooks those that it returns.
    if any(hasattr(weight, "ds_id") for part in chain for weight in part._parameters.values()):
        found[0].update(returned)
        if "pair_loss" in found[0]:
            found[0]["pair_loss"] = found[0]["pair_loss"]._replace(loss=returned["loss"])
    return found[0]


def _whole(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value._is_view() else value


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with other forwards, as long as the context lasts."""
    own: dict[nn.Module, Any] = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            # Past nn.Module's own setter, which engines watch.
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def _calls(following: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *states: following(*states)


@contextmanager
def without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Calls of modules that reach no engine: nothing is gathered for a stand-in, nor takes it for a root."""
    with hooks_replaced([(module, name, type(hooks)()) for module, name, hooks in hooks_of(modules)]):
        yield


def hooks_of(modules: Iterable[nn.Module]) -> Hooks:
    return [(module, name, vars(module)[name]) for module in dict.fromkeys(modules) for name in _HOOKS]


@contextmanager
def hooks_replaced(hooks: Hooks) -> Iterator[None]:
    """Modules with other hooks of their forward pass, as long as the context lasts."""
    own = [(module, name, vars(module)[name]) for module, name, _ in hooks]
    try:
        for module, name, others in hooks:
            vars(module)[name] = others
        yield
    finally:
        for module, name, others in own:
            vars(module)[name] = others
