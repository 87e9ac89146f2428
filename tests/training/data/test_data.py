"""Where rows come from, what is wrong with them, and how pairs are held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset

from fastdpo.training.data.columns import survey
from fastdpo.training.data.dataset import RowDataset, split_rows
from fastdpo.training.data.report import DataReport
from fastdpo.training.data.source import read_rows
from tests.training.conftest import make_rows, write_jsonl

ROWS = make_rows(6)


def _jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "pairs.jsonl", ROWS)


def _json(folder: Path) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return path


def _json_by_lines(folder: Path) -> Path:
    return write_jsonl(folder / "lines.json", ROWS)


def _parquet(folder: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def _saved_dataset(folder: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def _folder_of_files(folder: Path) -> Path:
    (folder / "files").mkdir()
    write_jsonl(folder / "files" / "train.jsonl", ROWS)
    return folder / "files"


@pytest.mark.parametrize("write", [_jsonl, _json, _json_by_lines, _parquet, _saved_dataset, _folder_of_files])
def test_every_format_gives_the_same_rows(tmp_path: Path, write: Callable[[Path], Path]):
    source = read_rows(str(write(tmp_path)))
    assert [dict(row) for _, row in source] == ROWS
    assert list(source.numbers) == [1, 2, 3, 4, 5, 6]


def test_rows_in_memory(tmp_path: Path):
    assert read_rows(ROWS).rows == ROWS
    assert read_rows({"train": ROWS, "test": ROWS[:1]}, split="test").rows == ROWS[:1]


def test_lines_of_jsonl_are_numbered_as_editors_do(tmp_path: Path):
    path = tmp_path / "gaps.jsonl"
    path.write_text("\ufeff" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]) + "\n\n", encoding="utf-8")
    assert list(read_rows(path).numbers) == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl, row 2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n\n[1, 2]\n', r"row 3: got a JSON list, wanted an object"),
        ("a.jsonl", b'{"prompt": "\xff\xfe"}\n', r"row 1: not valid JSON"),
        ("a.json", b'[{"prompt": "a"}, 7]', r"row 2: got a JSON int"),
        ("a.json", b'[{"prompt": "a"}, {"prompt"', r"a\.json, after row 1: not valid JSON"),
        ("a.json", b'[{"prompt": "a"}', r"after row 1: not valid JSON: Expecting ','"),
        ("a.json", b'[{"prompt": "a"}] 7', r"after row 1: not valid JSON: Extra data"),
        ("a.json", b"{7", r"a\.json, row 1: not valid JSON"),
        ("a.json", b'[{"prompt": "\xff\xfe"}]', r"a\.json, after row 0: not UTF-8"),
        ("a.json", b'"text"', r"wanted a list of objects"),
        ("a.csv", b"prompt,chosen\na,b\nc\n", r"a\.csv, row 2: got 1 cells, wanted 2: prompt, chosen"),
        ("a.csv", b'prompt,chosen\na,b\nc,"d', r"a\.csv, after row 1: not valid CSV: unexpected end of data"),
        ("a.csv", b"prompt,prompt\na,b\n", r"wanted each name once"),
        ("a.csv", b"prompt,chosen\na,\xff\xfe\n", r"a\.csv, after row 0: not UTF-8"),
        ("a.txt", b"prompt", r"ending in '\.txt' .*wanted one of"),
        ("a.parquet.gz", b"PAR1", r"ending in '\.parquet\.gz' .*wanted one of"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read"),
        ("a.arrow", b"ARROW", r"a\.arrow: cannot be read"),
        *(
            (f"a{ending}", b"", r"a\.\S+: an empty file")
            for ending in (".jsonl", ".json", ".csv", ".jsonl.gz")
        ),
        ("a.json", b"[]", r"a\.json: an empty file"),
        ("a.csv", b"prompt,chosen,rejected\n", r"a\.csv: an empty file"),
    ],
)
def test_broken_files_name_the_row(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing/pairs.jsonl", "no such file"),
        ("./missing", "no such file"),
        ({"test": ROWS}, "got splits"),
        ({"prompt": ["a"], "chosen": ["b"]}, "got a dict of the columns prompt, chosen, wanted rows"),
        (iter(ROWS), "streaming"),
        (7, "wanted a path"),
    ],
)
def test_wrong_sources_are_refused(source: Any, message: str):
    with pytest.raises(ValueError, match=message):
        read_rows(source)


@pytest.mark.parametrize("row", [7, "text", ["prompt"], None])
def test_rows_in_memory_have_columns(row: Any):
    with pytest.raises(ValueError, match=r"dataset, row 2: got \w+, wanted an object with columns"):
        survey(read_rows([ROWS[0], row]))


def _pairs(count: int) -> RowDataset:
    """Pair i: prompt [i], chosen [10 + i] * (i + 1), rejected [20 + i]."""
    pieces = [[i, *[10 + i] * (i + 1), 20 + i] for i in range(count)]
    ends = torch.tensor([[1, i + 1, 1] for i in range(count)]).flatten().cumsum(0).view(-1, 3)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1, 2]])
    tokens = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int32)
    columns = {"margin": torch.arange(count, dtype=torch.float32)}
    rows = torch.arange(1, count + 1)
    return RowDataset.of_pairs(
        tokens, torch.column_stack([starts, ends]), rows, columns, DataReport("x", count, count)
    )


def test_a_pair_comes_out_as_it_went_in():
    pair = _pairs(3)[2]
    assert pair.prompt.tolist() == [2]
    assert pair.answers[0].ids.tolist() == [12, 12, 12]
    assert pair.answers[1].ids.tolist() == [22]
    assert (pair.number, pair.numbers["margin"]) == (3, 2.0)


def test_counts():
    assert _pairs(3).lengths.tolist() == [2, 3, 4]
    assert _pairs(3).num_nll_tokens(on_prompt=False) == 6


def test_the_fingerprint_sees_tokens_boundaries_and_order():
    pairs = _pairs(4)
    bounds = torch.cat([pairs.row_bounds[:, :1], torch.tensor(pairs.sizes(torch.arange(4)))], 1).cumsum(1)
    moved = bounds.clone()
    moved[1, 1] += 1  # the prompt ends one token later
    tokens = pairs.tokens[0 : len(pairs.tokens)]
    other = tokens.clone()
    other[-1] += 1
    prints = {
        pairs.fingerprint(),
        pairs.subset([0, 1, 2]).fingerprint(),
        pairs.subset([1, 0, 2, 3]).fingerprint(),
        RowDataset.of_pairs(tokens, moved, pairs.rows, {}, pairs.report).fingerprint(),
        RowDataset.of_pairs(other, bounds, pairs.rows, {}, pairs.report).fingerprint(),
    }
    assert len(prints) == 5
    assert pairs.subset([0, 1, 2, 3]).fingerprint() == pairs.fingerprint()


@pytest.mark.parametrize(("held_out", "count"), [(0.25, 5), (3, 3), (1, 1)])
def test_a_split_is_a_partition_and_repeats(held_out: float, count: int):
    train, test = split_rows(_pairs(20), held_out, seed=3)
    assert len(test) == count
    assert sorted([*train.rows.tolist(), *test.rows.tolist()]) == list(range(1, 21))
    assert split_rows(_pairs(20), held_out, seed=3)[1].rows.tolist() == test.rows.tolist()
    assert test[0].numbers["margin"] == test[0].number - 1


@pytest.mark.parametrize("held_out", [0.01, 20, 2.5, -1])
def test_a_split_without_pairs_on_both_sides_is_refused(held_out: float):
    with pytest.raises(ValueError, match="held_out"):
        split_rows(_pairs(20), held_out, seed=0)


def test_a_data_frame_of_pandas():
    rows = [*make_rows(3), {**make_rows(1)[0], "prompt": None}]
    rows = [{**row, "margin": place, "tools": [{"name": "t"}]} for place, row in enumerate(rows)]
    frame = pandas.DataFrame(rows, index=[3, 5, 7, 9])
    assert list(read_rows(frame)) == list(enumerate(rows, 1))
    assert [row["margin"] for _, row in read_rows(frame[frame.margin > 1])] == [2, 3]


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow", None])
def test_a_data_set_in_a_form_of_others(form: str | None):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "scores": [1, 0], "label": True} for row in make_rows(2)]
    formed = datasets.Dataset.from_list([{**row, "more": 1} for row in rows])
    formed = formed.with_format(form, columns=list(rows[0]))
    assert list(read_rows(formed)) == list(enumerate(rows, 1))
    changed = formed.with_transform(lambda batch: {"prompt": ["river"] * len(batch["prompt"])})
    assert list(read_rows(changed)) == [(1, {"prompt": "river"}), (2, {"prompt": "river"})]
