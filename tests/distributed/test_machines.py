"""What ``fastdpo plan`` predicts of engines is what ranks on CPUs hold and send."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from typing import Any

import pytest
import torch

from fastdpo.doctor.machines import Run, weights_of
from fastdpo.plan.machine_traffic import COLLECTIVES, step_transfers
from fastdpo.plan.machines import Step, held_bytes
from tests.distributed.cases import MACHINES
from tests.distributed.problem import tiny
from tests.distributed.ranks import run_ranks
from tests.training.conftest import tiny_llama

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
_HELD = ("weights", "gradients", "optimizer", "reference")
_NAMES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
}
# Counts, norms and losses, which a plan leaves out, in bytes of a step; and what parts are padded by.
_SMALL = _ALIGNED = 128
# What DeepSpeed does not gather backward: the first layer's own, below which nothing is trained.
_FIRST_LAYER = 8192 + 128


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    # DeepSpeed's config for ZeRO-3 lives on in a process, where transformers would split no tensors.
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    groups: dict[tuple[bool, int], list[str]] = {}
    for name, case in MACHINES.items():
        ranks, is_zero = case.get("tensors", 1) * case.get("data", 2), case["engine"].startswith("zero")
        if has_deepspeed or not is_zero:
            groups.setdefault((is_zero, ranks), []).append(name)
    found = {}
    for (_, ranks), names in groups.items():
        printed = run_ranks("tests.distributed.machine_run", *names, world=ranks, seconds=400)
        lines = [json.loads(line) for line in printed[0].splitlines() if line.startswith('{"case"')]
        found |= {line.pop("case"): line for line in lines}
    return found


@pytest.mark.parametrize("name", MACHINES)
def test_a_plan_is_what_ranks_count(name: str, ran: dict[str, Any]):
    if name not in ran:
        pytest.skip("needs deepspeed (make test-deepspeed)")
    case, counted = MACHINES[name], ran[name]
    assert "raised" not in counted, counted["raised"]
    tensors, data, is_mixed = case.get("tensors", 1), case.get("data", 2), case.get("bf16", False)
    replicas = case.get("replicas", 1)
    # Pairs of 6 tokens of prompt and 6 of each answer, two a rank.
    tokens, labelled = counted.get("tokens", 48), counted.get("labelled", 24)
    reference = case.get("reference", "none")
    config = (tiny() if tensors > 1 else tiny_llama()).config
    run = Run(
        engine=case["engine"], tp_size=tensors, is_lora=case.get("lora", False), tokens=tokens,
        labelled_tokens=labelled, dtype=torch.float32, is_mixed=is_mixed, reference=reference,
        is_checkpointed=False, context_chunk=None, replicas=replicas,
    )  # fmt: skip
    step = Step(
        engine=run.engine, num_gpus=tensors * data, tp_size=tensors, compute_bytes=run.compute_dtype.itemsize,
        reference=reference, tokens=tokens, labelled=labelled, hidden_size=config.hidden_size,
        is_mixed=is_mixed, persistent=case.get("persistent", 0), replicas=replicas,
    )  # fmt: skip
    weights = weights_of(config, run)
    held = held_bytes(weights, step)
    for what in _HELD:
        assert counted[what] == pytest.approx(held[what], abs=_ALIGNED, rel=0), what

    planned: Counter[str] = Counter()
    for transfer in step_transfers(weights, step):
        planned[transfer.collective] += transfer.size
    sent: Counter[str] = Counter()
    for op, size in counted["sent"].items():
        sent[_NAMES.get(op, op)] += size
    for collective in COLLECTIVES:
        more = planned[collective] - sent[collective]
        at_most = _FIRST_LAYER if name == "zero3, LoRA" and collective == "all-gather" else _SMALL
        assert -_SMALL <= more <= at_most, (collective, planned[collective], sent[collective])
