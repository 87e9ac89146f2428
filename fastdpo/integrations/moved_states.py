"""A head that stays where FSDP2 keeps it: the ranks' labelled hidden states go to all parts of the weight.

The head's own call, whose hooks would gather the weight, is not made. Each rank's part of the weight is a
leaf as it lies, so its gradient is where FSDP2 leaves that of others: for clipping, optimizer and checkpoints
nothing is changed. It takes a unit of FSDP2's for the head alone; others are gathered for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.integrations.engines import (
    groups_of,
    is_unit_alone,
    kept_weight,
    policy_of,
    shard_of,
    units_of,
)
from fastdpo.integrations.probe import refuse
from fastdpo.plan.traffic import head_traffic
from fastdpo.types import VocabShard

# What moves between the ranks of FSDP2: the weight to all, the hidden states to all, or the less of both.
SPLIT_HEAD = ("auto", "weight", "states")


def moves_states(
    model: Any, linear: Any, hidden: Tensor, how: str, count: Callable[[], int], adapter: object
) -> bool:
    """Whether the ranks' hidden states are exchanged in this call, and the weight is left where it is.

    Args:
        how: one of `SPLIT_HEAD`; ``"states"`` refuses what is in the way.
        count: gives the number of labelled tokens.
        adapter: LoRA on the head, if there is one.
    """
    outer = model.get_output_embeddings()
    reason = _why_not_in_parts(model, outer, linear)
    if reason is None and adapter is not None:
        reason = "it carries LoRA"
    if reason is None and kept_weight(linear).device != hidden.device:
        reason = "its weight is offloaded"
    if reason is not None:
        if how == "states":
            refuse(model, f"split_head='states' leaves the weight of its head where it is, but {reason}")
        return False
    if how == "states":
        return True
    weight = kept_weight(linear)
    (unit,) = units_of(model, [linear])
    dtype = policy_of(unit).param_dtype or weight.dtype
    traffic = head_traffic(
        _most_of_all(count(), weight),
        *(weight.shape[1], weight.shape[0], weight.device_mesh.size()),
        weight_bytes=dtype.itemsize,
        states_bytes=hidden.element_size(),
        grad_bytes=(policy_of(unit).reduce_dtype or dtype).itemsize,
        needs_hidden=torch.is_grad_enabled() and hidden.requires_grad,
        needs_weight=torch.is_grad_enabled() and weight.requires_grad,
    )
    return traffic.choice == "states"


def _why_not_in_parts(model: nn.Module, outer: nn.Module, linear: nn.Module) -> str | None:
    """Why a head cannot be used part by part, each where FSDP2 keeps it, if so."""
    weight = kept_weight(linear)
    if not is_unit_alone(outer) or not hasattr(weight, "device_mesh"):
        return "it is not in a unit of FSDP2's of its own (fully_shard(model.lm_head))"
    if len(weight.placements) != 1 or not weight.placements[0].is_shard(0):
        return f"its weight is split by {weight.placements}, not by rows over one dimension of a mesh"
    ranks = weight.device_mesh.size()
    if -(-weight.shape[0] // ranks) * (ranks - 1) >= weight.shape[0]:
        return f"its {weight.shape[0]} rows leave one of {ranks} ranks without any"
    return None


def own_part(model: nn.Module, linear: Any) -> tuple[Any, Any, VocabShard, torch.dtype | None]:
    """Weight, bias and place of this rank's part of a head, and the dtype of its inputs, as FSDP2 has them.

    The gradient of the part, which is of all ranks' losses, is divided as FSDP2 divides their sum.
    """
    weight = kept_weight(linear)
    (unit,) = units_of(model, [linear])
    policy = policy_of(unit)
    divisor = next(iter(groups_of(unit))).gradient_divide_factor or weight.device_mesh.size()

    def local(value: Any) -> Any:
        if value is None:
            return None
        part = _DividedGradient.apply(value.to_local(), divisor)
        return part if policy.param_dtype is None else part.to(policy.param_dtype)

    of_inputs = policy.param_dtype if policy.cast_forward_inputs else None
    return local(weight), local(linear.bias), shard_of(weight, has_own_rows=True), of_inputs


class _DividedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.divisor, None


def _most_of_all(number: int, weight: Any) -> int:
    """The largest of the numbers of the ranks that share a weight; the host waits for it."""
    said = torch.tensor(number, device=weight.device)
    dist.all_reduce(said, dist.ReduceOp.MAX, group=weight.device_mesh.get_group())
    return int(said)
