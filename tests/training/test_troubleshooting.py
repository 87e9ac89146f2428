"""docs/troubleshooting.md: each message is what a user's own mistake prints, to the letter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdpo
from fastdpo import cli
from tests import ROOT
from tests.training.conftest import make_rows, tiny_llama, write_jsonl

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (\d+)\. .*?\n+```text\n(.*?)\n```", PAGE, re.MULTILINE | re.DOTALL)

TRAIN = (
    "train --model my-model --dataset pairs.jsonl --output_dir out --use_cpu --max_steps 1 --report_to none"
)
SMALL = "--per_device_train_batch_size 2 --disable_tqdm true"


def command(words: str) -> Callable[[], str]:
    """What `fastdpo` ends with on standard error."""

    def run() -> str:
        assert cli.main(words.split()) in (1, 2)
        return ""

    return run


def raised(call: Callable[[], Any]) -> Callable[[], str]:
    def run() -> str:
        with pytest.raises(Exception) as caught:  # noqa: B017  (the text is what is looked at)
            call()
        return f"{type(caught.value).__name__}: {caught.value}"

    return run


def states(rows: int = 4, words: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 8, 16), torch.randn(words, 16), torch.randint(words, (rows, 8))


def loss(rows: int = 4, **more: Any) -> Callable[[], Any]:
    return lambda: fastdpo.fused_dpo_loss(*states(rows), **more)


def many_bad_rows() -> str:
    rows = [{**row, "chosen": ""} if i % 2 else row for i, row in enumerate(make_rows(12))]
    write_jsonl(Path("bad.jsonl"), rows)
    return command(f"{TRAIN.replace('pairs.jsonl', 'bad.jsonl')}")()


def a_run_is_there() -> str:
    assert cli.main(f"{TRAIN} {SMALL}".split()) == 0
    return command(f"{TRAIN} {SMALL}")()


def other_settings() -> str:
    words = f"{TRAIN} {SMALL} --save_steps 1 --output_dir kept".replace("--output_dir out ", "")
    assert cli.main(words.split()) == 0
    return command(words.replace("--max_steps 1", "--max_steps 2 --loss_type ipo --resume_from_checkpoint"))()


def real_logits() -> str:
    model = fastdpo.patch_model(tiny_llama()).train()
    logits = model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits.topk(2)
    (warning,) = [str(one.message) for one in caught if "lazy logits" in str(one.message)]
    return "UserWarning: " + re.sub(r" at \S+:\d+ ", " at train.py:84 ", warning)


MISTAKES: dict[str, Callable[[], str]] = {
    "1": command(f"{TRAIN} --betta 0.1"),
    "2": command(f"{TRAIN} --loss_type sigmod"),
    "3": command(f"{TRAIN} --loss_type sdpo"),
    "4": many_bad_rows,
    "5": a_run_is_there,
    "6": other_settings,
    "7": command(f"{TRAIN} --resume_from_checkpoint --output_dir empty".replace("--output_dir out ", "")),
    "8": command(f"{TRAIN} --lora_r 8"),
    "9": command(f"{TRAIN} --max_length 4 --truncation_mode keep_start"),
    "10": command(f"{TRAIN.replace('pairs.jsonl', 'no-such.jsonl')}"),
    "11": raised(loss(3, ref_logps=torch.zeros(3))),
    "12": raised(loss(beta=0.1)),
    "13": raised(loss(ref_logps=torch.zeros(4), loss_type="simpo", gama=1.0)),
    "14": raised(loss(ref_logps=torch.zeros(4), execution=fastdpo.Execution(backend="triton"))),
    "15": real_logits,
}


@pytest.mark.parametrize("number", MISTAKES)
def test_the_message_is_the_page_s(
    number: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_tokenizer: Callable[..., Any],
) -> None:
    tiny_llama().save_pretrained(tmp_path / "my-model")
    make_tokenizer().save_pretrained(tmp_path / "my-model")
    write_jsonl(tmp_path / "pairs.jsonl", make_rows(12))
    monkeypatch.chdir(tmp_path)
    said = MISTAKES[number]() or capsys.readouterr().err.split("fastdpo: ")[-1].strip()
    # Where the page leaves a list out, the rest is still to the letter.
    begin, _, end = dict(SECTIONS)[number].partition(" [...] ")
    assert said == begin if not end else said.startswith(begin) and said.endswith(end)


def test_there_are_fifteen_in_order() -> None:
    assert [number for number, _ in SECTIONS] == [str(i) for i in range(1, 16)] == list(MISTAKES)
