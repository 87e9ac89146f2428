"""Files of every kind in every wrapping, what is kept of them on disk, and streams."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import multiprocessing
import os
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest

from fastdpo.training.data import arrow
from fastdpo.training.data.columns import survey
from fastdpo.training.data.numbers import read_columns
from fastdpo.training.data.source import RowSource, read_rows
from fastdpo.training.settings.hub import check_there
from tests.training.conftest import make_rows, write_jsonl

ROWS = make_rows(6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def rows_of(source: Any, **how: Any) -> list[dict[str, Any]]:
    return [dict(row) for _, row in read_rows(source, **how)]


def _zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstd,
}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = pandas.DataFrame(ROWS).to_csv(index=False).encode()
LIST = json.dumps(ROWS, indent=1).encode()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("a.json", LIST), ("a.csv", CSV)])
def test_compressed_files_hold_the_same_rows(
    tmp_path: Path, name: str, content: bytes, ending: str, streaming: bool
):
    (tmp_path / (name + ending)).write_bytes(PACK[ending](content))
    source = read_rows(tmp_path / (name + ending), streaming=streaming)
    assert list(source) == list(enumerate(ROWS, 1)) == list(source)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("left", [0.5, 0.99])
def test_a_compressed_file_that_is_cut_off_is_named(
    tmp_path: Path, cache: Path, ending: str, left: float, streaming: bool
):
    content = PACK[ending](b"".join(b'{"a": %d}\n' % (i * i) for i in range(2999)))
    path = tmp_path / f"cut.jsonl{ending}"
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises(ValueError, match=rf"cut\.jsonl{ending}, after row \d+: .*ends early"):
        rows_of(path, streaming=streaming)
    assert not list(cache.rglob("*.arrow")) and not list(cache.rglob("*.incomplete"))
    path.write_bytes(content)
    assert len(rows_of(path, streaming=streaming)) == 2999


def test_cells_of_csv_are_text_and_numbers_are_read_where_they_are_wanted(tmp_path: Path):
    long = "long, " * 50_000
    path = tmp_path / "a.tsv"
    path.write_text(
        f'\ufeffprompt\tchosen\tmargin\r\n1\t42\t0.5\r\n\t"a ""b""\nc"\t-1\r\n\r\nNA\t{long}\tn/a\r\n',
        "utf-8",
    )
    source = read_rows(path)
    assert list(source) == [
        (1, {"prompt": "1", "chosen": "42", "margin": "0.5"}),
        (2, {"prompt": None, "chosen": 'a "b"\nc', "margin": "-1"}),
        (3, {"prompt": "NA", "chosen": long, "margin": "n/a"}),
    ]
    assert read_columns(source.rows[1], {"margin": "margin"}, "here") == {"margin": -1}
    with pytest.raises(ValueError, match="here: column 'margin': got 'n/a', wanted a number"):
        read_columns(source.rows[2], {"margin": "margin"}, "here")
    with pytest.raises(ValueError, match="here: no column 'gap': got .* wanted a number in it"):
        read_columns(source.rows[2], {"margin": "gap"}, "here")


def test_rows_need_no_columns_or_types_in_common(tmp_path: Path):
    rows = [*({"prompt": "p", "score": i} for i in range(2500)), {"score": "high", "more": [1, {"a": None}]}]
    path = write_jsonl(tmp_path / "mixed.jsonl", rows)
    source = read_rows(path)
    assert list(source.rows) == rows and source.rows[-1] == rows[-1] and "prompt" not in source.rows[2500]
    assert survey(source).names == ("prompt", "score", "more")
    with pytest.raises(ValueError, match="row 2501: column 'score': got 'high'"):
        for number, row in source:
            read_columns(row, {"score": "score"}, f"row {number}")


def test_rows_of_a_file_are_on_disk(tmp_path: Path, cache: Path):
    path = write_jsonl(tmp_path / "large.jsonl", [{"prompt": "x" * 2000, "place": i} for i in range(4000)])
    read_rows(path)
    tracemalloc.start()
    try:
        source = read_rows(path)
        assert sum(row["place"] for row in source.rows) == 3999 * 2000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A thousand rows at a time, as texts and as objects; all are 8 MB of text.
    assert peak < 6e6
    assert source.numbers == range(1, 4001)
    assert source.rows[-1]["place"] == 3999
    with pytest.raises(IndexError):
        source.rows[4000]


def test_what_is_kept_is_found_again_and_a_changed_file_is_read_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    read = []
    original = arrow.records
    monkeypatch.setattr(arrow, "records", lambda *of: read.append(of) or original(*of))
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    for _ in range(2):
        assert list(read_rows(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    assert len(read) == 1
    before = path.stat()
    (tmp_path / "new").write_text('{"a": 3}\n\n{"a": 4}\n')  # of the same size and time
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new").replace(path)
    assert rows_of(path) == [{"a": 3}, {"a": 4}] and len(read) == 2
    path.write_text('{"a": 5}\n')
    assert rows_of(path) == [{"a": 5}] and len(read) == 3
    (tmp_path / "a.json").symlink_to(path)
    assert rows_of(tmp_path / "a.json") == [{"a": 5}] and len(read) == 4
    parquet = tmp_path / "a.parquet"
    for rows in ([{"a": 1}], [{"a": 2}, {"a": 3}]):
        pandas.DataFrame(rows).to_parquet(parquet)
        assert rows_of(parquet) == rows


def _read_in_a_process(path: Path, results: Any) -> None:
    results.put(rows_of(path))


def _die_in_the_middle(path: Path, results: Any) -> None:
    arrow.records = lambda *_: iter(
        [(1, '{"a": 7}'), *(os.kill(os.getpid(), signal.SIGKILL) for _ in range(1))]
    )
    read_rows(path)


def test_processes_share_what_one_made_and_nothing_that_is_unfinished(tmp_path: Path, cache: Path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    dying = fork.Process(target=_die_in_the_middle, args=(path, results))
    dying.start()
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    ranks = [fork.Process(target=_read_in_a_process, args=(path, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=60) for _ in ranks] == [ROWS] * 3
    for rank in ranks:
        rank.join()
    assert len(list(cache.rglob("dataset_info.json"))) == 1 and not list(cache.rglob("*.incomplete"))


def test_a_cache_that_cannot_be_written_is_named_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    assert rows_of(write_jsonl(tmp_path / "a.jsonl", ROWS)) == ROWS
    assert f"{tmp_path}/file/cache: Not a directory: rows are kept in" in caplog.text


def test_a_folder_has_splits_and_a_pattern_its_files_each_with_its_own_numbers(tmp_path: Path):
    for name, rows in (("train-1", ROWS[:2]), ("train-2", ROWS[2:5]), ("test", ROWS[5:])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert rows_of(tmp_path) == ROWS[:5] and rows_of(tmp_path, split="test") == ROWS[5:]
    for pattern, how in (("train-*.jsonl", {}), ("train-?.jsonl", {"streaming": True})):
        assert rows_of(tmp_path / pattern, **how) == ROWS[:5]
    with pytest.raises(ValueError, match=r"got the splits train, test in .*, wanted 'dev'"):
        read_rows(tmp_path, split="dev")
    with pytest.raises(ValueError, match="no such file"):
        read_rows(tmp_path / "dev-*.jsonl")
    for source in (tmp_path / "test.jsonl", ROWS):
        with pytest.raises(ValueError, match="dataset_split: got 'dev' of .* which has no splits"):
            read_rows(source, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data files in"):
        read_rows(tmp_path / "empty")
    (tmp_path / "train-2.jsonl").write_text('{"a": 1}\n7\n')
    with pytest.raises(ValueError, match=r"train-2\.jsonl, row 2: got a JSON int"):
        read_rows(tmp_path)


def test_files_of_a_folder_need_no_schema_in_common(tmp_path: Path):
    pandas.DataFrame({"a": [1, 2], "b": [None, None]}).to_parquet(tmp_path / "train-1.parquet")
    pandas.DataFrame({"a": ["x"], "c": [{"d": 1}]}).to_parquet(tmp_path / "train-2.parquet")
    wanted = [{"a": 1, "b": None}, {"a": 2, "b": None}, {"a": "x", "c": {"d": 1}}]
    assert rows_of(tmp_path) == wanted == rows_of(tmp_path, streaming=True)


def test_splits_that_datasets_saved(tmp_path: Path):
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == ROWS == rows_of(tmp_path / "saved", streaming=True)
    source = read_rows(tmp_path / "saved", split="test")
    assert (source.name, len(source)) == (f"{tmp_path}/saved[test]", 1)
    (file,) = (tmp_path / "saved" / "test").glob("*.arrow")
    assert rows_of(file) == ROWS[:1] == rows_of(file, streaming=True)
    # Rows are Python's own values, whatever format the data set is in.
    assert rows_of(parts["train"].add_column("n", [1] * 6).with_format("numpy"))[0] == {**ROWS[0], "n": 1}


def test_an_id_of_the_hub_without_a_network(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """What ``load_dataset`` keeps of one that it once had."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    made = datasets.load_dataset_builder(str(tmp_path), cache_dir=str(cache))
    made.dataset_name = made.info.dataset_name = "pairs"
    made.download_and_prepare(str(cache / "someone___pairs" / "default" / "0.0.0" / ("0" * 40)))
    check_there("dataset", "someone/pairs", kind="dataset")
    source = read_rows("someone/pairs")
    assert list(source) == list(enumerate(ROWS, 1)) and source.name == "someone/pairs[train]"
    with pytest.raises(ValueError, match="could not load 'someone/pairs', split 'dev': Unknown split"):
        read_rows("someone/pairs", split="dev")
    with pytest.raises(ValueError, match="could not load 'someone/else', split 'train': Couldn't reach"):
        read_rows("someone/else")
    with pytest.raises(ValueError, match="none in the hub's cache, and HF_HUB_OFFLINE is set"):
        check_there("dataset", "someone/else", kind="dataset")


def test_streams(tmp_path: Path):
    def generate():
        yield from ROWS[:3]
        raise OSError("connection reset")

    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet", streaming=True) == ROWS
    assert rows_of(RowSource(ROWS, range(1, 7), "x"), streaming=True) == ROWS
    stream = read_rows(datasets.IterableDataset.from_generator(generate), streaming=True)
    rows = iter(stream)
    assert [next(rows) for _ in range(3)] == list(enumerate(ROWS[:3], 1))
    with pytest.raises(ValueError, match="dataset, after row 3: the stream ends early: connection reset"):
        next(rows)
    with pytest.raises(ValueError, match="got dataset, a stream"):
        read_rows(stream)
    with pytest.raises(ValueError, match="once"):
        read_rows(iter(ROWS), streaming=True)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"a\.parquet: cannot be read"):
            rows_of(tmp_path / "a.parquet", streaming=streaming)
