"""Files that were cut off, or in which a bit flipped: who reads them next says so, or makes them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from fastdpo.cli import main
from fastdpo.rounds.notes import read_json
from fastdpo.rounds.partial import PartialWork
from fastdpo.rounds.ranks import Ranks
from fastdpo.training.data import encode as encoding
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.kept import _MANIFEST
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.callbacks import METRICS_FILE
from fastdpo.training.loop.checkpoint_files import RUN_FILE, check_checkpoint, read_run, write_run
from fastdpo.training.loop.folders import rotate
from fastdpo.training.loop.models import load_model
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.written import describe, differences
from tests.faults.test_full_disk import SETTINGS, make_trainer
from tests.rounds.test_rounds import config, rounds, same, uninterrupted, weights  # noqa: F401
from tests.training.conftest import (
    draw_none,
    made_tokenizer,
    make_rows,
    quick_args,
    read_metrics,
    tiny_llama,
    write_jsonl,
)


def flip(path: Path, place: int | None = None) -> None:
    """One bit, in the middle unless said."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# Digests


def test_a_bit_anywhere_and_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of files of several blocks, each read in several parts."""
    monkeypatch.setattr("fastdpo.training.written._BLOCK", 64)
    monkeypatch.setattr("fastdpo.training.written._READ_AT_ONCE", 24)
    whole = bytes(range(200))
    path = tmp_path / "file"
    path.write_bytes(whole)
    (tmp_path / "empty").write_bytes(b"")
    told = json.loads(json.dumps(describe(tmp_path, ["file", "empty"])))
    assert not list(differences(tmp_path, told))
    for place in range(0, len(whole), 5):
        flip(path, place)
        ((found, words),) = differences(tmp_path, told)
        assert found == path and words == "has other bytes than the 200 that were written"
        path.write_bytes(whole)
    # Blocks that change places are other bytes too.
    path.write_bytes(whole[64:128] + whole[:64] + whole[128:])
    assert list(differences(tmp_path, told))
    path.write_bytes(whole + b"x")
    assert list(differences(tmp_path, told)) == [(path, "has 201 bytes, wanted the 200 that were written")]


# Checkpoints


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise InterruptedError


@pytest.fixture(scope="module")
def interrupted_once(trained_bpe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that ends behind its checkpoint at step 4; and what one logs that does not."""
    folder, settings = tmp_path_factory.mktemp("interrupted"), {**SETTINGS, "save_total_limit": 2}
    tokenizer = made_tokenizer(trained_bpe)
    with pytest.MonkeyPatch.context() as patch:
        draw_none(patch)
        with pytest.raises(InterruptedError):
            make_trainer(quick_args(folder / "run", **settings), tokenizer, Stop()).train()
        make_trainer(quick_args(folder / "whole", **settings), tokenizer).train()
    return folder / "run", read_metrics(folder / "whole")


@pytest.fixture
def interrupted(interrupted_once: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted_once[0], tmp_path / "run"))


