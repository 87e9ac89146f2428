"""The layouts from the shell: ``score`` fills the cache that ``train`` reads, in the same layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.cli import main
from tests.training.conftest import make_rows, read_metrics, tiny_llama, write_jsonl


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
def test_score_and_train(layout: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_rows(12))
    words = f"--model {tmp_path / 'model'} --dataset {pairs} --use_cpu --batch_layout {layout} "
    words += f"--max_tokens_per_batch 320 --reference_cache_dir {tmp_path / 'cache'}"
    assert main(["score", *words.split()]) == 0

    def unexpected(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr("fastdpo.training.reference.precompute.score_dataset", unexpected)
    words += f" --reference precomputed --output_dir {tmp_path / 'out'} --max_steps 2 --logging_steps 1"
    assert main(["train", *words.split(), "--longest_batch_first", "--disable_tqdm", "True"]) == 0
    logs = read_metrics(tmp_path / "out")
    # The scores are of other batches, so they differ from the policy's by rounding alone.
    assert logs[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert len(logs) == 2


def test_a_pair_beyond_the_budget_is_one_line(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_rows(6))
    words = f"--model {tmp_path / 'model'} --dataset {pairs} --use_cpu --max_tokens_per_batch 8"
    assert main(["train", *words.split(), "--output_dir", str(tmp_path / "out")]) == 2
    assert "max_tokens_per_batch: got 8, wanted at least" in capsys.readouterr().err
    assert torch.is_grad_enabled()
