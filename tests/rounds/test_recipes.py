"""Each recipe of rounds, with a tiny model and a tiny judge in the real ones' places: two rounds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastdpo.cli import main
from fastdpo.rounds.rounds_file import parse_rounds, plan_round
from fastdpo.training.settings.yaml_file import read_settings
from tests import ROOT
from tests.rounds.conftest import read
from tests.training.conftest import bpe_text, made_tokenizer, make_rows, tiny_llama, write_jsonl

FOLDER = ROOT / "recipes" / "rounds"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# What makes a run small, and nothing of what makes the method.
SMALL: dict[str, dict[str, Any]] = {
    "sample": {"max_new_tokens": 10, "batch_size": 16},
    "train": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
              "disable_tqdm": True, "learning_rate": 1e-3, "max_length": 128, "max_bad_rows": 1.0,
              "logging_steps": 1, "save_strategy": "no"},
    # A random model writes digits, and no words of ours before them.
    "judge_model": {"judge_max_new_tokens": 24, "judge_pattern": "([0-9])"},
}  # fmt: skip


def test_there_is_a_recipe_for_each_method():
    assert RECIPES == ["irpo", "iterative_dpo", "nash_md", "self_rewarding", "sppo", "xpo"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_as_it_stands(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words = [str(FOLDER / f"{name}.yaml"), "--use_cpu"]
    plan = plan_round(parse_rounds(words), 1)
    assert plan.run.config.loss_type and plan.sample.counts
    text = (FOLDER / f"{name}.yaml").read_text()
    assert re.search(r"arXiv:\d{4}\.\d{5}", text) and "What is other here:" in text


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    made_tokenizer(bpe_text()).save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        **{**tiny_llama().config.to_dict(), "id2label": {0: "score"}, "label2id": {"score": 0}}
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run_recipe(
    models: Path, here: Path, judge_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    def run(name: str) -> None:
        settings = read_settings(FOLDER / f"{name}.yaml")
        rows = [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": "7"} for row in make_rows(8)
        ]
        write_jsonl(Path("prompts.jsonl"), rows)
        settings |= {"model": str(models / "policy"), "dataset": "prompts.jsonl", "output_dir": "out"}
        settings |= {"rounds": 2, "use_cpu": True, "prompts_per_round": 4}
        judge = settings["judge"]
        if "reward_model" in judge:
            judge["reward_model"] = str(judge_dir)
        if "judge_model" in judge:
            judge |= {**SMALL["judge_model"], "judge_prompt": str(ROOT / judge["judge_prompt"])}
        if "function" in judge:
            judge["function"] = str(ROOT / judge["function"])
            del judge["drop_unfinished"]  # a random model never comes to an end
        settings["sample"] |= SMALL["sample"]
        settings["train"] |= SMALL["train"]
        Path("recipe.yaml").write_text(yaml.safe_dump(settings))
        assert main(["rounds", "recipe.yaml"]) == 0

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_two_rounds(run_recipe: Callable[..., None], name: str):
    run_recipe(name)
    told = read_settings(FOLDER / f"{name}.yaml")
    for number in (1, 2):
        folder = Path(f"out/round-{number}")
        samples, judged = read(folder / "samples.jsonl"), read(folder / "judged.jsonl")
        assert len(samples) == 4 and judged and all(map(HAS[name], judged))
        counts = [told["sample"].get(f"num_{kind}samples", 0) for kind in ("", "reference_", "mixture_")]
        assert len(samples[0]["completions"]) == sum(counts)
        losses = [json.loads(line) for line in (folder / "model/metrics.jsonl").read_text().splitlines()]
        assert sum("loss" in entry for entry in losses) == 2
        assert (folder / "model/model.safetensors").is_file()
    score = yaml.safe_load(Path("out/round-2/score.yaml").read_text())
    last = str(Path("out/round-1/model"))
    assert (score["ref_model"] == last) == (told["reference"] == "last")


# What makes the method, in the rows that are trained on.
HAS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "irpo": lambda row: (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0),
    "iterative_dpo": lambda row: row["chosen_score"] > row["rejected_score"],
    "nash_md": lambda row: 0 < row["win_rate"] < 1 and "completion" in row,
    "self_rewarding": lambda row: 0 <= row["rejected_score"] < row["chosen_score"] <= 9,
    # Of the best and the worst of five, each against itself too.
    "sppo": lambda row: 0.1 <= row["rejected_win_rate"] < 0.5 < row["chosen_win_rate"] <= 0.9,
    "xpo": lambda row: (
        {row["chosen_source"], row["rejected_source"]} == {"policy", "reference"}
        and row["chosen_is_reference"] == (row["chosen_source"] == "reference")
    ),
}


def test_the_rule_of_irpo():
    sys.path.insert(0, str(FOLDER))
    try:
        from final_answer import is_right  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(FOLDER))
    said = ["So 1,234.", "first 3, then 7", "none", "It is -2.50", [{"role": "assistant", "content": "72"}]]
    wanted = ["#### 1234", "3", "5", "-2.5", 72]
    assert is_right([None] * 5, said, wanted) == [1.0, 0.0, 0.0, 1.0, 1.0]
