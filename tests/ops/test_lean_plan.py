"""The plan of mode ``lean``: blocks of rows and slabs of the vocabulary that fill the workspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdpo.ops.lean import logit_bytes
from fastdpo.plan import make_plan
from fastdpo.plan_lean import lean_blocks, make_lean_plan
from fastdpo.schedule import MIB


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "vocab", "workspace_mib"),
    [
        (16384, 4096, 128256, 512),
        (16384, 4096, 128256, 64),
        (262144, 8192, 256000, 512),
        (4096, 4096, 128256, 1),
        (1, 4096, 1 << 24, 1),
        (3, 8, 7, 1),
    ],
)
@pytest.mark.parametrize(("logit", "operand"), [(4, 2), (6, 4), (12, 8)])
def test_blocks_fill_the_workspace_and_stay_inside(
    num_tokens: int, hidden_size: int, vocab: int, workspace_mib: int, logit: int, operand: int
) -> None:
    kwargs: dict[str, Any] = {
        "logit_bytes": logit,
        "operand_bytes": operand,
        "workspace_mib": workspace_mib,
    }
    plan = make_lean_plan(num_tokens, hidden_size, vocab, **kwargs)
    assert 1 <= plan.row_block <= num_tokens and 1 <= plan.slab <= vocab
    assert plan.workspace_bytes <= workspace_mib * MIB
    is_whole = plan.row_block == num_tokens and plan.slab == vocab
    assert is_whole or plan.workspace_bytes > 0.4 * workspace_mib * MIB
    frozen = make_lean_plan(num_tokens, hidden_size, vocab, needs_weight=False, needs_hidden=False, **kwargs)
    assert (frozen.row_block, frozen.slab) == (plan.row_block, plan.slab)
    assert frozen.sum_bytes == 0


def test_a_workspace_without_room_for_one_product_is_refused() -> None:
    with pytest.raises(ValueError, match="workspace_mib"):
        lean_blocks(1, 1 << 20, 8, operand_bytes=4, workspace_mib=1)


def test_both_plans_agree() -> None:
    plan = make_plan("lean", 4096, 4096, 128256, needs_weight=True, workspace_mib=64)
    lean_plan = make_lean_plan(4096, 4096, 128256, needs_weight=True, workspace_mib=64)
    assert (plan.chunk_rows, plan.leading_dim) == (lean_plan.row_block, lean_plan.slab)
    assert plan.gemm_passes == 4 and plan.workspace_bytes <= 64 * MIB
    assert logit_bytes("triton", torch.bfloat16) == 4 and logit_bytes("reference", torch.float64) == 12
