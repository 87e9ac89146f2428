"""An interrupted scoring goes on where it stopped, to the same bits, and takes nothing of another's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.training.data.ragged import Ragged
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference import scoring
from fastdpo.training.reference import shards as reference_shards
from fastdpo.training.reference.precompute import PrecomputedReference
from fastdpo.training.reference.shards import ScoreShards
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import tiny_llama
from tests.training.loop.ddp_run import answers, pairs

MakeArgs = Callable[..., PreferenceConfig]


class Batches:
    """Counts the batches that are scored, and breaks off in one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.break_in = 0, 0
        score = scoring.batch_scores

        def counted(*args: Any) -> torch.Tensor:
            if self.count + 1 == self.break_in:
                raise KeyboardInterrupt
            self.count += 1
            return score(*args)

        monkeypatch.setattr(scoring, "batch_scores", counted)

    def run(self, action: Callable[[], Any], *, break_in: int = 0) -> int:
        """How many batches ``action`` scores."""
        self.count, self.break_in = 0, break_in
        if break_in:
            with pytest.raises(KeyboardInterrupt):
                action()
        else:
            action()
        return self.count


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


@pytest.fixture
def make_reference(make_args: MakeArgs, tmp_path: Path) -> Callable[..., PrecomputedReference]:
    def make(cache: str = "cache", seed: int = 0, **changes: Any) -> PrecomputedReference:
        changes = {"per_device_eval_batch_size": 4, **changes}
        args = make_args(reference="precomputed", reference_cache_dir=str(tmp_path / cache), **changes)
        reference = PreferenceTrainer(tiny_llama(seed), args)._precomputed
        assert reference is not None
        return reference

    return make


def table(dataset: Any) -> torch.Tensor:
    return dataset.numbers["ref_logps"].values.view(-1, 2)


@pytest.mark.promise(69)
def test_an_interrupted_scoring_goes_on(
    make_reference: Callable[..., PrecomputedReference],
    batches: Batches,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    data = pairs(60, 0)
    whole = table(make_reference("whole").add_to(data))
    assert batches.run(lambda: make_reference().add_to(data), break_in=6) == 5
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.suffix == ".partial" and [file.suffix for file in folder.iterdir()] == [".npz"]
    assert batches.run(lambda: make_reference().add_to(data), break_in=3) == 2
    with caplog.at_level(logging.INFO):
        found = []
        assert batches.run(lambda: found.append(make_reference().add_to(data))) == 15 - 5 - 2
    assert "28 of 60 rows were scored by an interrupted run" in caplog.text
    assert torch.equal(table(found[0]), whole)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]
    assert batches.run(lambda: make_reference().add_to(data)) == 0


def test_what_is_kept_is_written_before_a_minute_is_over(
    make_reference: Callable[..., PrecomputedReference],
    batches: Batches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """A process that is killed has no time to write: what was written by the clock is what is left."""
    monkeypatch.setattr(reference_shards, "FLUSH_SECONDS", 0.0)
    written = []
    add = ScoreShards.add

    def watched(self: ScoreShards, *args: Any) -> None:
        add(self, *args)
        written.append(len(list(self.folder.glob("*.npz"))))

    monkeypatch.setattr(ScoreShards, "add", watched)
    assert batches.run(lambda: make_reference().add_to(pairs(60, 0)), break_in=6) == 5
    assert written == [1, 2, 3, 4, 5]
    monkeypatch.setattr(ScoreShards, "__exit__", lambda *args: None)
    assert batches.run(lambda: make_reference().add_to(pairs(60, 0)), break_in=2) == 1
    assert batches.run(lambda: make_reference().add_to(pairs(60, 0))) == 15 - 6


def test_other_settings_take_nothing(make_reference: Callable[..., PrecomputedReference], batches: Batches):
    data = pairs(60, 0)
    batches.run(lambda: make_reference().add_to(data), break_in=6)
    for changes in ({"seed": 1}, {"backend": "reference"}, {"batch_layout": "packed"}):
        assert batches.run(lambda changes=changes: make_reference(**changes).add_to(data)) == 15
    assert batches.run(lambda: make_reference().add_to(pairs(60, 1))) == 15
    # The batch size is none of the settings that the scores depend on: 40 rows are left, in batches of 8.
    assert batches.run(lambda: make_reference(reference_batch_size=8).add_to(data)) == 6
    assert batches.run(lambda: make_reference().add_to(data)) == 0


@pytest.mark.parametrize("kind", ["unpaired", "listwise"])
def test_other_data_than_pairs_goes_on_too(
    make_reference: Callable[..., PrecomputedReference], batches: Batches, kind: str
):
    loss = {"unpaired": "kto", "listwise": "sdpo"}[kind]
    data = answers(kind, 30, 0)
    found = []

    def run(cache: str) -> Callable[[], None]:
        return lambda: found.append(make_reference(cache, loss_type=loss).add_to(data))

    assert batches.run(run("whole")) == 8
    assert batches.run(run("cache"), break_in=6) == 5
    assert batches.run(run("cache")) == 3
    for name in ("ref_logps", *(["ref_mismatched_logps"] if kind == "unpaired" else [])):
        first, second = (item.numbers[name] for item in found)
        assert torch.equal(*((first.values, second.values) if isinstance(first, Ragged) else (first, second)))


@pytest.mark.promise(69)
def test_shards_that_are_not_as_written_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def shards(key: str = "key", num_rows: int = 9) -> ScoreShards:
        return ScoreShards(tmp_path / "folder", key, num_rows)

    with shards() as kept:
        kept.add(torch.tensor([3, 1]), torch.tensor([-1.0, -2.0, -3.0, -4.0]))
        kept.add(torch.tensor([8]), torch.tensor([-5.0, -6.0]))
    (path,) = (tmp_path / "folder").iterdir()
    found = shards().load()
    assert [batch.rows.tolist() for batch in found] == [[3, 1], [8]]
    assert [batch.values.tolist() for batch in found] == [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0]]
    assert shards("other").load() == shards(num_rows=10).load() == []
    assert "of another key" in caplog.text
    path.write_bytes(path.read_bytes()[:-20])
    assert shards().load() == []
    assert "cannot be read" in caplog.text
    shards().remove()
    assert list(tmp_path.iterdir()) == [] and shards().load() == []


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("numpy.savez", broken)
    shards = ScoreShards(tmp_path / "folder", "key", 1)
    with pytest.raises(OSError, match="disk full"), shards:
        shards.add(torch.tensor([0]), torch.tensor([-1.0, -2.0]))
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_scoring_that_fails_is_not_built_upon(
    make_reference: Callable[..., PrecomputedReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = pairs(8, 0)
    reference = make_reference()
    with torch.no_grad():
        reference.model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(ValueError, match="not finite in rows 1, 2"):
        reference.add_to(data)
    assert list((tmp_path / "cache").iterdir()) == []
