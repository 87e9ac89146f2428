"""Mistakes on the command line: one clear line and exit code 2, or with ``--debug`` the traceback."""

# ruff: noqa: F811  (fixtures that are imported are named again where they are asked for)

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdpo import cli
from fastdpo.cli import main
from fastdpo.training.settings.command_line import parse_score, parse_train
from fastdpo.training.settings.words import ArgumentError
from tests import ROOT
from tests.cli_cases import (  # noqa: F401  (fixtures)
    BASE,
    make_tokenizer,
    model_dir,
    pairs,
    train,
    trained_bpe,
)
from tests.training.conftest import make_rows, no_curves  # noqa: F401  (fixtures)


def test_columns_that_the_losses_lack_are_one_line(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert train("--loss_type", "sdpo") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "row 1: no column 'completions'" in line and "wanted prompt, completions, scores" in line


def test_a_broken_row_is_found_before_the_model_is_read(
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(
        "fastdpo.training.loop.models.load_model", lambda *_, **__: pytest.fail("model was read")
    )
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(make_rows(1)[0]) + '\n{"prompt": \n')
    assert train(dataset=path) == 2
    assert "broken.jsonl, row 2: not valid JSON" in capsys.readouterr().err


def test_debug_shows_the_traceback(train: Callable[..., int]):
    with pytest.raises(ValueError, match="no such file"):
        train("--debug", "--dataset", "./missing.jsonl")


def test_debug_is_the_program_s_alone_and_a_setting_with_a_word(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
):
    assert cli._without_debug(["train", "--debug", "--seed", "1"]) == (["train", "--seed", "1"], True)
    assert cli._without_debug(["bench", "op", "--debug"]) == (["bench", "op"], True)
    words = ["train", "--debug", "underflow_overflow"]
    assert cli._without_debug(words) == (words, False)
    debug = parse_train([*BASE, "--debug", "underflow_overflow"]).config.debug
    assert [option.value for option in debug] == ["underflow_overflow"]
    for words in (["--loss_type", "sdpo"], ["--model", "./missing"]):
        with pytest.raises(ValueError):
            train("--debug", *words)


def test_doctor_with_debug_shows_what_refuses(model_dir: Path, pairs: Path, tmp_path: Path):
    words = [
        "doctor",
        "--model",
        str(model_dir),
        "--dataset",
        str(pairs),
        "--use_cpu",
        "--reference",
        "adapter",
    ]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    with pytest.raises(ValueError, match="has no adapter"):
        main([*words, "--output_dir", str(tmp_path / "out"), "--debug"])


def test_score_says_where_to_write(tmp_path: Path):
    run, output = parse_score([*BASE, "--output", "x.jsonl"])
    assert (run.model.model, output) == ("m", Path("x.jsonl"))
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for name, text in (
        ("s.csv", "s.csv, wanted a file ending in .jsonl, which is what is written"),
        ("scores", "wanted a file ending in .jsonl"),
        ("folder.jsonl", "wanted a file in a folder"),
        ("rows.jsonl/s.jsonl", "wanted a file in a folder"),
        ("rows.jsonl", "which is the data that is read, wanted another file"),
    ):
        with pytest.raises(ArgumentError, match=f"--output: got .*{text}"):
            parse_score([*BASE, "--dataset", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / name)])


def test_what_cannot_be_read_or_written_is_said_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor", "--model", "./missing"]) == 2
    assert "model: got './missing', and there is no such folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("here")
    words = ["train", "--model", "./missing", "--dataset", "none.jsonl", "--use_cpu", "--output_dir"]
    for place in ("file", "file/below"):
        assert main([*words, str(tmp_path / place)]) == 2
        assert f"wanted a directory: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "out"), "--learning_rate", "nan"]) == 2
    assert "learning_rate: got 'nan'" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "model: got './missing', and there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "row"], "bench: got {folder}, wanted the root of a checkout"),
        # It has all of transformers to import.
        pytest.param(["train", "--model", "m"], "--dataset is required", marks=pytest.mark.slow),
    ],
)
def test_the_program_itself(tmp_path: Path, words: list[str], message: str):
    """A real process: no traceback for a mistake."""
    ended = subprocess.run(
        [sys.executable, "-m", "fastdpo.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("fastdpo: error: " + message.format(folder=tmp_path))
    assert "Traceback" not in ended.stderr
