"""The README's examples run as printed, in a folder with a model and a file of pairs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import fastdpo
from fastdpo import cli, unpatch_trl
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


def test_there_is_one_example_of_each_use() -> None:
    sources = blocks("python")
    uses = ("fused_dpo_loss", "patch_model", "PreferenceTrainer", "patch_trl")
    for source, use in zip(sources, uses, strict=True):
        assert use in source and len(source.splitlines()) <= 20


@pytest.mark.promise(57)
@pytest.mark.parametrize("index", range(4))
def test_python_examples_run(index: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = blocks("python")[index]
    for name in ("peft", "trl"):
        if f"from {name} " in source:
            pytest.importorskip(name)
    try:
        exec(compile(source, f"README.md, example {index + 1}", "exec"), {})
    finally:
        unpatch_trl()
    if index == 0:
        assert capsys.readouterr().out.split()[0].startswith("0.69314")


def test_the_hook_example_scores_no_padding(
    folder: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """Whatever side the model's tokenizer pads: each sentence has the log-probability that it has alone."""
    make_tokenizer(padding_side="left").save_pretrained(folder / "my-model")
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[1], "README.md, example 2", "exec"), names)
    tokenizer, model = names["tokenizer"], fastdpo.patch_model(names["model"])
    assert tokenizer.padding_side == "left" and int((names["batch"]["attention_mask"] == 0).sum()) > 0
    for sentence, found in (("The sky is blue.", "chosen"), ("The sky is green.", "rejected")):
        alone = tokenizer(sentence, return_tensors="pt")
        wanted = model(**alone, labels=alone["input_ids"], return_logps=True).logps.sum()
        assert names[found].item() == pytest.approx(wanted.item(), abs=1e-4)


def test_the_shell_example_runs(folder: Path) -> None:
    (command,) = [
        line for block in blocks("bash") for line in block.splitlines() if line.startswith("fastdpo train")
    ]
    words = shlex.split(command)[1:]
    assert cli.main([*words, "--max_steps", "1", "--report_to", "none", "--use_cpu"]) == 0
    assert (folder / "out" / "config.json").exists()


def test_every_public_name_exists() -> None:
    for name in fastdpo.__all__:
        assert getattr(fastdpo, name) is not None
