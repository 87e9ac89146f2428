"""Several data sets in the settings: as words, in YAML, in TRL's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdpo.training.settings.command_line import parse_score, parse_train
from fastdpo.training.settings.run import DataArguments

BASE = "--model m --use_cpu"


def data_of(words: str) -> DataArguments:
    return parse_train([*BASE.split(), *words.split()]).data


def test_words_and_yaml_say_the_same(tmp_path: Path):
    words = "--dataset a.jsonl b.parquet --dataset_weights 0.7 3 --dataset_split train dev --eval_dataset e f"
    wanted = data_of(words)
    assert (wanted.dataset, wanted.dataset_weights) == (["a.jsonl", "b.parquet"], [0.7, 3])
    assert (wanted.dataset_split, wanted.eval_dataset) == (["train", "dev"], ["e", "f"])
    forms = (
        "dataset: [a.jsonl, b.parquet]\ndataset_weights: [0.7, 3]\ndataset_split: [train, dev]",
        "dataset:\n- {path: a.jsonl, weight: 0.7}\n- {path: b.parquet, weight: 3, split: dev}",
        "datasets:\n- {path: a.jsonl, fraction: 0.7}\n- {path: b.parquet, fraction: 3, split: dev}",
    )
    for form in forms:
        path = tmp_path / "run.yaml"
        path.write_text(f"model: m\nuse_cpu: true\neval_dataset: [e, f]\n{form}\n")
        run = parse_train([str(path)])
        assert run.data == wanted
        # What is written beside the model makes the run again.
        path.write_text(yaml.safe_dump({"use_cpu": True, **run.told()}))
        assert parse_train([str(path)]).data == wanted


def test_one_is_as_before():
    assert data_of("--dataset a.jsonl").dataset == "a.jsonl"
    data = data_of("--dataset a --eval_dataset_split test")
    assert (data.eval_dataset, data.eval_dataset_split) == ("a", "test")
    assert data_of("--dataset a b --eval_dataset_split test").eval_dataset == ["a", "b"]
    parts = [{"path": "a"}, {"path": "b", "split": "dev"}]
    assert DataArguments("d", eval_dataset=parts).eval_dataset_split == ["test", "dev"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dataset": [{"path": "a", "type": "x"}]},
            "dataset: got 'type' of a part, wanted path",
        ),
        ({"dataset": [{"path": "a", "weight": 1, "fraction": 1}]}, "got 'fraction' of a part, .* each once"),
        ({"dataset": [{"split": "a"}]}, "got a part without a path"),
        ({"dataset": [{"path": "a", "weight": 1}, "b"]}, "dataset: got no weight of b"),
        (
            {"dataset": [{"path": "a", "weight": 1}], "dataset_weights": [1]},
            "a weight of a part and a list",
        ),
        (
            {"dataset": ["a", "b"], "dataset_weights": ["much", 1]},
            "dataset_weights: got 'much', wanted",
        ),
        ({"eval_dataset": [{"path": "a", "weight": 1}]}, "eval_dataset: got weights, wanted none"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


def test_none_is_none_and_no_part_is_written_over(tmp_path: Path):
    with pytest.raises(ValueError, match="--dataset is required"):
        data_of("--dataset")
    path = tmp_path / "b.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="which is the data that is read"):
        parse_score([*BASE.split(), "--dataset", "a.jsonl", str(path), "--output", str(path)])
