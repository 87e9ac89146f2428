"""One rank: a patched model under FSDP2 and FSDP1 beside one process; a JSON line for each case."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fastdpo import Execution, patch_model
from tests.distributed.cases import FSDP, HSDP
from tests.distributed.problem import (
    PAIRS,
    Collectives,
    batch,
    dpo,
    part,
    print_results,
    tiny,
    truth,
    worst_error,
)
from tests.distributed.ranks import join, leave, own_device


def _fsdp2(model: Any, unit: str, *, reshards: bool = False) -> Any:
    """``model`` under FSDP2, its head in the root's unit, in one of its own, or in one with the last norm.

    Args:
        reshards: whether the root's unit, too, is put away after its forward pass.
    """
    # Of four ranks two and two have all of the model.
    sizes, names = ((2,), ("shard",)) if dist.get_world_size() == 2 else ((2, 2), ("replicate", "shard"))
    mesh = init_device_mesh(own_device().type, sizes, mesh_dim_names=names)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    head = base.get_output_embeddings()
    if unit == "own":
        fully_shard(head, mesh=mesh)
    elif unit == "tail":  # as accelerate has it
        is_tied = head.weight is base.model.embed_tokens.weight if isinstance(head, nn.Linear) else False
        parts = [base.model.norm, *([base.model.embed_tokens] if is_tied else []), head]
        fully_shard(parts, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, **({"reshard_after_forward": True} if reshards else {}))


def _fsdp1(model: Any, unit: str) -> Any:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    head = base.get_output_embeddings()

    def is_unit(module: nn.Module) -> bool:
        return isinstance(module, LlamaDecoderLayer) or (unit == "own" and module is head)

    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_unit)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=own_device()
    )


def _gradients(model: Any) -> dict[str, Tensor]:
    if not isinstance(model, FullyShardedDataParallel):
        found: Any = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {name: grad.full_tensor() for name, grad in found.items()}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return {
            name.replace("_fsdp_wrapped_module.", ""): parameter.grad.clone()
            for name, parameter in model.module.named_parameters()
            if parameter.grad is not None and parameter.requires_grad
        }


def _case(
    engine: str,
    unit: str,
    how: str,
    *,
    labels: int = PAIRS,
    mode: str = "auto",
    accumulates: bool = False,
    is_late: bool = False,
    checkpointing: bool = False,
    reshards: bool = False,
    is_late_sync: bool = False,
    split_head: str = "weight",
    **model: Any,
) -> dict[str, Any]:
    device = own_device()
    base = tiny(**model).to(device)
    whole = {name: value.to(device) for name, value in batch(without_labels_from=labels).items()}
    options: Any = {"execution": Execution(mode=mode)}
    if how.startswith("lazy"):
        options["on_materialize"] = "error"
    elif how != "made":
        options |= {"split_head": split_head, "logits": "real"}
    expected = truth(base, whole, how)
    ours = copy.deepcopy(base)
    if not is_late:
        patch_model(ours, **options)
    ours = _fsdp2(ours, unit, reshards=reshards) if engine == "FSDP2" else _fsdp1(ours, unit)
    if is_late:
        patch_model(ours, **options)
    if checkpointing:
        ours.gradient_checkpointing_enable()
        ours.train()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = list(range(PAIRS))[rank * PAIRS // ranks : (rank + 1) * PAIRS // ranks]
    parts = [mine[:1], mine[-1:]] if accumulates else [mine]
    share = len(mine) / sum(map(len, parts))  # a rank with one pair takes it twice
    errors: list[float] = []
    calls: Any = {}
    for _ in range(2):  # the second step finds what the first one left
        ours.zero_grad()
        total = torch.zeros((), device=device)
        with Collectives() as counted:
            for number, pairs in enumerate(parts):
                if is_late_sync:
                    ours.set_requires_gradient_sync(number == len(parts) - 1)
                loss = dpo(ours, part(whole, pairs), how) * share
                (loss * ranks).backward()
                total = total + loss.detach()
        calls = dict(counted.calls)
        errors.append(worst_error(total, _gradients(ours), expected))
    error = torch.tensor(max(errors))
    dist.all_reduce(error, dist.ReduceOp.MAX)  # of each copy of the model
    return {"error": error.item(), "calls": calls, "sent": dict(counted.sent)}


if __name__ == "__main__":
    join()
    torch.set_num_threads(1)
    print_results(FSDP if dist.get_world_size() == 2 else HSDP, _case)
    leave()
