"""What scores and ranks of a row mean, and which of them are refused or leave the row out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdpo.losses import LOSSES, ListLogps, build_objective
from fastdpo.training.data.scores import ScoreRules
from fastdpo.training.loop.setup import check_pairs
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.data.test_answer_data import encode

RANKING = "in_context_ranking"
LIST = {"prompt": "river:", "completions": [" stone", " walk", " lamp"], "scores": [2, 1, 0]}


def ranked(**columns: Any) -> dict[str, Any]:
    return {"prompt": "river:", "completion": [" stone", " walk", " lamp"], **columns}


def rules(*names: str) -> dict[str, Any]:
    return {"scores": ScoreRules.of([LOSSES[name] for name in names])}


def test_ranks_are_relevances_that_fall_to_zero(tokenizer: Any):
    """As scores of -1, -2, -3 they would train the ranking upside down."""
    wanted = rules(RANKING)
    dataset = encode("ranking", [ranked(ranks=[1, 2, 3]), ranked(ranks=[3, 1, 1])], tokenizer, wanted)
    assert dataset[0].numbers["scores"].tolist() == [2.0, 1.0, 0.0]
    assert dataset[1].numbers["scores"].tolist() == [0.0, 2.0, 2.0]
    sums = torch.tensor([3.0, 2.0, 1.0])
    good, bad = (
        build_objective(RANKING).loss(
            ListLogps(x, torch.ones(3), torch.zeros(3).long(), dataset[0].numbers["scores"], torch.zeros(3))
        )
        for x in (sums, sums.flip(0))
    )
    assert 0 < good < bad


@pytest.mark.parametrize(
    ("kind", "loss", "columns", "message"),
    [
        ("ranking", RANKING, {"ranks": [0, 1, 2]}, "column 'ranks': got 0, wanted whole numbers from 1"),
        ("ranking", RANKING, {"ranks": [1, 2, 5]}, "got 5, wanted whole numbers from 1, the best, to 3"),
        ("ranking", RANKING, {"ranks": [1, 1.5, 2]}, "got 1.5, wanted whole numbers"),
        ("ranking", RANKING, {"scores": [-1, -2, -3]}, f"got a score of -1, wanted .* for {RANKING}"),
        ("ranking", RANKING, {"scores": [85, 3, 1]}, r"got a score of 85, wanted a number in \[0, 30\]"),
        ("listwise", "sdpo", {"scores": [3, 2, 1], "ranks": [3, 2, 1]}, "wanted one order: rank 1 for"),
    ],
)
def test_scores_that_would_be_misread_are_refused_by_row(
    tokenizer: Any, kind: str, loss: str, columns: dict[str, Any], message: str
):
    row = ranked(**columns) if kind == "ranking" else {**LIST, "scores": None, **columns}
    fine = ranked(scores=[2, 1, 0]) if kind == "ranking" else LIST
    with pytest.raises(ValueError, match=rf"row 2: .*{message}"):
        encode(kind, [fine, row], tokenizer, rules(loss))


def test_ranks_beside_scores_of_the_same_order(tokenizer: Any):
    dataset = encode(
        "listwise", [{**LIST, "scores": [5, 7, -1], "ranks": [2, 1, 3]}], tokenizer, rules("sdpo")
    )
    assert dataset[0].numbers["scores"].tolist() == [5.0, 7.0, -1.0]


@pytest.mark.parametrize("name", ["trpa", "lipo_lambda"])
def test_rows_of_one_level_are_left_out_where_levels_are_compared(tokenizer: Any, name: str):
    rows = [{**LIST, "scores": scores} for scores in ([1, 1, 1], [0, 1, 1], [0, 0, 0])]
    dataset = encode("listwise", rows, tokenizer, rules(name))
    assert dataset.report.skipped == {"scores that are all the same": [1, 3]} and len(dataset) == 1
    assert len(encode("listwise", rows, tokenizer, rules("infonca"))) == 3


def test_tokenised_scores_are_held_to_the_same_rules(tokenizer: Any, tmp_path: Any):
    args = PreferenceConfig(output_dir=str(tmp_path), loss_type=RANKING)
    dataset = encode("ranking", [ranked(scores=[-1, -2, -3])], tokenizer)
    with pytest.raises(ValueError, match="dataset, row 1: column 'scores': got a score of -1"):
        check_pairs(dataset, args)
    args = PreferenceConfig(output_dir=str(tmp_path), loss_type="trpa")
    flat = encode("listwise", [LIST, {**LIST, "scores": [1, 1, 1]}], tokenizer)
    with pytest.raises(ValueError, match="got scores that are all the same in row 2"):
        check_pairs(flat, args)
