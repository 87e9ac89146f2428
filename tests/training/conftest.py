"""A byte-level BPE trained on the spot, tiny random Llamas, and preference rows of uneven length."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.training.loop.callbacks import METRICS_FILE
from fastdpo.training.settings.config import PreferenceConfig

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VOCABULARY = 360
_WORDS = "river stone bright walk seven green quiet ocean paper lamp winter fast letter cloud seed".split()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def trained_bpe() -> str:
    return bpe_text()


def bpe_text() -> str:
    """A byte-level BPE of these words, as ``tokenizers`` writes it."""
    rng = random.Random(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentence(rng, 30) for _ in range(100)], trainer)
    return bpe.to_str()


@pytest.fixture
def make_tokenizer(trained_bpe: str) -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer that adds no special token by itself; keyword arguments as of the class."""

    return lambda **changes: made_tokenizer(trained_bpe, **changes)


def made_tokenizer(bpe: str, **changes: Any) -> PreTrainedTokenizerFast:
    settings = {"pad_token": "<pad>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE, **changes}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe), **settings)


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings))


def make_rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Pairs of strings; the answers are 1 to 12 words long, chosen and rejected unlike each other."""
    rng = random.Random(seed)
    return [
        {
            "prompt": sentence(rng, rng.randint(2, 8)) + ":",
            "chosen": " " + sentence(rng, rng.randint(1, 12)),
            "rejected": " " + sentence(rng, rng.randint(1, 12)) + ".",
        }
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what depends on the clock, and without the summary of the run."""
    entries = [json.loads(line) for line in (Path(output_dir) / METRICS_FILE).read_text().splitlines()]
    timed = ("runtime", "per_second", "preparation_time")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in entries
        if "train_runtime" not in entry
    ]


def quick_args(folder: Path, **changes: Any) -> PreferenceConfig:
    """Settings for a run on the CPU into ``folder`` that is over in a second."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "reference_cache_dir": str(folder.with_name("reference")),
        **changes,
    }
    return PreferenceConfig(**settings)


@pytest.fixture
def make_args(tmp_path: Path) -> Callable[..., PreferenceConfig]:
    """Settings as above, into the folder of the test."""
    return partial(quick_args, tmp_path / "run")


@pytest.fixture
def curves() -> None:
    """For tests that want ``curves.png``."""


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training does here."""
    if "curves" not in request.fixturenames:
        draw_none(monkeypatch)


def draw_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdpo.training.loop.callbacks.draw_curves", lambda *_: True)
