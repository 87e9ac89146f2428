"""Where the tests of rounds start: a tiny model and another one, prompts of both kinds, rules as judges."""

# ruff: noqa: F401  (fixtures)

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli import main
from tests.training.conftest import (
    bpe_text,
    made_tokenizer,
    make_rows,
    no_curves,
    tiny_llama,
    write_jsonl,
)

RULES = """
def length(prompts, completions):
    return [len(text_of(completion)) for completion in completions]

def vowels(prompts, completions, **columns):
    return [sum(text_of(completion).count(letter) for letter in "aeiou") for completion in completions]

def has_letter(prompts, completions, letter):
    return [float(wanted in text_of(completion)) for wanted, completion in zip(letter, completions)]

def shorter(prompts, first, second):
    return [0.5 if len(text_of(a)) == len(text_of(b)) else len(text_of(a)) < len(text_of(b))
            for a, b in zip(first, second)]

def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of one tokenizer: ``policy`` and ``reference``."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = made_tokenizer(bpe_text())
    for seed, name in enumerate(("policy", "reference")):
        # Peaked enough to say words, and not so much that all it says is one.
        tiny_llama(seed, initializer_range=0.1).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def make_prompts() -> None:
    """``prompts.jsonl`` and ``chats.jsonl``, where the process is."""
    rows = make_rows(6)
    write_jsonl(
        Path("prompts.jsonl"),
        [{"prompt": row["prompt"], "letter": "ae"[n % 2]} for n, row in enumerate(rows)],
    )
    talks = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    write_jsonl(Path("chats.jsonl"), [{"prompt": talk, "letter": "a"} for talk in talks])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with ``prompts.jsonl``, ``chats.jsonl`` and ``rules.py``; a process of its own."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    make_prompts()
    Path("rules.py").write_text(RULES)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def sample(models: Path, here: Path) -> Callable[..., int]:
    """``fastdpo sample`` of the policy, on prompts of ``prompts.jsonl``, with further words."""

    def run(*words: str, dataset: str = "prompts.jsonl", output: str = "samples.jsonl") -> int:
        settings = (
            f"--model {models / 'policy'} --dataset {dataset} --output {output} --max_new_tokens 8 --use_cpu"
        )
        return main(["sample", *settings.split(), *words])

    return run


class Killed(BaseException):
    """What no code catches, as no code catches SIGKILL."""


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> Iterator[None]:
    """The process dies at the call after so many of a function, and what is within goes no further."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _count(patch, owner, name, calls)
        yield


@contextmanager
def counted_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[list[int]]:
    """A list that grows with each call of a function."""
    with monkeypatch.context() as patch:
        yield _count(patch, owner, name, None)


def _count(patch: pytest.MonkeyPatch, owner: Any, name: str, limit: int | None) -> list[int]:
    calls: list[int] = []
    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == limit:
            raise Killed
        calls.append(1)
        return plain(*args, **kwargs)

    patch.setattr(owner, name, call)
    return calls


def read(name: str | Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in Path(name).read_text().splitlines()]
