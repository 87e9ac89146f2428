"""`fastdpo doctor`: what it says of an installation, of a model, and of a run before it is started."""

# ruff: noqa: F811  (fixtures that are imported are named again where they are asked for)

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fastdpo.cli import main
from fastdpo.doctor.diagnosis import doctor
from tests.cli_cases import (  # noqa: F401  (fixtures)
    REAL_PAIRS,
    make_tokenizer,
    model_dir,
    pairs,
    train,
    trained_bpe,
)
from tests.training.conftest import no_curves, write_jsonl  # noqa: F401  (fixtures)
from tests.training.loop.kinds_data import rows_of


def test_doctor(model_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--model", str(model_dir)]) == 0
    report = capsys.readouterr().out
    for text in (
        "torch",
        "reference",
        "runs",
        "fastdpo._C",
        "vocabulary 360, hidden 32, not tied",
        "chat template",
    ):
        assert text in report


def test_doctor_refuses_what_the_hook_refuses(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    findings = dict(doctor(str(tmp_path)).sections[f"Model {tmp_path}"])
    assert "refused" in findings.get("head", "") or "cannot be read" in findings.get("model", "")
    missing = dict(doctor("./missing").sections["Model ./missing"])
    assert missing["model"].startswith("cannot be read")


@pytest.fixture
def diagnose(
    model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, dict[str, str]]]]:
    """``fastdpo doctor`` at a run, with further words: the exit code, and the report by section."""

    def run(*words: str, dataset: Path = pairs) -> tuple[int, dict[str, dict[str, str]]]:
        settings = f"--model {model_dir} --dataset {dataset} --use_cpu --output_dir {tmp_path / 'out'}"
        code = main(["doctor", *settings.split(), *words])
        report: dict[str, dict[str, str]] = {}
        for line in capsys.readouterr().out.splitlines():
            if line and not line.startswith(" "):
                title = line
            elif line:
                name, finding = line.strip().split("  ", 1)
                report.setdefault(title, {})[name] = finding.strip()
        return code, report

    return run


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason=f"{REAL_PAIRS.name} is not beside this checkout")
def test_doctor_at_a_run_on_real_pairs(diagnose: Callable[..., Any], model_dir: Path, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    words = "--max_length 160 --truncation_mode keep_end --per_device_train_batch_size 4 --held_out 4"
    code, report = diagnose(*words.split(), dataset=REAL_PAIRS)
    assert code == 0 and sorted(tmp_path.rglob("*")) == before  # nothing is written
    assert report["Run"]["refused"] == "nothing" and "240 pairs kept" in report["Run"]["dataset"]
    assert report["Run"]["evaluation"].startswith("4 of ")
    assert report["Model LlamaForCausalLM"]["patched"].startswith("yes")
    trainer = report["Trainer PreferenceTrainer"]
    assert (trainer["reference"], trainer["loss"], trainer["batch layout"]) == ("copy", "sigmoid", "padded")
    data = report["Data"]
    assert data["pairs"] == "236" and data["largest batch"].startswith("4 pairs, at most ")
    sizes = [int(n) for n in re.findall(r"\d+", data["longest pair"])[1:]]
    assert len(sizes) == 3 and sizes[0] + max(sizes[1:]) == 160  # cut to what a pair may have
    assert re.match(r"[\d.]+ MiB at once", data["head for it alone"])
    plan = report["Plan for the largest batch"]
    assert plan["mode"] == "pairs" and plan["tokens"] in data["largest batch"]
    assert "MiB" in plan["peak"] and plan["backend"] in ("cpu", "reference")
    memory = report["Memory but for activations and the head"]
    weights = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(model_dir).parameters())
    assert memory["weights"] == memory["gradients"] == memory["reference"] == f"{weights / 2**20:.1f} MiB"


def test_doctor_at_a_run_with_an_adapter_and_a_budget(diagnose: Callable[..., Any], model_dir: Path):
    words = "--use_peft --lora_r 4 --max_tokens_per_batch 512 --batch_layout shared_prompt --bf16"
    code, report = diagnose(*words.split())
    assert code == 0
    assert report["Plan for the largest batch"]["mode"] == "stash"
    assert report["Data"]["largest batch"].startswith("max_tokens_per_batch 512, at most ")
    trainer = report["Trainer PreferenceTrainer"]
    assert (trainer["reference"], trainer["autocast"], trainer["batch layout"]) == (
        "adapter",
        "bf16",
        "shared_prompt",
    )
    assert "reference" not in report["Memory but for activations and the head"]


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason=f"{REAL_PAIRS.name} is not beside this checkout")
def test_doctor_at_a_run_on_single_answers(diagnose: Callable[..., Any], tmp_path: Path):
    code, report = diagnose(
        "--loss_type", "kto", "--max_bad_rows", "1", dataset=REAL_PAIRS.with_name("unpaired_en.jsonl")
    )
    data = report["Data"]
    assert code == 0 and re.fullmatch(r"\d+, unpaired", data["rows"])
    assert re.fullmatch(r"row \d+: prompt \d+, answer \d+ tokens", data["longest row"])
    labelled = re.fullmatch(r"8 rows, at most (\d+) labelled tokens", data["largest batch"])
    assert labelled and report["Plan for the largest batch"]["tokens"] == f"{labelled[1]} labelled"


def test_doctor_at_lists_of_answers(diagnose: Callable[..., Any], tmp_path: Path):
    dataset = write_jsonl(tmp_path / "lists.jsonl", rows_of("listwise", 6))
    code, report = diagnose("--loss_type", "sdpo", dataset=dataset)
    assert code == 0 and report["Data"]["rows"] == "6, listwise"
    assert ", answers " in report["Data"]["longest row"]


def test_doctor_says_what_train_would_refuse(
    diagnose: Callable[..., Any], train: Callable[..., int], tmp_path: Path, pairs: Path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("")
    code, report = diagnose()
    assert code == 2 and "out is in use" in report["Run"]["refused"] and "Data" in report
    assert train() == 2
    assert diagnose("--overwrite_output_dir")[0] == 0

    for words, message in (
        ("--reference adapter", "the model has no adapter"),
        ("--use_peft --lora_target_modules q_proj lm_head --mode stash", "with an adapter on the head"),
        ("--max_tokens_per_batch 10", "max_tokens_per_batch: got 10, wanted at least"),
    ):
        code, report = diagnose("--overwrite_output_dir", *words.split())
        assert code == 2 and message in report["Run"]["refused"], words
        assert "Model LlamaForCausalLM" in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--dataset", "./missing.jsonl"), "no such file or directory: ./missing.jsonl"),
        (("--model", "./missing"), "model: got './missing', and there is no such folder"),
        (("--betta", "0.1"), "unknown argument --betta; did you mean --beta?"),
        (("--loss_type", "kto_pair"), "loss_type"),
        (("--loss_type", "sdpo"), "wanted prompt, completions, scores"),
    ],
)
def test_mistakes_at_the_doctor_are_those_of_train(
    model_dir: Path,
    pairs: Path,
    capsys: pytest.CaptureFixture[str],
    changes: Sequence[str],
    message: str,
):
    settings = f"--model {model_dir} --dataset {pairs} --use_cpu --output_dir {pairs.parent / 'out'}"
    assert main(["doctor", *settings.split(), *changes]) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("fastdpo")]
    assert len(lines) == 1 and lines[0].startswith("fastdpo: error: ") and message in lines[0]
    assert shown.out == ""


def test_doctor_wants_a_dataset_beside_the_settings_of_a_run(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--model", "m", "--beta", "0.1"]) == 2
    assert "--dataset is required" in capsys.readouterr().err
