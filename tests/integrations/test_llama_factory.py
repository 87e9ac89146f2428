"""`patch_llama_factory`: whole runs of LLaMA-Factory's DPO stage, with and without, and what is refused.

LLaMA-Factory wants older libraries than the other tests: ``make test-llama-factory`` runs this file in an
environment of its own. Elsewhere all that needs the package is skipped.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastdpo
from fastdpo import Execution, patch_llama_factory, unpatch_llama_factory
from fastdpo.integrations import llama_factory as hook

is_installed = find_spec("llamafactory") is not None
needs_package = pytest.mark.skipif(not is_installed, reason="needs LLaMA-Factory: make test-llama-factory")
if is_installed and find_spec("torchaudio") is None:
    # LLaMA-Factory imports it for sound, which is not tested; no build of it goes with a CPU build of torch.
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

STEPS = 30
FORWARD = "llamafactory.train.dpo.trainer:CustomDPOTrainer.concatenated_forward"
OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {"pref_loss": "sigmoid"},
    "sigmoid-smoothed-ftx": {"pref_loss": "sigmoid", "dpo_label_smoothing": 0.1, "pref_ftx": 0.5},
    "ld": {"pref_loss": "sigmoid", "ld_alpha": 0.4},
    "bco": {"pref_loss": "sigmoid", "pref_bco_weight": 0.3},
    "hinge": {"pref_loss": "hinge"},
    "ipo": {"pref_loss": "ipo"},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo", "pref_beta": 2.0},
    "kto": {"stage": "kto", "dataset": "answers", "per_device_train_batch_size": 4},
    "lora": {"pref_loss": "sigmoid", "finetuning_type": "lora", "lora_target": "q_proj,v_proj"},
}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch_llama_factory()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "installed_version", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="wanted llamafactory"):
        patch_llama_factory()
    lines = fastdpo.doctor().sections["LLaMA-Factory"]
    assert lines == [("patch_llama_factory", "LLaMA-Factory is not installed")]


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="execution"):
        patch_llama_factory(execution="fast")  # type: ignore[arg-type]


@needs_package
def test_the_very_method_comes_back() -> None:
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    before = vars(CustomDPOTrainer)["concatenated_forward"]
    with patch_llama_factory() as done:
        assert done.is_new and FORWARD in done.replaced
        assert vars(CustomDPOTrainer)["concatenated_forward"] is not before
        assert not patch_llama_factory().is_new
        with pytest.raises(ValueError, match="unpatch_llama_factory"):
            patch_llama_factory(execution=Execution(workspace_mib=16))
        assert fastdpo.doctor().sections["LLaMA-Factory"][1][0] == "replaced"
    assert vars(CustomDPOTrainer)["concatenated_forward"] is before
    assert "would" in fastdpo.doctor().sections["LLaMA-Factory"][0][1]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny Llama, a tokenizer of the data's words, and real pairs in LLaMA-Factory's format."""
    from tests.conftest import SHARED_DATA
    from tests.integrations.tiny import make_model
    from tests.integrations.trl_runs import word_tokenizer

    source = SHARED_DATA / "preference_en.jsonl"
    if not source.exists():
        pytest.skip(f"needs the shared data, none at {SHARED_DATA}")
    folder = tmp_path_factory.mktemp("llama_factory")
    lines = source.read_text().splitlines()[:32]
    rows = [
        {
            "instruction": row["prompt"][0]["content"],
            "input": "",
            "chosen": row["chosen"][-1]["content"],
            "rejected": row["rejected"][-1]["content"],
        }
        for row in map(json.loads, lines)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info: dict[str, Any] = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    answers = [
        {"instruction": row["instruction"], "input": "", "output": row[name], "kto_tag": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    (folder / "answers.json").write_text(json.dumps(answers))
    columns = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "kto_tag"}
    info["answers"] = {"file_name": "answers.json", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    make_model("llama").save_pretrained(folder / "model")
    word_tokenizer([text for row in rows for text in row.values()]).save_pretrained(folder / "model")
    return folder


def run(folder: Path, name: str, output: Path) -> list[dict[str, float]]:
    """The log of a run, step by step."""
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    logs: list[dict[str, float]] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            record(logs)

    def record(values: dict[str, float]) -> None:
        if "loss" in values:
            logs.append(dict(values))

    run_exp(
        {
            "stage": "dpo",
            "do_train": True,
            "model_name_or_path": str(folder / "model"),
            "dataset": "pairs",
            "dataset_dir": str(folder),
            "template": "empty",
            "cutoff_len": 40,  # a reward is 0.1 of a sum over an answer: of 600 nats fp32 knows 3e-5
            "finetuning_type": "full",
            "pref_beta": 0.1,
            "output_dir": str(output),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-4,  # Adam at 1e-3 makes of one rounding, in thirty steps, 3e-5
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "flash_attn": "sdpa",
            "overwrite_cache": True,
            "preprocessing_num_workers": None,
            "seed": 0,
            **OPTIONS[name],
        },
        [Recorder()],
    )
    return logs


@needs_package
@pytest.mark.parametrize("name", OPTIONS)
def test_curves_of_thirty_steps(name: str, folder: Path, tmp_path: Path) -> None:
    plain = run(folder, name, tmp_path / "plain")
    with patch_llama_factory(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="logits")  # are made of lazy ones
        fused = run(folder, name, tmp_path / "fused")
    assert len(plain) == len(fused) == STEPS
    compared = 0
    for step, (ours, theirs) in enumerate(zip(fused, plain, strict=True)):
        assert ours.keys() == theirs.keys()
        # KTO logs sums of thousands of logits of both signs, of which next to nothing is left.
        sums = {"logits/chosen", "logits/rejected"} if name == "kto" else set()
        for key in ours.keys() - {"epoch", *sums}:
            rounding = 1.01e-4 if key == "loss" else 1e-5  # transformers logs a loss to four places
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=rounding), (step, key)
            compared += 1
    assert compared >= 8 * STEPS
    assert plain[0]["loss"] != pytest.approx(plain[-1]["loss"], abs=1e-3)  # there was something to compare
