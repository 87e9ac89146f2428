"""A head whose vocabulary is split over ranks gives what the whole head gives, in every mode."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from fastdpo import LMHead, VocabShard, fused_dpo_loss, token_divergence
from tests.distributed.cases import MISTAKES, VOCABULARY_SHARDS
from tests.distributed.ranks import run_ranks


def _results(world: int) -> list[dict[str, Any]]:
    """Of each rank, by case."""
    found = []
    for printed in run_ranks("tests.distributed.vocab_run", world=world, seconds=300):
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
        found.append({line.pop("case"): line for line in lines})
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return _results(2)


@pytest.fixture(scope="module")
def three() -> list[dict[str, Any]]:
    return _results(3)


@pytest.mark.promise(65)
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARY_SHARDS)
@pytest.mark.parametrize("world", [2, 3])
def test_shards_give_what_the_whole_head_gives(
    two: list[dict[str, Any]], three: list[dict[str, Any]], world: int, name: str
):
    for of_rank in two if world == 2 else three:
        found = of_rank[name]
        assert "raised" not in found, found["raised"]
        assert found["same"]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_group_that_is_destroyed_is_kept_by_nobody(two: list[dict[str, Any]], three: list[dict[str, Any]]):
    for of_rank in [*two, *three]:
        assert of_rank["afterwards"]["is_held"] is False


@pytest.mark.distributed
@pytest.mark.slow
def test_a_call_exchanges_a_few_numbers_a_token_and_sums_dhidden(two: list[dict[str, Any]]):
    exchanged, summed = 0, 0
    for name, num_columns in (("stash", 3), ("statistics", 7)):
        found = two[0][name]
        # The second gather is the first use of the shard, in two parts: sizes, then what is said.
        assert found["calls"] == {"allgather_": 2, "_allgather_base_": 1, "allreduce_": 1}
        exchanged, summed = found["sent"]["_allgather_base_"], found["sent"]["allreduce_"]
        num_tokens = summed // (24 * 8)  # (N, H) in fp64
        assert num_tokens == 41 and exchanged == 2 * num_tokens * num_columns * 8
    assert two[0]["score"]["calls"].get("allreduce_", 0) == 0


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_pairs_take_three_products_and_an_exchange_a_group(
    two: list[dict[str, Any]], three: list[dict[str, Any]], world: int
):
    ranks = two if world == 2 else three
    for name, products, num_columns in (
        ("pairs, answers", 3, 4),  # lse, the label's logit, whose it is, entropy
        ("pairs, a reference's states", 4, 8),  # and mean and largest logit, the reference's lse and label
    ):
        exchanged = ranks[0][name]["inside"]
        assert len(exchanged) > 5 and sum(exchanged) % (8 * num_columns) == 0
        for of_rank in ranks:  # of whatever size the part is
            assert of_rank[name]["inside"] == exchanged
            again = of_rank[name]["products"] - products  # of pairs longer than a group
            assert again == 0 if name == "pairs, answers" else 0 <= again < 0.7
    # Those handed out by a second backward pass are made again.
    assert ranks[0]["pairs, fp32"]["products"] - 6 < 0.01


@pytest.mark.promise(66)
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("overlap", r"got rows from \[0, 29\].*wanted .* 0 to 60 together, none twice"),
        ("gap", r"got rows from \[0, 31\]"),
        ("too few", "wanted .* 0 to 60 together"),
        ("nothing", "at least one row"),
        ("another size", r"got vocab_size \[61, 62\] of the ranks"),
        ("another scale", "got own rows, scale, cap, temperature, bias, LoRA"),
        ("a bias", "got own rows, scale, cap, temperature, bias, LoRA"),
        ("another dtype", "got dtypes of the weight"),
        ("other labels", "labels: got others on some ranks"),
        ("a label beyond all", "labels: got 61"),
        ("k alone", "topk: got 3"),
        ("top-k", "outputs: got topk_mass, wanted none of the k most likely"),
    ],
)
def test_mistakes_are_said_on_every_rank(two: list[dict[str, Any]], name: str, said: str):
    assert set(MISTAKES) <= set(two[0])
    for of_rank in two:
        assert "raised" not in of_rank[name], of_rank[name]["raised"]
        assert re.search(said, str(of_rank[name]["said"]))


def test_what_takes_no_shard_refuses_it():
    head = LMHead(torch.randn(5, 8), vocab_parallel=VocabShard(0, 10))
    hidden, labels = torch.randn(2, 3, 8), torch.randint(0, 5, (2, 3))
    with pytest.raises(ValueError, match="vocab_parallel: a shard of the vocabulary is not supported here"):
        token_divergence(hidden, head, hidden, labels)
    with pytest.raises(TypeError, match="vocab_parallel: got str, wanted a VocabShard"):
        fused_dpo_loss(hidden, LMHead(torch.randn(5, 8), vocab_parallel="tp"), labels)  # type: ignore[arg-type]
