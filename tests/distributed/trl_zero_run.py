"""One rank: TRL's fused head under ZeRO-3, as TRL runs it and with ``patch_trl``; JSON lines."""

from __future__ import annotations

import copy
from typing import Any

from tests.distributed import zero_run  # first: it chooses DeepSpeed's accelerator
from tests.distributed.ranks import leave

import deepspeed  # isort: skip
import deepspeed.comm.torch  # isort: skip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig
from trl.trainer.utils import add_fused_lm_head

from fastdpo import patch_trl, unpatch_trl
from fastdpo.integrations import trl_logprob
from tests.distributed.cases import TRL_ZERO
from tests.distributed.problem import PAIRS, batch, part, print_results, tiny, worst_error

_WORLD = 2


def _loss(model: Any, of: dict[str, Tensor]) -> Tensor:
    out = model(input_ids=of["input_ids"], labels=of["labels"], fused_lm_head=True)
    chosen, rejected = (out.log_probs.sum(-1) - of["ref_logps"]).chunk(2)
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).sum() / PAIRS
    return loss if out.entropy is None else loss + 0.01 * out.entropy.sum()


def _case(
    is_patched: bool, outputs: tuple[str, ...] = ("log_probs",), labels: int = PAIRS, **model: Any
) -> Any:
    base, whole = tiny(**model), batch(without_labels_from=labels)
    alone = copy.deepcopy(base)
    add_fused_lm_head(alone, outputs=outputs)
    expected = _loss(alone, whole)
    expected.backward()
    grads = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    calls: list[int] = []
    own = trl_logprob.linear_logprob

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(len(args[0]))
        return own(*args, **options)

    trl_logprob.linear_logprob = counted
    config = zero_run._config(3, 1)
    keeps = HfDeepSpeedConfig(config)  # by which TRL knows
    if is_patched:
        patch_trl(experimental=False)
    errors = []
    try:
        ours = copy.deepcopy(base)
        add_fused_lm_head(ours, outputs=outputs)
        optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.0)
        engine, *_ = deepspeed.initialize(model=ours, optimizer=optimizer, config=config)
        for _ in range(2):
            loss = _loss(engine, part(whole, [0, 1] if dist.get_rank() == 0 else [2, 3]))
            engine.backward(loss * _WORLD)
            full = {n: safe_get_full_grad(p) for n, p in ours.named_parameters() if p.requires_grad}
            found = {name: grad.clone() for name, grad in full.items() if grad is not None}
            engine.step()
            errors.append(worst_error(loss, found, (expected.detach(), grads)))
    finally:
        unpatch_trl()
        trl_logprob.linear_logprob = own
        del keeps
    return {"error": max(errors), "calls": len(calls)}


if __name__ == "__main__":
    deepspeed.comm.torch.build_shm_op = lambda: None  # a build of minutes; gloo does without
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.set_num_threads(1)
    print_results(TRL_ZERO, _case)
    leave()
