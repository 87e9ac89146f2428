"""One rank: a patched model under DeepSpeed's ZeRO beside one process; a JSON line for each case."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed
import deepspeed.comm.torch
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from fastdpo import Execution, patch_model
from tests.distributed.cases import ZERO
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
from tests.distributed.ranks import leave

_WORLD = 2


def _config(stage: int, accumulate: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            # Nothing is held, nor fetched ahead: what is there is there for the module that runs.
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
    }


def _case(
    stage: int,
    how: str,
    *,
    labels: int = PAIRS,
    mode: str = "auto",
    accumulate: int = 1,
    is_partitioned_first: bool = False,
    **model: Any,
) -> dict[str, Any]:
    base, whole = tiny(**model), batch(without_labels_from=labels)
    expected = truth(base, whole, how)
    if is_partitioned_first:
        ours = _partitioned(base, model)
    else:
        ours = copy.deepcopy(base)
    patch_model(
        ours, execution=Execution(mode=mode), on_materialize="error" if how.startswith("lazy") else "warn"
    )
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=ours, optimizer=optimizer, config=_config(stage, accumulate))
    held: list[str] = []  # whether the head was, while a layer ran
    head = ours.get_base_model().lm_head if hasattr(ours, "peft_config") else ours.lm_head
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save["default"]
    inside = getattr(head, "base_layer", head)
    weight = next((p for n, p in inside._parameters.items() if n == "weight"), None)
    first = next(m for n, m in ours.named_modules() if n.endswith("layers.0"))
    first.register_forward_pre_hook(lambda *_: held.append(str(getattr(weight, "ds_status", "whole"))))
    mine = [0, 1] if dist.get_rank() == 0 else [2, 3]
    errors, calls = [], {}
    for _ in range(2):
        total, grads = torch.zeros(()), {}
        with Collectives() as counted:
            for pairs in [[i] for i in mine] if accumulate > 1 else [mine]:
                loss = dpo(engine, part(whole, pairs), how)
                engine.backward(loss * _WORLD * accumulate)
                total = total + loss.detach()
                if pairs[-1] == mine[-1]:
                    found = {n: safe_get_full_grad(p) for n, p in ours.named_parameters() if p.requires_grad}
                    grads = {name: grad.clone() for name, grad in found.items() if grad is not None}
                engine.step()
        calls = dict(counted.calls)
        errors.append(worst_error(total, grads, expected))
    return {"error": max(errors), "calls": calls, "head": held[-1].rpartition(".")[2]}


def _partitioned(base: Any, model: dict[str, Any]) -> Any:
    """As ``from_pretrained`` makes a model while a configuration of ZeRO-3 is about."""
    with deepspeed.zero.Init(config_dict_or_path=_config(3, 1)):
        ours = tiny(**model)
    for to, value in zip(ours.parameters(), base.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([to], modifier_rank=0):
            if dist.get_rank() == 0:
                to.data.copy_(value)
    return ours


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    deepspeed.comm.torch.build_shm_op = lambda: None  # a build of minutes; gloo does without
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.set_num_threads(1)
    print_results(ZERO, _case)
    leave()
