"""Rows are tokenised by several processes as by one: the same tokens, counts and errors, with a bar."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdpo.training.data import processes as row_processes
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.formats import Wanted
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.kinds import KINDS
from tests.training.conftest import make_rows
from tests.training.loop.kinds_data import rows_of


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_processes, "BATCH_ROWS", 4)


ROWS: list[Any] = [*make_rows(9), {"prompt": "p:", "chosen": "", "rejected": "x"}, *make_rows(5, seed=3)]


def test_pairs_are_those_of_one_process(tokenizer: Any):
    source = read_rows(ROWS)
    one = encode_rows(source, tokenizer, EncodingOptions(max_length=24))
    several = encode_rows(source, tokenizer, EncodingOptions(max_length=24, processes=3))
    assert several.report == one.report and one.report.skipped
    assert several.fingerprint() == one.fingerprint()
    assert torch.equal(several.rows, one.rows) and several.made_with == one.made_with
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_so_are_rows_of_other_kinds(tokenizer: Any):
    source = read_rows(rows_of("unpaired", 10))
    wanted = Wanted(KINDS["unpaired"], has_mismatched=True)
    found = [encode_rows(source, tokenizer, EncodingOptions(processes=count), wanted) for count in (1, 2)]
    assert found[0].fingerprint() == found[1].fingerprint() and found[0].report == found[1].report


def test_errors_are_those_of_one_process(tokenizer: Any):
    rows = [*make_rows(9), {"prompt": "p", "chosen": [{"role": "user"}], "rejected": "x"}]
    messages = []
    for count in (1, 2):
        with pytest.raises(ValueError, match="row 10") as refusal:
            encode_rows(read_rows(rows), tokenizer, EncodingOptions(processes=count))
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


class Stubborn(Exception):
    """An error that cannot be made again from its arguments."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(f"{name} of {size}")


def test_errors_that_cannot_be_sent_arrive_as_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise Stubborn("template", 3)

    monkeypatch.setattr("fastdpo.training.data.maker.RowMaker.made", fail)
    with pytest.raises(RuntimeError, match="Stubborn: template of 3"):
        encode_rows(read_rows(ROWS), tokenizer, EncodingOptions(processes=2))


def test_a_process_that_is_killed_ends_the_run(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "fastdpo.training.data.maker.RowMaker.made", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(RuntimeError, match="dataset: one of the 2 processes .* lower dataset_num_proc"):
        encode_rows(read_rows(ROWS), tokenizer, EncodingOptions(processes=2))


def test_a_bar_shows_how_far_it_is(tokenizer: Any, capsys: pytest.CaptureFixture[str]):
    for processes in (1, 2):
        encode_rows(read_rows(ROWS), tokenizer, EncodingOptions(processes=processes, show_progress=True))
        assert "Tokenising" in capsys.readouterr().err
        encode_rows(read_rows(ROWS), tokenizer, EncodingOptions(processes=processes))
        encode_rows(read_rows(ROWS[:4]), tokenizer, EncodingOptions(show_progress=True))  # one batch
        assert capsys.readouterr().err == ""


def test_processes_for_as_many_rows_as_pay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert [row_processes._processes(rows) for rows in (10, 3999, 4000, 10**6)] == [1, 1, 2, 16]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert row_processes._processes(10**6) == 2


def test_the_setting_is_how_many(make_args: Callable[..., PreferenceConfig]):
    assert make_args().encoding_options().processes is None
    options = make_args(dataset_num_proc=3, disable_tqdm=False).encoding_options()
    assert options.processes == 3 and options.show_progress
    assert not make_args(disable_tqdm=True).encoding_options().show_progress
