"""The README's examples run as printed, in a folder with a model and a file of pairs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import fastdpo
from fastdpo import cli, unpatch_trl
from fastdpo.training.settings.command_line import parse_train
from tests import ROOT
from tests.training.conftest import make_rows, tiny_llama, write_jsonl

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> Path:
    tiny_llama().save_pretrained(tmp_path / "my-model")
    make_tokenizer().save_pretrained(tmp_path / "my-model")
    write_jsonl(tmp_path / "pairs.jsonl", make_rows(8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 8 * 1024


def test_there_is_one_example_of_each_use() -> None:
    sources = blocks("python")
    uses = ("patch_trl", "fused_dpo_loss", "patch_model", "PreferenceTrainer")
    for source, use in zip(sources, uses, strict=True):
        assert use in source and len(source.splitlines()) <= 20


@pytest.mark.promise(57)
@pytest.mark.parametrize("index", range(3))
def test_python_examples_run(index: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(index)
    if index == 1:
        assert capsys.readouterr().out.split()[0].startswith("0.69314")


def run_example(index: int) -> None:
    source = blocks("python")[index]
    for name in ("peft", "trl"):
        if f"from {name} " in source:
            pytest.importorskip(name)
    try:
        exec(compile(source, f"README.md, example {index + 1}", "exec"), {})
    finally:
        unpatch_trl()


def test_the_hook_example_scores_no_padding(
    folder: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """Whatever side the model's tokenizer pads: each sentence has the log-probability that it has alone."""
    make_tokenizer(padding_side="left").save_pretrained(folder / "my-model")
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[2], "README.md, example 3", "exec"), names)
    tokenizer, model = names["tokenizer"], fastdpo.patch_model(names["model"])
    assert tokenizer.padding_side == "left" and int((names["batch"]["attention_mask"] == 0).sum()) > 0
    for sentence, found in (("The sky is blue.", "chosen"), ("The sky is green.", "rejected")):
        alone = tokenizer(sentence, return_tensors="pt")
        wanted = model(**alone, labels=alone["input_ids"], return_logps=True).logps.sum()
        assert names[found].item() == pytest.approx(wanted.item(), abs=1e-4)


def commands(word: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [words[words.index(word) + 1 :] for words in lines if word in words]


def test_the_loop_runs_from_the_row_to_the_merged_model(folder: Path) -> None:
    """The row, the file of settings, doctor, train, and what Python does with what is left."""
    pytest.importorskip("peft")
    (row,) = blocks("json")
    assert set(json.loads(row)) == {"prompt", "chosen", "rejected"}
    write_jsonl(folder / "pairs.jsonl", [json.loads(row), *make_rows(7)])
    (folder / "run.yaml").write_text(blocks("yaml")[0])
    (doctor,) = [words for words in commands("fastdpo") if words == ["doctor", "run.yaml"]]
    assert cli.main([*doctor, "--use_cpu"]) == 0
    alone, over_ranks = [words for words in commands("fastdpo") if words[0] == "train"]
    assert cli.main([*alone, "--max_steps", "1", "--report_to", "none", "--use_cpu"]) == 0
    assert (folder / "out" / "adapter_config.json").exists()
    assert parse_train([*over_ranks[1:], "--use_cpu"]).config.engine == "fsdp2"
    run_example(3)
    assert (folder / "merged" / "config.json").exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_what_it_links_is_there(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_public_name_exists() -> None:
    for name in fastdpo.__all__:
        assert getattr(fastdpo, name) is not None
