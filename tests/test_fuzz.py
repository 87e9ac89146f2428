"""Rows, files, YAML and words made up at random: an error that says what is wrong, or a run. Never another.

Some seconds always; ``FUZZ_SECONDS`` of them under `slow`, ten minutes by

    FUZZ_SECONDS=600 pytest -m slow tests/test_fuzz.py
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.typos import SETTINGS, check_words, transformers_settings
from tests.training.conftest import bpe_text, made_tokenizer

NAMES = ["prompt", "chosen", "rejected", "completion", "label", "tools", "images", "ref_chosen_logps", "x"]
TEXTS = st.text(max_size=12)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.sampled_from(["user", "assistant", "system", "x", None, 1]), "content": TEXTS},
    )
    | st.none()
    | TEXTS,
    max_size=3,
)
NUMBERS = st.floats() | st.integers() | st.booleans()
LEAVES = TEXTS | NUMBERS | st.none() | MESSAGES
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), TEXTS | MESSAGES | ANYTHING, max_size=5), max_size=4)
SENSIBLE = st.lists(
    st.fixed_dictionaries({name: TEXTS | MESSAGES | ANYTHING for name in NAMES[:3]}), min_size=1, max_size=3
)
# What starts process groups or asks a hub is not for words at random.
STARTS = ("engine", "deepspeed", "fsdp", "fsdp_config", "push_to_hub", "parallelism_config", "ddp_backend")
SETTINGS_OF_TRAIN = sorted({*SETTINGS["train"], *transformers_settings()} - {*STARTS})
WORDS = st.sampled_from([*(f"--{name}" for name in SETTINGS_OF_TRAIN), "--", "-5", "--config", "--x=1"])
VALUES = (
    st.sampled_from(["0", "-1", "1e-6", "nan", "none", "true", "[1", "{}", "x", "", "sigmoid", "1 2"]) | TEXTS
)
YAML = st.text(alphabet="abe:-[]{}&*!#|>'\"\n \t0.", max_size=40) | st.dictionaries(
    st.sampled_from([*SETTINGS["train"], "betta", "<<", "import"]), LEAVES, max_size=4
).map(lambda found: json.dumps(found, default=str))


@cache
def tokenizer() -> Any:
    return made_tokenizer(bpe_text())


def said_or_done(action: Callable[[], Any]) -> None:
    """What a user may get: a result, or an error of theirs with a text that is one."""
    try:
        action()
    except (ValueError, TypeError) as error:
        text = str(error)
        assert len(text) > 10 and "Traceback" not in text, repr(error)
        assert not text.startswith(("'", "unsupported operand", "'NoneType'")), repr(error)
    except ImportError as error:
        assert "not installed" in str(error), repr(error)


def read_rows_of(rows: list[Any]) -> None:
    said_or_done(lambda: encode_rows(read_rows(rows), tokenizer(), EncodingOptions()))


def read_file_of(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    said_or_done(lambda: list(read_rows(str(folder / name))))


def read_yaml_of(folder: Path, text: str) -> None:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    said_or_done(lambda: check_words("train", [str(folder / "run.yaml")]))


def read_words_of(words: list[str]) -> None:
    said_or_done(lambda: check_words("train", words))
    said_or_done(lambda: parse_train(["--model", "m", "--dataset", "d", "--use_cpu", *words]))


CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "rows": (lambda folder, rows: read_rows_of(rows), (ROWS | SENSIBLE,)),
    "jsonl": (
        lambda folder, rows, cut: read_file_of(folder, "rows.jsonl", _lines(rows)[:cut]),
        (ROWS, st.integers(0, 200)),
    ),
    "bytes": (
        lambda folder, name, text: read_file_of(folder, f"rows.{name}", text),
        (st.sampled_from(["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"]), st.binary(max_size=80)),
    ),
    "yaml": (lambda folder, text: read_yaml_of(folder, text), (YAML,)),
    "words": (lambda folder, words: read_words_of(words), (st.lists(WORDS | VALUES, max_size=5),)),
}


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def fuzz(name: str, folder: Path, **how: Any) -> None:
    action, strategies = CASES[name]

    @settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, **how)
    @given(st.tuples(*strategies))
    def run(drawn: tuple[Any, ...]) -> None:
        action(folder, *drawn)

    run()


@pytest.mark.promise(73)
@pytest.mark.parametrize("name", CASES)
def test_some(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    fuzz(name, tmp_path, max_examples=15, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "50")) / len(CASES)
    while time.monotonic() < end:
        fuzz(name, tmp_path, max_examples=50)
