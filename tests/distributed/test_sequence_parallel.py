"""Sequences split over two ranks: the loss, its metrics and gradients are those of whole sequences."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastdpo import fused_dpo_loss, patch_model, shift_labels
from tests.distributed.cases import SEQUENCES
from tests.distributed.problem import batch, tiny
from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    printed = run_ranks("tests.distributed.sequence_run", seconds=120)
    ranks = []
    for text in printed:
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"case"')]
        ranks.append({line.pop("case"): line for line in lines})
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", SEQUENCES)
def test_parts_give_what_whole_sequences_give(results: dict[str, Any], name: str):
    for of_rank in results[name]:
        assert "raised" not in of_rank, of_rank["raised"]
        # Sums, lengths and three metrics, of S numbers each; more where a reference or an NLL is summed.
        assert set(of_rank["calls"]) == {"allreduce_"} and of_rank["calls"]["allreduce_"] <= 7


def test_labels_that_are_shifted_already_mean_the_same():
    model, of = patch_model(tiny()), batch()
    both = [
        model(input_ids=of["input_ids"], return_logps=True, **labels)
        for labels in ({"labels": of["labels"]}, {"shift_labels": shift_labels(of["labels"])})
    ]
    assert torch.equal(both[0].logps.roll(-1, dims=1), both[1].logps)
    assert torch.equal(both[0].logps_mask.roll(-1, dims=1), both[1].logps_mask)
    asked = {"loss_type": "sigmoid", "ref_logps": of["ref_logps"]}
    losses = [
        model(input_ids=of["input_ids"], return_logps=True, pair_loss=asked, **labels).loss
        for labels in ({"labels": of["labels"]}, {"shift_labels": shift_labels(of["labels"])})
    ]
    assert torch.equal(*losses)


def test_a_group_that_is_none_is_refused():
    hidden, labels = torch.randn(2, 3, 4), torch.randint(0, 5, (2, 3))
    with pytest.raises(TypeError, match="sequence_group: got int, wanted a process group"):
        fused_dpo_loss(hidden, torch.randn(5, 4), labels, sequence_group=2, ref_logps=torch.zeros(2))
