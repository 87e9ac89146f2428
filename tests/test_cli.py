"""The command line: what users type, and what they get."""

# ruff: noqa: F811  (fixtures that are imported are named again where they are asked for)

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdpo
from fastdpo.cli import main
from fastdpo.losses import LOSSES, TokenDivergences
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.kinds import KINDS
from fastdpo.training.settings.steps import COLUMN_FIELDS
from tests import ROOT
from tests.cli_cases import (  # noqa: F401  (fixtures)
    REAL_PAIRS,
    make_tokenizer,
    model_dir,
    pairs,
    train,
    trained_bpe,
)
from tests.training.conftest import (  # noqa: F401  (fixtures)
    curves,
    make_rows,
    no_curves,
    read_metrics,
    write_jsonl,
)
from tests.training.loop.kinds_data import rows_of


def test_train(train: Callable[..., int], tmp_path: Path, curves: None):
    assert train() == 0
    out = tmp_path / "out"
    assert [entry["step"] for entry in read_metrics(out)] == [1, 2]
    assert (out / "curves.png").exists()
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)


def test_train_evaluates_what_is_held_out(train: Callable[..., int], tmp_path: Path):
    assert train("--held_out", "4", "--eval_strategy", "steps", "--eval_steps", "2") == 0
    evaluations = [entry for entry in read_metrics(tmp_path / "out") if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2]  # what was asked for is the last one
    assert train("--held_out", "4", output="last") == 0
    assert [entry["eval_loss"] for entry in read_metrics(tmp_path / "last")[-1:]] == [
        evaluations[0]["eval_loss"]
    ]


def test_resume(train: Callable[..., int], tmp_path: Path):
    assert train("--save_strategy", "steps", "--save_steps", "1") == 0
    assert train() == 2  # in use
    assert train("--resume_from_checkpoint", "true", "--max_steps", "3") == 0
    assert [entry["step"] for entry in read_metrics(tmp_path / "out")] == [1, 2, 3]
    assert train("--overwrite_output_dir") == 0
    assert [entry["step"] for entry in read_metrics(tmp_path / "out")] == [1, 2]


