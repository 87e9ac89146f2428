"""One rank of a model under tensor parallelism of transformers, beside one process; JSON lines."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from fastdpo import LMHead, patch_model
from tests.distributed.cases import TENSOR_PARALLEL
from tests.distributed.problem import (
    PAIRS,
    Collectives,
    batch,
    dpo,
    part,
    print_results,
    tiny,
    tiny_experts,
    truth,
    worst_error,
)
from tests.distributed.ranks import leave


def _loaded(base: Any, tensor: int, data: int) -> Any:
    """As transformers loads it: split by its tensors over ``tensor`` ranks, and by FSDP2 over ``data``."""
    split = DistributedConfig(tp_size=tensor, tp_plan="auto", **({"fsdp_size": data} if data > 1 else {}))
    with tempfile.TemporaryDirectory() as folder:
        path = [str(Path(folder) / "model")]
        if dist.get_rank() == 0:
            base.save_pretrained(path[0])
        dist.broadcast_object_list(path, 0)
        model = AutoModelForCausalLM.from_pretrained(path[0], dtype=torch.float32, distributed_config=split)
        dist.barrier()
        return model


def _case(how: str, *, tied: bool = False, data: int = 1, moe: str | None = None) -> dict[str, Any]:
    base, whole = tiny(tied=tied) if moe is None else tiny_experts(moe), batch()
    expected = truth(base, whole, how)
    ours = patch_model(_loaded(base, 2, data))
    if moe is not None:  # each rank has a part of the experts
        experts = [p for n, p in ours.named_parameters() if ".experts." in n]
        assert experts and all(p.to_local().numel() < p.numel() for p in experts)
    if data == 1:
        head = LMHead.from_model(ours)
        assert head.vocab_parallel is not None and head.weight.shape[0] < base.config.vocab_size
    pairs = PAIRS // data
    first = dist.get_rank() // 2 * pairs
    errors, calls = [], {}
    for _ in range(2):
        ours.zero_grad()
        with Collectives() as counted:
            loss = dpo(ours, part(whole, range(first, first + pairs)), how)
            (loss * data).backward()
        calls = dict(counted.calls)
        found: Any = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        grads = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
        # Every pair's loss is there once for each of the two ranks that have it.
        errors.append(worst_error(loss / 2, grads, expected))
    return {"error": max(errors), "calls": calls}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    print_results({n: c for n, c in TENSOR_PARALLEL.items() if 2 * c.get("data", 1) == ranks}, _case)
    leave()
