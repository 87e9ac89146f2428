"""A head that stays where FSDP2 keeps it: the ranks' labelled hidden states go to all parts of the weight.

The head's own call, whose hooks would gather the weight, is not made. Each rank's part of the weight is a
leaf as it lies, so its gradient is where FSDP2 leaves that of others: for clipping, optimizer and checkpoints
nothing is changed. It takes a unit of FSDP2's for the head alone; others are gathered for the rest. Where
groups of ranks have all of the model (HSDP), states move within one, and gradients are summed over groups.
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
        *(weight.shape[1], weight.shape[0], weight.device_mesh.size(-1)),
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
    *copies, split = weight.placements
    if not (split.is_shard(0) and len(copies) < 2 and all(one.is_replicate() for one in copies)):
        return f"its weight is split by {weight.placements}, not by rows over one dimension of a mesh"
    ranks = weight.device_mesh.size(-1)
    if -(-weight.shape[0] // ranks) * (ranks - 1) >= weight.shape[0]:
        return f"its {weight.shape[0]} rows leave one of {ranks} ranks without any"
    return None


def own_part(model: nn.Module, linear: Any) -> tuple[Any, Any, VocabShard, torch.dtype | None]:
    """Weight, bias and place of this rank's part of a head, and the dtype of its inputs, as FSDP2 has them.

    The gradient of the part, which is of the losses of all ranks that share the head, is summed over the
    copies of it, and divided as FSDP2 divides the sum.
    """
    weight = kept_weight(linear)
    (unit,) = units_of(model, [linear])
    policy = policy_of(unit)
    mesh = weight.device_mesh
    divisor = next(iter(groups_of(unit))).gradient_divide_factor or mesh.size()
    copies = mesh.get_group(0) if mesh.ndim > 1 else None

    def local(value: Any) -> Any:
        if value is None:
            return None
        part = _ReducedGradient.apply(value.to_local(), divisor, copies)
        return part if policy.param_dtype is None else part.to(policy.param_dtype)

    of_inputs = policy.param_dtype if policy.cast_forward_inputs else None
    return local(weight), local(linear.bias), shard_of(weight, has_own_rows=True), of_inputs


class _ReducedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, divisor: float, copies: Any) -> Tensor:
        ctx.divisor, ctx.copies = divisor, copies
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad / ctx.divisor
        if ctx.copies is not None:
            dist.all_reduce(grad, group=ctx.copies)
        return grad, None, None


def _most_of_all(number: int, weight: Any) -> int:
    """The largest of the numbers of the ranks that share a weight; the host waits for it."""
    said = torch.tensor(number, device=weight.device)
    # Copies of it choose alike too: FSDP2 sums gradients over them where the weight moves.
    for group in weight.device_mesh.get_all_groups():
        dist.all_reduce(said, dist.ReduceOp.MAX, group=group)
    return int(said)
