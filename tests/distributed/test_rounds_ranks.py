"""Sampling, judging and whole rounds by two processes: the same files, and an error on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastdpo.cli import main
from tests.distributed.ranks import run_ranks
from tests.rounds.conftest import here, models, read  # noqa: F401  (fixtures)
from tests.training.conftest import make_rows, no_curves, write_jsonl  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FAILS = """
import os

def on_one(prompts, completions):
    return [float("nan") if os.environ["RANK"] == "1" else 1.0] * len(prompts)
"""


def test_two_processes_share_the_work(models: Path, here: Path):  # noqa: F811
    write_jsonl(Path("many.jsonl"), [{"prompt": row["prompt"]} for row in make_rows(70)])
    Path("fails.py").write_text(FAILS)
    sample = f"sample --model {models / 'policy'} --dataset many.jsonl --use_cpu --max_new_tokens 6 --output"
    judge = "judge --use_cpu --dataset samples.jsonl --function"
    assert main([*sample.split(), "alone.jsonl"]) == 0
    parts = {
        "sample": {"num_samples": 3, "max_new_tokens": 6, "batch_size": 6},
        "judge": {"function": "rules.py:vowels"},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 1,
            "disable_tqdm": True,
            "max_bad_rows": 1.0,
        },
    }
    files = {"model": str(models / "policy"), "dataset": "prompts.jsonl", "output_dir": "out"}
    rounds = {**files, "rounds": 2, "use_cpu": True, **parts}
    Path("rounds.yaml").write_text(yaml.safe_dump(rounds))
    commands = (
        f"{sample} samples.jsonl",
        f"{judge} rules.py:length --output judged.jsonl",
        f"{judge} fails.py:on_one --output failed.jsonl",
        "rounds rounds.yaml",
    )
    Path("commands").write_text("\n".join(commands))
    first, second = run_ranks("tests.distributed.rounds_run", str(here / "commands"))
    for printed in (first, second):
        codes = [line for line in printed.splitlines() if line.startswith("code ")]
        assert codes == ["code 0", "code 0", "code 2", "code 0"], printed
    assert "process 1 failed: ValueError: function: on_one returned nan" in first
    assert "function: on_one returned nan" in second and "samples.jsonl, row 65 to row 70" in second
    assert read("samples.jsonl") == read("alone.jsonl")
    assert main([*judge.split(), "rules.py:length", "--output", "judged-alone.jsonl"]) == 0
    assert read("judged.jsonl") == read("judged-alone.jsonl")
    assert not Path("failed.jsonl").exists()
    assert Path("out/round-2/trained.json").is_file()
