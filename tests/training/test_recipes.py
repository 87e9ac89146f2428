"""Each file of recipes/ for `fastdpo train`: two steps, a tiny model of its kind in the real one's place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from benchmarks.recipe_memory import CONFIGS
from fastdpo import cli
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.yaml_file import read_settings
from tests import ROOT
from tests.integrations.tiny_configs import FAMILIES, make_config
from tests.training import eyes
from tests.training.conftest import VOCABULARY, make_rows, write_jsonl

FOLDER = ROOT / "recipes"
# Those without a model are accelerate's.
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if "model" in read_settings(path))
FAMILY = {
    "llama3": "llama",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "smollm2": "llama-tied",
    "mixtral": "mixtral",
    "llava": "llava",
}
# What makes a run small, and nothing of what makes the recipe. An engine wants processes of its own.
SMALL: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "use_cpu": True,
    "bf16": False, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "max_length": 256,
}  # fmt: skip


def family_of(name: str) -> str:
    return FAMILY[name.partition("_")[0]]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_as_it_stands(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith(f"# fastdpo train recipes/{name}.yaml\n")
    assert "not measured" in text and re.search(r"\d GiB on one GPU", text)
    told = parse_train([str(FOLDER / f"{name}.yaml"), "--use_cpu", "--no_bf16"])
    assert told.config.engine == ("fsdp2" if "torchrun" in text else None)
    assert f"[{name}.yaml](../recipes/{name}.yaml)" in (ROOT / "docs" / "recipes.md").read_text()
    # Memory is that of this architecture.
    kind, _ = next(found for begin, found in CONFIGS.items() if name.startswith(begin))
    assert kind == FAMILIES[family_of(name)].config


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tokenizer: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    family = family_of(name)
    has_eyes = getattr(eyes.FAMILIES.get(family), "config", None) == FAMILIES[family].config
    if has_eyes:
        eyes.make_model(family).save_pretrained("model")
        eyes.make_processor(family).save_pretrained("model")
    else:
        config = make_config(family, vocab_size=VOCABULARY)
        getattr(transformers, FAMILIES[family].model)(config).save_pretrained("model")
        make_tokenizer().save_pretrained("model")
    told = read_settings(FOLDER / f"{name}.yaml")
    for setting, package in (("use_peft", "peft"), ("load_in_4bit", "bitsandbytes")):
        if told.get(setting):
            pytest.importorskip(package)
    rows: list[dict[str, Any]] = eyes.image_rows(8, tmp_path / "pictures") if has_eyes else make_rows(8)
    if told["loss_type"] == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
            for i, row in enumerate(rows)
        ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    told |= {
        **SMALL,
        "model": "model",
        "dataset": "rows.jsonl",
        "output_dir": "out",
        "reference_cache_dir": "kept",
    }
    told.pop("engine", None)
    if "context_chunk" in told:
        told["context_chunk"] = 16  # so that the rows have several
    Path("recipe.yaml").write_text(yaml.safe_dump(told))
    assert cli.main(["train", "recipe.yaml"]) == 0
    losses = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in entry for entry in losses) == 2
    assert Path("out/adapter_config.json" if told.get("use_peft") else "out/model.safetensors").is_file()
