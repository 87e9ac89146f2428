"""Several sources as one: shares, the names of rows, and what is refused."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from fastdpo.commands.run import write_scored
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.row_numbers import row_list, row_name
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from tests.training.conftest import make_rows, write_jsonl


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """100 rows of a, 30 of b and 10 of c, which say where they are from."""
    for name, count in (("a", 100), ("b", 30), ("c", 10)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"from": name, "place": i} for i in range(count)])
    pandas.DataFrame([{"from": "b", "place": i} for i in range(30)]).to_parquet(tmp_path / "b.parquet")
    return [tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.jsonl"]


def test_all_rows_one_file_after_the_other(files: list[Path]):
    source = read_rows(files)
    assert source.name == " + ".join(map(str, files))
    assert [(row["from"], row["place"]) for row in source.rows] == [
        (name, i) for name, count in (("a", 100), ("b", 30), ("c", 10)) for i in range(count)
    ]
    assert [source.rows[i] for i in range(140)] == list(source.rows) and source.rows[-1]["from"] == "c"
    assert len(set(source.numbers)) == len(source) == 140
    assert [source.numbers[i] for i in range(140)] == list(source.numbers)
    assert row_name(source.numbers[116]) == f"17 of {files[1]}"
    assert row_list([source.numbers[-1], 4]) == f"rows 10 of {files[2]}, 4"
    assert list(read_rows(files, streaming=True)) == list(source)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.5, 0.3, 0.2], [25, 15, 10]),
        ([5, 3, 2], [25, 15, 10]),
        ([0.7, 0.2, 0.1], [70, 20, 10]),
        ([1, 1e-1, 1e-1], [100, 10, 10]),
    ],
)
def test_shares_without_a_repeat(
    files: list[Path], weights: list[float], counts: list[int], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        source = read_rows(files, weights=weights)
    rows = list(source.rows)
    assert [Counter(row["from"] for row in rows)[name] for name in "abc"] == counts
    assert f"{counts[1]} of 30 rows of {files[1]}" in caplog.text
    assert len({(row["from"], row["place"]) for row in rows}) == len(rows) == len(source)
    assert [source.rows[i] for i in range(len(source))] == rows
    # Spread over the file, not its beginning; a row keeps the number that it has in its file.
    of_a = [row["place"] for row in rows if row["from"] == "a"]
    assert of_a == sorted(of_a) and of_a[-1] >= 99 - 100 / counts[0] and of_a[0] == 0
    for number, row in source:
        assert row_name(number).startswith(f"{row['place'] + 1} of ")


def test_a_stream_takes_its_parts_in_turn(files: list[Path]):
    stream = read_rows(files[:2], weights=[0.75, 0.25], streaming=True)
    names = [row["from"] for _, row in stream]
    assert Counter(names)["b"] == 30 and 90 <= Counter(names)["a"] <= 92  # until b has ended
    for end in range(4, len(names), 4):
        assert Counter(names[:end])["b"] == end // 4
    assert list(islice(stream, 3)) == list(islice(stream, 3))


def test_each_part_has_its_split(tmp_path: Path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            write_jsonl(tmp_path / folder / f"{split}.jsonl", [{"from": folder + split}])
    folders = [tmp_path / "x", tmp_path / "y"]
    found = [row["from"] for row in read_rows(folders, split=["train", "test"]).rows]
    assert found == ["xtrain", "ytest"]
    assert [row["from"] for row in read_rows(folders, split="test").rows] == ["xtest", "ytest"]
    with pytest.raises(ValueError, match="dataset_split: got 3 for 2 sources"):
        read_rows(folders, split=["train"] * 3)
    with pytest.raises(ValueError, match="dataset_split: got .* for one source"):
        read_rows(folders[0], split=["train", "test"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            [1.0],
            r"dataset_weights: got 1 for 3 sources \(.*a\.jsonl, .*c\.jsonl\), wanted one each",
        ),
        ([1, 0, 1], r"dataset_weights: got 0 for .*b\.parquet, wanted a number above 0"),
        ([1, 1, -2], r"got -2 for .*c\.jsonl"),
        ([float("nan"), 1, 1], r"got nan for .*a\.jsonl"),
        ([1, float("inf"), 1], r"got inf for .*b\.parquet"),
        ([1, "much", 1], r"got 'much' for .*b\.parquet"),
    ],
)
def test_weights_that_do_not_fit(files: list[Path], weights: Any, message: str, streaming: bool):
    with pytest.raises(ValueError, match=message):
        read_rows(files, weights=weights, streaming=streaming)


def test_other_mixtures_that_are_refused(files: list[Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"0\.001 for .*b\.parquet, which leaves none of its 30 rows"):
        read_rows(files[:2], weights=[1, 0.001])
    with pytest.raises(ValueError, match=r"a\.jsonl twice"):
        read_rows([files[0], files[1], files[0]])
    with pytest.raises(ValueError, match="dataset_weights: got .* for one source"):
        read_rows(files[0], weights=[1.0])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: an empty file"):
        read_rows([files[0], tmp_path / "empty.jsonl"])
    pandas.DataFrame({"prompt": []}).to_parquet(tmp_path / "empty.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"empty\.parquet: no rows"):
            list(read_rows([files[0], tmp_path / "empty.parquet"], streaming=streaming))


def test_rows_are_named_by_their_file_once_they_are_tokens(tmp_path: Path, tokenizer: Any):
    bad = {**make_rows(1)[0], "chosen": ""}
    names = [
        write_jsonl(tmp_path / "a.jsonl", [*make_rows(3), bad]),
        write_jsonl(tmp_path / "b.jsonl", [bad, *make_rows(4, seed=1)]),
    ]
    found = [encode_rows(read_rows(names), tokenizer, EncodingOptions(processes=count)) for count in (1, 2)]
    report = str(found[0].report)
    assert report == str(found[1].report)
    assert f"7 of 9 pairs kept; skipped 2 with an empty completion (rows 4 of {names[0]}, 1" in report
    assert row_list(found[0].rows.tolist()[-1:]) == f"row 5 of {names[1]}"
    scored = found[0].with_reference(torch.arange(14.0))
    assert write_scored(tmp_path / "scored.jsonl", read_rows(names), [scored]) == 7
    written = [row for _, row in read_rows(tmp_path / "scored.jsonl")]
    wanted = [*make_rows(3), *make_rows(4, seed=1)]
    assert [row["ref_chosen_logps"] for row in written] == [0, 2, 4, 6, 8, 10, 12]
    assert [{name: row[name] for name in wanted[0]} for row in written] == wanted
    write_jsonl(names[1], [*make_rows(2), {**make_rows(1)[0], "chosen": 7}])
    with pytest.raises(ValueError, match=rf"^{names[1]}, row 3: .*.*"):
        encode_rows(read_rows(names), tokenizer, EncodingOptions(on_bad_row="error"))