def resume(folder: Path, tokenizer: Any, checkpoint: Any = True) -> Any:
    trainer = make_trainer(quick_args(folder, **SETTINGS), tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.promise(74)
@pytest.mark.parametrize("change", [flip, cut])
def test_every_file_of_a_checkpoint_is_held_to_what_was_written(
    interrupted: Path, change: Callable[[Path], None]
):
    checkpoint = interrupted / "checkpoint-4"
    files = sorted(path for path in checkpoint.iterdir())
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", RUN_FILE} < {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        change(path)
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: {path} .* was changed; remove this"):
            check_checkpoint(checkpoint)
        path.write_bytes(content)
    assert check_checkpoint(checkpoint) is not None


@pytest.mark.promise(74)
@pytest.mark.parametrize("change", [flip, cut])
def test_weights_of_a_checkpoint_that_is_loaded_as_a_model_are_too(
    interrupted: Path, change: Callable[[Path], None]
):
    checkpoint = interrupted / "checkpoint-4"
    weights, optimizer = checkpoint / "model.safetensors", checkpoint / "optimizer.pt"
    change(optimizer)  # which a model is without
    load_model(str(checkpoint))
    change(weights)
    with pytest.raises(ValueError, match=f"^ref_model: {weights} .* was changed; remove this"):
        load_model(str(checkpoint), what="ref_model")
    (checkpoint / RUN_FILE).write_text("{")
    with pytest.raises(ValueError, match=f"^model: {checkpoint / RUN_FILE} cannot be read"):
        load_model(str(checkpoint))


@pytest.mark.promise(74)
@pytest.mark.parametrize("change", [flip, cut])
def test_weights_of_an_adapter_that_is_merged_are_too(
    tmp_path: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
):
    base, adapter = str(tmp_path / "base"), tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    write_run(Path(base), {})
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], r=2)
    )
    model.save_pretrained(adapter)
    write_run(adapter, {})
    assert main(["merge", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    change(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"^model: {adapter / 'adapter_model.safetensors'} has "):
        load_model(str(adapter))
    capsys.readouterr()
    assert main(["merge", str(adapter), "--output_dir", str(tmp_path / "again")]) == 2
    assert f"error: adapter: {adapter / 'adapter_model.safetensors'} has " in capsys.readouterr().err
    write_run(adapter, {})  # whole again, and its base is not
    change(Path(base, "model.safetensors"))
    with pytest.raises(ValueError, match=f"^model: could not load .*: base: {base}/model.safetensors has "):
        load_model(str(adapter))


@pytest.mark.promise(74)
def test_no_flipped_bit_of_what_a_checkpoint_says_is_believed(interrupted: Path):
    path = interrupted / "checkpoint-4" / RUN_FILE
    content, told = path.read_bytes(), read_run(path.parent)
    for place in range(0, len(content), 7):
        flip(path, place)
        try:
            assert read_run(path.parent) == told, f"byte {place}"  # a space that became another
        except ValueError as error:
            assert str(path) in str(error)
        path.write_bytes(content)


@pytest.mark.promise(74)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", RUN_FILE])
def test_a_run_does_not_go_on_from_what_was_changed(
    interrupted: Path, interrupted_once: tuple[Path, Any], tokenizer: Any, name: str
):
    """And goes on as it is told: from the checkpoint before."""
    flip(interrupted / "checkpoint-4" / name)
    logged = (interrupted / METRICS_FILE).read_bytes()
    with pytest.raises(
        ValueError, match=rf"checkpoint-4/{name} .* was changed; remove this checkpoint, or name"
    ):
        resume(interrupted, tokenizer)
    assert (interrupted / METRICS_FILE).read_bytes() == logged
    if name.startswith("model"):
        assert resume(interrupted, tokenizer, str(interrupted / "checkpoint-2")).state.global_step == 6
    else:
        shutil.rmtree(interrupted / "checkpoint-4")
        resume(interrupted, tokenizer)
    assert read_metrics(interrupted) == interrupted_once[1]


@pytest.mark.promise(74)
def test_a_checkpoint_of_an_earlier_version_goes_on(
    interrupted: Path, interrupted_once: tuple[Path, Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    """Which said how long its files are, and no more."""
    path = interrupted / "checkpoint-4" / RUN_FILE
    told = json.loads(path.read_text())
    told.pop("digest")
    told["files"] = {name: size for name, (size, _) in told["files"].items()}
    path.write_text(json.dumps(told))
    resume(interrupted, tokenizer)
    assert "checkpoint-4 is of a version that kept no digests of files" in caplog.text
    assert read_metrics(interrupted) == interrupted_once[1]
    shutil.rmtree(interrupted / "checkpoint-6")


@pytest.mark.promise(74)
def test_the_best_model_is_held_to_what_was_written(tokenizer: Any, tmp_path: Path):
    class Spoil(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            flip(Path(args.output_dir, f"checkpoint-{state.global_step}", "model.safetensors"))

    settings = {**SETTINGS, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = quick_args(tmp_path / "run", **settings, load_best_model_at_end=True)
    trainer = PreferenceTrainer(
        tiny_llama(), args, train_dataset=make_rows(20), eval_dataset=make_rows(4), callbacks=[Spoil()],
        processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"checkpoint-2/model\.safetensors has other bytes"):
        trainer.train()


def test_what_is_removed_beyond_a_limit(tmp_path: Path):
    """Unfinished ones first, then the oldest; never the best, nor the one just written."""

    def checkpoint(step: int, *files: str) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("preference_state_0.json", *files):
            (folder / name).write_text("{}")
        return folder

    for step in (1, 2, 3, 5):
        checkpoint(step, "trainer_state.json", RUN_FILE)
    checkpoint(4, "trainer_state.json")

    def left() -> list[int]:
        return sorted(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.iterdir())

    rotate(tmp_path, None, tmp_path / "checkpoint-5")
    assert left() == [1, 2, 3, 4, 5]
    rotate(tmp_path, 4, tmp_path / "checkpoint-5", None)
    assert left() == [1, 2, 3, 5]
    rotate(tmp_path, 2, tmp_path / "checkpoint-5", str(tmp_path / "checkpoint-1"))
    assert left() == [1, 5]
    rotate(tmp_path, 1, tmp_path / "checkpoint-5", str(tmp_path / "checkpoint-1"))
    assert left() == [1, 5]


@pytest.mark.promise(74)
def test_metrics_that_were_changed_are_left_out_and_counted(
    interrupted: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    path = interrupted / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xff" + lines[0] + lines[1].replace(b'"step"', b'"ste\xf0"') + b"".join(lines[2:]))
    resume(interrupted, tokenizer)
    assert f"{path}: 2 lines that are no log are left out" in caplog.text
    assert [entry["step"] for entry in read_metrics(interrupted)] == [3, 4, 5, 6]


# Rows of files, and their tokens


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield tmp_path / "cache" / "fastdpo-rows"


def _removed(path: Path) -> None:
    path.unlink()


@pytest.mark.promise(74)
@pytest.mark.parametrize("change", [flip, cut, _removed])
@pytest.mark.parametrize("name", ["*.arrow", "dataset_info.json", _MANIFEST])
def test_tables_that_were_changed_are_made_again(
    tokenizer: Any, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str,
    change: Callable[[Path], None],
):  # fmt: skip
    """Rows of a file of text, and tokens of rows."""
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(9))

    def encoded() -> Any:
        return encode_rows(read_rows(path), tokenizer, EncodingOptions())

    first = encoded()
    tables = sorted(cache.iterdir())
    folders = [table for table in tables if table.is_dir()]
    assert len(folders) == 2
    files = [file for folder in folders for file in folder.rglob(name)]
    assert len(files) == 2
    whole = [file.read_bytes() for file in files]
    for file in files:
        change(file)
    again = encoded()
    assert again.fingerprint() == first.fingerprint() and again.row_digests() == first.row_digests()
    is_noted = (name, change) != (_MANIFEST, _removed)  # of a process that died before it wrote it
    assert caplog.text.count("it was changed, and is made again") == (2 if is_noted else 0)
    assert caplog.text.count(str(files[0])) == is_noted
    assert [file.read_bytes() for file in files if file.suffix == ".arrow"] == whole * (name == "*.arrow")
    caplog.clear()
    encoded()
    assert not caplog.text


@pytest.mark.promise(74)
def test_a_table_of_parquet_is_made_again(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(make_rows(9)).to_parquet(path)
    first = list(read_rows(path))
    (file,) = cache.rglob("*.arrow")
    flip(file)
    assert list(read_rows(path)) == first and f"{file} has other bytes" in caplog.text


def test_an_early_death_leaves_no_table(
    tokenizer: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between the table and what is told of it: it is found, and told."""
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(9))
    source = read_rows(path)
    with monkeypatch.context() as patch:
        patch.setattr("fastdpo.training.data.kept.write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode_rows(source, tokenizer, EncodingOptions())
    monkeypatch.setattr(encoding, "made_in_order", lambda *_, **how: pytest.fail("tokenised again"))
    encode_rows(source, tokenizer, EncodingOptions())
    assert len(list(cache.glob(f"*/{_MANIFEST}"))) == 2


# Rounds


@pytest.mark.promise(74)
def test_a_record_that_was_changed_is_no_record(tmp_path: Path):
    def work() -> PartialWork:
        return PartialWork(tmp_path / "out.jsonl", {"seed": 1}, Ranks.joined(True), overwrite=False)

    first = work()
    record = {"part": 0, "answers": "seven rivers"}
    first.add(record)
    first.close()
    (path,) = first.folder.glob("part-*")
    content = path.read_bytes()
    assert work().records() == [record]
    for place in range(len(content) - 1):
        flip(path, place)
        with pytest.raises(
            ValueError, match=rf"{path}, line 1: got no record: the file is broken, remove it"
        ):
            work().records()
        path.write_bytes(content)
    flip(path, len(content) - 1)  # the end of a line: not written to its end
    assert work().records() == []


@pytest.mark.promise(74)
def test_files_of_a_round_that_were_changed(
    rounds: Callable[..., int],  # noqa: F811
    uninterrupted: dict[str, Any],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    """Named, whichever it is; removed as is said, all is made again, to the same end."""
    assert rounds(rounds=2) == 0
    first, second = Path("out/round-1"), Path("out/round-2")
    shutil.rmtree(second / "model")
    (second / "trained.json").unlink()
    files = [second / f"{name}.jsonl" for name in ("samples", "judged", "scored")]
    files += [first / "model/model.safetensors", first / "model/config.json", first / "trained.json"]
    for path in [*files, second / "files.json", Path("out/rounds.json")]:
        content = path.read_bytes()
        # A letter of a text, or of a name: still JSON, but not what was written.
        place = content.index(b"completions") if path.name == "samples.jsonl" else None
        (flip if path.suffix != ".json" or path.name == "config.json" else cut)(
            path, *([place] if place else [])
        )
        capsys.readouterr()
        assert rounds(rounds=2) == 2
        assert str(path) in (said := capsys.readouterr().err) and "remove" in said
        path.write_bytes(content)
    flip(files[0])
    for path in files[:3]:
        path.unlink()
    assert rounds(rounds=2) == 0
    assert same(weights(second / "model"), uninterrupted["weights"])
    assert (read_json(second / "files.json") or {}).keys() == {path.name for path in files[:3]}


@pytest.mark.promise(74)
def test_a_model_that_was_cut_off_is_named(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What libraries say of a file of theirs comes as one line, with its name."""
    broken = Path(shutil.copytree(models / "policy", tmp_path / "broken"))
    cut(broken / "model.safetensors")
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(4))
    words = f"score --model {broken} --dataset {rows} --use_cpu --reference_cache_dir {tmp_path / 'cache'}"
    assert main(words.split()) == 2
    assert f"model: could not load '{broken}': Error while deserializing" in capsys.readouterr().err
