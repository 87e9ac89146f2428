"""One rank: TRL's fused head under FSDP2, as TRL runs it and with ``patch_trl``; JSON lines."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from fastdpo import patch_trl, unpatch_trl
from tests.distributed.cases import TRL
from tests.distributed.fsdp_run import _fsdp2
from tests.distributed.problem import PAIRS, batch, part, print_results, tiny, worst_error
from tests.distributed.ranks import leave

_WORLD = 2


def _loss(model: Any, of: dict[str, Tensor]) -> Tensor:
    out = model(input_ids=of["input_ids"], labels=of["labels"], fused_lm_head=True)
    chosen, rejected = (out.log_probs.sum(-1) - of["ref_logps"]).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).sum() / PAIRS


def _case(unit: str, is_patched: bool) -> dict[str, Any]:
    base, whole = tiny(), batch()
    alone = copy.deepcopy(base)
    add_fused_lm_head(alone)
    expected = _loss(alone, whole)
    expected.backward()
    grads = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    if is_patched:
        patch_trl(experimental=False)
    try:
        model = copy.deepcopy(base)
        add_fused_lm_head(model)
        model = _fsdp2(model, unit)
        loss = _loss(model, part(whole, [0, 1] if dist.get_rank() == 0 else [2, 3]))
        (loss * _WORLD).backward()
        found: Any = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        whole_grads = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
        return {"error": worst_error(loss, whole_grads, (expected.detach(), grads))}
    except ValueError as error:
        return {"said": str(error)}
    finally:
        unpatch_trl()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    print_results(TRL, _case)
    leave()