REAL_WORDS = "--max_length 160 --truncation_mode keep_end --max_steps 3 --held_out 4"


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason=f"{REAL_PAIRS.name} is not beside this checkout")
@pytest.mark.parametrize("adapter", ["", "--use_peft --lora_r 4"])
def test_train_on_real_conversations(train: Callable[..., int], tmp_path: Path, adapter: str):
    assert train(*REAL_WORDS.split(), *adapter.split(), dataset=REAL_PAIRS) == 0
    logs = read_metrics(tmp_path / "out")
    assert logs[0]["rewards/chosen"] == logs[0]["rewards/rejected"] == 0.0
    assert logs[-1]["eval_loss"] > 0
    is_adapter = (tmp_path / "out" / "adapter_config.json").exists()
    assert is_adapter == bool(adapter)
    if not is_adapter:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_score_fills_the_cache_that_train_reads(
    train: Callable[..., int], model_dir: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scored = tmp_path / "scored.jsonl"
    words = f"--model {model_dir} --dataset {pairs} --use_cpu --reference_cache_dir {tmp_path / 'cache'}"
    assert main(["score", *words.split(), "--output", str(scored)]) == 0
    rows = [json.loads(line) for line in scored.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if not k.startswith("ref_")} for row in rows] == make_rows(12)

    def unexpected(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr("fastdpo.training.reference.precompute.score_dataset", unexpected)
    assert train("--reference", "precomputed") == 0
    assert train("--reference", "precomputed", "--use_peft", output="adapter") == 0
    assert train(dataset=scored, output="columns") == 0
    logs = [read_metrics(tmp_path / name) for name in ("out", "columns")]
    assert logs[0] == logs[1]
    assert logs[0][0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason=f"{REAL_PAIRS.name} is not beside this checkout")
def test_single_answers_are_scored_and_trained_on(
    train: Callable[..., int], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = rows_of("unpaired", 10)
    dataset, scored = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "scored.jsonl"
    words = f"--model {model_dir} --dataset {dataset} --use_cpu --reference_cache_dir {tmp_path / 'cache'}"
    assert main(["score", *words.split(), "--loss_type", "kto", "--output", str(scored)]) == 0
    lines = [json.loads(line) for line in scored.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if not k.startswith("ref_")} for row in lines] == rows
    for name in ("ref_logps", "ref_mismatched_logps"):
        assert all(len(row[name]) == 1 and row[name][0] < 0 for row in lines)

    def unexpected(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr("fastdpo.training.reference.precompute.score_dataset", unexpected)
    kto = ("--loss_type", "kto", "--desirable_weight", "1.5", "--reference", "precomputed")
    assert train(*kto, dataset=dataset) == 0
    # From the columns: numbers are written to the last bit, so it is the same run.
    assert train(*kto[:4], dataset=scored, output="columns") == 0
    assert read_metrics(tmp_path / "columns") == read_metrics(tmp_path / "out")
    log = read_metrics(tmp_path / "out")[0]
    assert log["kl"] == pytest.approx(0.0, abs=1e-4) and 0.5 <= log["loss"] <= 0.75


def test_tdpo_from_the_command_line(
    train: Callable[..., int],
    pairs: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    tdpo = ("--loss_type", "tdpo2", "--kl_weight", "0.7", "--batch_layout", "shared_prompt")
    assert train(*tdpo) == 0
    log = read_metrics(tmp_path / "out")[0]
    assert log["kl/chosen"] == 0.0 and log["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert train(*tdpo, "--reference", "precomputed", output="refused") == 2
    assert "tdpo2 needs the reference's whole distribution" in capsys.readouterr().err
    words = f"--model {model_dir} --dataset {pairs} --use_cpu --loss_type tdpo1"
    assert main(["score", *words.split()]) == 2
    assert "--loss_type: got tdpo1, which has no use for" in capsys.readouterr().err


def test_every_option_of_every_loss_of_the_loop_is_a_flag():
    kinds = {inputs for kind in KINDS.values() for inputs in kind.inputs}
    for spec in (spec for spec in LOSSES.values() if spec.inputs in kinds):
        words = ["--model", "m", "--dataset", "d", "--use_cpu", "--loss_type", spec.name]
        for option in spec.options:
            words += [f"--{option.name}", str(option.default)]
        for name in COLUMN_FIELDS.keys() & set(spec.needs):
            words += [f"--{COLUMN_FIELDS[name]}", "number"]
        distils = spec.inputs is TokenDivergences
        config = parse_train([*words, *(("--teacher_model", "t") if distils else ())]).config
        assert config.options == {option.name: option.default for option in spec.options}


def test_flags_and_yaml(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndataset: d\nuse_cpu: true\nloss_type: [sigmoid, sft]\nloss_weights: [1.0, 1e-1]\n"
        "learning_rate: 1e-6\nlabel_smoothing: 0.1\nuse_peft: true\nlora_target_modules: [q_proj, v_proj]\n"
        "gradient_checkpointing: true\nmargin_column: null\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    for words in ([str(path)], ["--config", str(path)]):
        run = parse_train([*words, "--learning_rate", "2e-6", "--held_out", "0.1"])
        assert run.model.model == "m"
        assert run.config.loss_type == ["sigmoid", "sft"]
        assert run.config.loss_weights == [1.0, 0.1]
        assert run.config.learning_rate == 2e-6
        assert run.config.options == {"label_smoothing": 0.1}
        assert run.config.gradient_checkpointing is True
        assert run.config.lr_scheduler_kwargs == {"num_cycles": 2}
        assert run.adapter.peft_config().target_modules == {"q_proj", "v_proj"}
        assert run.data.held_out == 0.1


def test_options_as_json_and_as_flags_add_up():
    words = ["--model", "m", "--dataset", "d", "--use_cpu", "--loss_type", "simpo", "--gamma", "1.5"]
    config = parse_train([*words, "--loss_options", '{"label_smoothing": 0.2}']).config
    assert config.options == {"gamma": 1.5, "label_smoothing": 0.2}


def test_the_dtype_of_the_weights():
    model = parse_train(["--model", "m", "--dataset", "d", "--use_cpu"]).model
    assert model.loading_options(adapted=False)["dtype"] == "float32"
    assert model.loading_options(adapted=True)["dtype"] == "auto"
    chosen = parse_train(["--model", "m", "--dataset", "d", "--use_cpu", "--dtype", "bfloat16"]).model
    assert chosen.loading_options(adapted=False)["dtype"] == "bfloat16"


def test_no_line_is_doubled_and_no_warning_of_a_library_s_future_shown(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    for place in ("one", "two"):  # a second run in one process has no second handler
        assert train("--use_peft", output=place) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "fastdpo" in line]
        assert len(lines) == len(set(lines)) >= 3
        assert not any("FutureWarning" in line for line in lines)
    log = logging.getLogger("fastdpo")
    assert [handler.name for handler in log.handlers].count("fastdpo") == 1


def test_a_revision_is_of_the_model_alone(
    train: Callable[..., int], model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {}

    def load(name: str, *, what: str = "model", **options: Any) -> Any:
        asked[what] = options.get("revision")
        if what != "model":
            raise ValueError("enough")
        return None

    monkeypatch.setattr("fastdpo.training.loop.models.load_model", load)
    assert train("--revision", "v2", "--ref_model", str(model_dir), "--tokenizer", str(model_dir)) == 2
    assert asked == {"model": "v2", "ref_model": None}


def test_a_chat_template_from_a_file(model_dir: Path, tmp_path: Path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    run = parse_train(
        ["--model", str(model_dir), "--dataset", "d", "--use_cpu", "--chat_template", str(template)]
    )
    from fastdpo.training.loop.models import told_tokenizer

    assert told_tokenizer(run.model).chat_template == "{{ messages }}"


def test_bench_runs_a_suite_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    options = ["--device", "cpu", "--preset", "tiny", "--repeats", "1", "--results", str(tmp_path)]
    assert main(["bench", "row", *options]) == 0
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert "tiny sizes" in (out := capsys.readouterr().out) and "say nothing about speed" in out
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "row"]) == 2
    assert "wanted the root of a checkout" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fastdpo {fastdpo.__version__}\n"


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--model",
        "--held_out",
        "--use_peft",
        "--loss_type",
        "--label_smoothing",
        "--learning_rate",
    ):
        assert flag in text
