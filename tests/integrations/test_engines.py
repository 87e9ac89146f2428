"""A head that an engine splits, in a group of one rank: used, or refused with the remedy."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from fastdpo import LMHead, patch_model
from tests.integrations.tiny import (
    assert_step_close,
    expected_step,
    fused_logps,
    make_batch,
    make_model,
    run_step,
    with_weight,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def process_group(tmp_path: Any) -> Iterator[None]:
    store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    gc.collect()  # a sharded model must not outlive its group
    torch.distributed.destroy_process_group()


def test_a_dtensor_head_is_one_whose_rows_are_split() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    rows, columns = (
        with_weight(lambda w, d=d: nn.Parameter(distribute_tensor(w.detach(), mesh, [Shard(d)])))
        for d in (0, 1)
    )
    head = LMHead.from_model(rows)
    assert head.vocab_parallel is not None and head.vocab_parallel.vocab_size == len(head.weight)
    with pytest.raises(ValueError, match="sharded.*DTensor"):
        patch_model(columns)


@pytest.mark.parametrize("has_own_unit", [False, True])
def test_a_head_that_an_engine_gathers_is_used(has_own_unit: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    model, batch = make_model(), make_batch()
    expected = expected_step(model, batch)
    patch_model(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if has_own_unit:
        fully_shard(model.lm_head)
    fully_shard(model)
    ours = run_step(model, batch, fused_logps)
    whole = {name: grad.full_tensor() for name, grad in ours.grads.items()}
    assert_step_close(ours._replace(grads=whole), expected)


def test_what_mixed_precision_would_round_is_refused() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ids = torch.arange(3, 9).expand(2, -1)
    asked = {"loss_type": "sigmoid", "ref_logps": torch.tensor([-20.3, -20.7])}
    call = {"input_ids": ids, "labels": ids, "return_logps": True}
    rounding, exact = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=dtype)
        for dtype in (torch.bfloat16, None)
    )
    model = fully_shard(patch_model(make_model()), mp_policy=rounding)
    with pytest.raises(
        ValueError, match=r"output_dtype: got torch\.bfloat16.*replace\(policy, output_dtype=None"
    ):
        model(**call)
    model = fully_shard(patch_model(make_model()), mp_policy=exact)
    with pytest.raises(ValueError, match="pair_loss: got ref_logps in torch.bfloat16.*MappingProxyType"):
        model(**call, pair_loss=asked)
    out = model(**call, pair_loss=MappingProxyType(asked))
    assert out.pair_loss.ref_chosen_logps.item() == torch.tensor(-20.3).item()
    assert model(**call).logps.dtype == torch.float32


def test_a_call_past_the_engine_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    model = patch_model(make_model())
    fully_shard(model.lm_head)
    fully_shard(model)
    with pytest.raises(ValueError, match="weight of its head is sharded here.*DTensor"):
        LMHead.from_model(model)
