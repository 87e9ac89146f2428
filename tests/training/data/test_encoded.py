"""Tokenised rows of files are kept, found again, memory-mapped, and made anew where anything differs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch

from fastdpo.training.data import encode as encoding
from fastdpo.training.data.chunks import Chunks
from fastdpo.training.data.columns import select_columns
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from tests.training.conftest import make_rows, write_jsonl
from tests.training.data.data_cases import ALL_KINDS, encode, row_of

# One that is left out, one that is repeated, and one that is cut.
ROWS = [*make_rows(7), {"prompt": "p:", "chosen": "", "rejected": "x"}, *make_rows(3), *make_rows(4, seed=5)]
OPTIONS = EncodingOptions(max_length=12)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, whose tables have chunks of four rows."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 4)
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were tokenised."""
    names: list[str] = []
    make = encoding.made_in_order

    def counted(maker: Any, source: Any, *args: Any, **how: Any) -> Any:
        names.append(source.name)
        return make(maker, source, *args, **how)

    monkeypatch.setattr(encoding, "made_in_order", counted)
    return names


def assert_same(one: RowDataset, other: RowDataset) -> None:
    assert one.fingerprint() == other.fingerprint() and one.row_digests() == other.row_digests()
    assert torch.equal(one.rows, other.rows) and torch.equal(one.num_labelled, other.num_labelled)
    assert one.numbers.keys() == other.numbers.keys()
    for name, values in one.numbers.items():
        same: Any = other.numbers[name]
        pairs = [(values, same)] if isinstance(values, torch.Tensor) else [(values.values, same.values)]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert one.made_with == other.made_with
    assert str(one.report).partition(": ")[2] == str(other.report).partition(": ")[2]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_rows_of_every_kind_are_found_again_as_they_were(
    kind: str, tokenizer: Any, made: list[str], tmp_path: Path
):
    answers = [(" stone walk seven", " winter"), (" lamp", " green quiet"), (" lamp", " cloud")]
    rows = [row_of(kind, f"river {i}:", *answers[i % 3]) for i in range(9)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    in_memory = encode(kind, rows, tokenizer)
    first, second = encode(kind, path, tokenizer), encode(kind, path, tokenizer)
    assert made == ["dataset", str(path)]
    for dataset in (first, second):
        assert_same(dataset, in_memory)


def test_what_was_said_of_rows_is_said_again(tokenizer: Any, made: list[str], tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first, second = (encode_rows(read_rows(path), tokenizer, OPTIONS) for _ in range(2))
    assert made == [str(path)]
    assert first.report == second.report
    report = second.report
    assert (report.kept, report.skipped) == (14, {"an empty completion": [8]})
    assert report.duplicates == 3 and report.truncated > 0
    with pytest.raises(ValueError, match="row 8.*on_bad_row='error'"):
        encode_rows(read_rows(path), tokenizer, EncodingOptions(max_length=12, on_bad_row="error"))
    assert made == [str(path)]  # found again, and refused


def _touched(path: Path) -> Path:
    return write_jsonl(path, [*ROWS[:-1], {**ROWS[-1], "chosen": "seven"}])


def _again(source: Any, tokenizer: Any, **options: Any) -> None:
    encode_rows(source, tokenizer, replace(OPTIONS, **options))


SWAPPED = {"chosen": "rejected", "rejected": "chosen"}


@pytest.mark.parametrize(
    ("again", "is_found"),
    [
        (lambda path, tokenizer: _again(read_rows(path), tokenizer), True),
        (lambda path, tokenizer: _again(read_rows(path), tokenizer, processes=2, max_bad_rows=0.5), True),
        (lambda path, tokenizer: _again(read_rows(_touched(path)), tokenizer), False),
        (lambda path, tokenizer: _again(read_rows(path), tokenizer, max_length=11), False),
        (lambda path, tokenizer: _again(select_columns(read_rows(path), SWAPPED, ()), tokenizer), False),
    ],
    ids=["the same", "how it is made", "another file", "another length", "other columns"],
)
def test_what_decides_on_rows_is_in_their_name(
    again: Callable[[Path, Any], Any], is_found: bool, tokenizer: Any, made: list[str], tmp_path: Path
):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    encode_rows(read_rows(path), tokenizer, OPTIONS)
    again(path, tokenizer)
    assert len(made) == (1 if is_found else 2)


def test_another_tokenizer_or_template_makes_other_rows(
    make_tokenizer: Callable[..., Any], made: list[str], tmp_path: Path
):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    plain, spaced = make_tokenizer(), make_tokenizer()
    # The same vocabulary and the same words: only what happens to a text before differs.
    spaced.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    other = make_tokenizer(chat_template="{{ messages[0]['content'] }}!")
    found = [encode_rows(read_rows(path), one, OPTIONS).fingerprint() for one in (plain, spaced, other)]
    assert len(made) == 3 and found[0] != found[1]


def test_rows_of_a_mixture_are_found_by_its_parts(tokenizer: Any, made: list[str], tmp_path: Path):
    parts = [write_jsonl(tmp_path / f"{i}.jsonl", make_rows(8, seed=i)) for i in range(2)]
    for weights in (None, None, (3, 1), (1, 3)):
        encode_rows(read_rows([str(part) for part in parts], weights=weights), tokenizer, OPTIONS)
    assert len(made) == 3


def test_tokens_take_no_memory_of_the_process(tokenizer: Any, tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(64))
    encode_rows(read_rows(path), tokenizer, OPTIONS)
    before = pyarrow.total_allocated_bytes()
    dataset = encode_rows(read_rows(path), tokenizer, OPTIONS)
    assert pyarrow.total_allocated_bytes() - before < 4096
    assert len(dataset.tokens.chunks) == 16  # of four rows
    chunk = dataset.tokens.chunks[3]
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".arrow" in line]
    ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert any(start <= chunk.data_ptr() < end for start, end in ends)


class _Deadly(list[Any]):
    """Rows that kill the process that reads the tenth."""

    def __iter__(self) -> Any:
        for place, row in enumerate(super().__iter__()):
            if place == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row


def _killed(path: Path, tokenizer: Any) -> None:
    source = read_rows(path)
    deadly = replace(source, rows=_Deadly(source.rows))
    encode_rows(deadly, tokenizer, OPTIONS, found=encoding.survey(source))


@pytest.mark.promise(69)
def test_what_was_killed_is_not_taken_for_whole(
    tokenizer: Any, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fastdpo.training.data.processes.BATCH_ROWS", 2)
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(path, tokenizer))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    dataset = encode_rows(read_rows(path), tokenizer, OPTIONS)
    assert made == [str(path)]
    assert_same(dataset, encode_rows(read_rows(ROWS), tokenizer, OPTIONS))


def test_an_error_is_the_rows_own_and_leaves_nothing(tokenizer: Any, made: list[str], tmp_path: Path):
    rows = [*make_rows(9), {"prompt": "p", "chosen": [{"role": "user"}], "rejected": "x"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rows\.jsonl, row 10: "):
            encode_rows(read_rows(path), tokenizer, OPTIONS)
    assert len(made) == 2


@pytest.mark.promise(69)
def test_a_full_disk_is_named(tokenizer: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    source = read_rows(path)

    def full(*args: Any, **how: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write", full)
    with pytest.raises(ValueError, match=f"{cache}: tokenised rows cannot be kept there: .*No space left"):
        encode_rows(source, tokenizer, OPTIONS)
    monkeypatch.undo()


def test_nothing_is_kept_where_caching_is_off(tokenizer: Any, made: list[str], tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    datasets.disable_caching()
    try:
        first, second = (encode_rows(read_rows(path), tokenizer, OPTIONS) for _ in range(2))
    finally:
        datasets.enable_caching()
    assert len(made) == 2
    assert_same(first, second)


def test_chunks_are_one_after_the_other():
    chunks = Chunks([torch.tensor([1, 0, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 1])])
    assert len(chunks) == 5 and chunks.largest() == 1
    assert [chunks[a:b].tolist() for a, b in [(0, 2), (3, 5), (4, 5), (5, 5)]] == [[1, 0], [1, 1], [1], []]
    starts, sizes = torch.tensor([3, 0, 1, 5, 4]), torch.tensor([2, 3, 1, 0, 1])
    assert chunks.sums(starts, sizes).tolist() == [2, 2, 0, 0, 1]
