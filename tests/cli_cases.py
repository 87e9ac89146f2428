"""Where the command line tests start: a tiny model on disk, pairs in a file, `fastdpo train` on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli import main
from tests.conftest import SHARED_DATA
from tests.training.conftest import (  # noqa: F401  (fixtures)
    make_rows,
    make_tokenizer,
    tiny_llama,
    trained_bpe,
    write_jsonl,
)

REAL_PAIRS = SHARED_DATA / "preference_en.jsonl"
# What every command line has to have.
BASE = ("--model", "m", "--dataset", "d", "--use_cpu")


@pytest.fixture
def model_dir(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Path:  # noqa: F811
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", make_rows(12))


@pytest.fixture
def train(model_dir: Path, pairs: Path, tmp_path: Path) -> Callable[..., int]:
    """``fastdpo train`` on the pairs above, for two quick steps, with further words."""

    def run(*words: str, dataset: Path = pairs, output: str = "out") -> int:
        settings = (
            f"--model {model_dir} --dataset {dataset} --loss_type sigmoid --output_dir {tmp_path / output} "
            f"--use_cpu --max_steps 2 --logging_steps 1 --per_device_train_batch_size 2 --save_strategy no "
            f"--learning_rate 1e-3 --disable_tqdm true --reference_cache_dir {tmp_path / 'cache'}"
        )
        return main(["train", *settings.split(), *words])

    return run
