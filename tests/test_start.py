"""What is loaded before it is needed, counted by modules: nothing. And what `--help` shows."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastdpo.cli import main
from fastdpo.rounds.judge_settings import JudgeArguments
from fastdpo.rounds.settings import SampleArguments
from fastdpo.training.settings.command_line import known_settings, parse_train
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.help_page import COMMON
from fastdpo.training.settings.run import ModelArguments, ScoreArguments
from fastdpo.training.settings.typos import SETTINGS, check_words, transformers_settings
from fastdpo.training.settings.words import ArgumentError
from tests import ROOT

LOADED = """
import json, sys
def packages():
    return {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
before = packages() | {"__mp_main__"}
code = None
try:
    exec(sys.argv[1])
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted(packages() - before)]), file=sys.__stdout__)
"""
AT_ONCE = "import fastdpo.cli, sys; sys.exit(fastdpo.cli.main({words!r}.split()))"
OF_TORCH = "linear_logprob fused_dpo_loss fused_preference_loss explain_plan LMHead LOSSES doctor Plan"


def loaded(program: str) -> tuple[int | None, list[str]]:
    """The exit code of a program in a fresh process, and which packages it loads."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    code, packages = json.loads(done.stdout.splitlines()[-1])
    return code, packages


@pytest.mark.promise(70)
@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import fastdpo", None),
        (AT_ONCE.format(words="--help"), 0),
        (AT_ONCE.format(words="--version"), 0),
        (AT_ONCE.format(words="tran"), 2),
        (AT_ONCE.format(words="train --model m --betta 1"), 2),
        (AT_ONCE.format(words="sample --modle m"), 2),
        (AT_ONCE.format(words="doctor --model m --dataset d --betta 1"), 2),
        (AT_ONCE.format(words="merge out --output_dri merged"), 2),
        (AT_ONCE.format(words="convert-config a.yaml --form trl"), 2),
        (AT_ONCE.format(words="plan --model m --gpus 8 --engine fsdp3"), 2),
    ],
)
def test_nothing_is_loaded_for_what_words_alone_tell(program: str, code: int | None):
    assert loaded(program) == (code, ["fastdpo"])


@pytest.mark.promise(70)
def test_a_file_is_read_without_torch(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("betta: 1\n")
    program = AT_ONCE.format(words=f"train {tmp_path / 'run.yaml'}")
    code, packages = loaded(program)
    assert code == 2 and {"fastdpo", "yaml"} <= {*packages} and not {"torch", "transformers"} & {*packages}


@pytest.mark.promise(70)
def test_names_of_torch_load_torch_and_no_more():
    code, of_torch = loaded("import torch")
    code, ours = loaded(f"import torch, fastdpo; [getattr(fastdpo, name) for name in {OF_TORCH!r}.split()]")
    assert set(ours) - set(of_torch) == {"fastdpo"}


@pytest.mark.promise(70)
def test_doctor_loads_no_library_that_it_names():
    """Of transformers, TRL, PEFT and datasets the version tells enough."""
    _, of_torch = loaded("import torch")
    code, ours = loaded(AT_ONCE.format(words="doctor"))
    assert code == 0 and set(ours) - set(of_torch) <= {"fastdpo", "packaging", "triton"}


def test_names_are_those_of_the_settings():
    """What `typos.py` says without the dataclasses."""
    of_base = {item.name for item in dataclasses.fields(PreferenceConfig.__mro__[3])}
    assert of_base == set(transformers_settings()) and "learning_rate" in of_base
    assert set(SETTINGS["train"]) | of_base == set(known_settings())
    fields = {
        "score": (ScoreArguments,),
        "sample": (ModelArguments, SampleArguments),
        "judge": (JudgeArguments,),
    }
    for command, kinds in fields.items():
        names = {item.name for kind in kinds for item in dataclasses.fields(kind) if item.init}
        assert set(SETTINGS[command]) == names | (set(SETTINGS["train"]) if command == "score" else set())


@pytest.mark.parametrize(
    "words",
    [
        "--betta 1",
        "--epochs 3 --bs=2",
        "--no-fp17",
        "--loss-typ sigmoid --lora-rank 4",
        "--model m --dataset d --max_prompt_length 5",
    ],
)
def test_it_is_said_as_the_parser_of_all_settings_says_it(words: str):
    with pytest.raises(ArgumentError) as early:
        check_words("train", words.split())
    with pytest.raises(ArgumentError) as late:
        parse_train(words.split())
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize("text", ["betta: 1", "betta: 1\nepochs: 2", "model: m\nmax_prompt_length: 5"])
def test_names_of_a_file_too(tmp_path: Path, text: str):
    (tmp_path / "run.yaml").write_text(text)
    words = [str(tmp_path / "run.yaml")]
    with pytest.raises(ArgumentError) as early:
        check_words("train", words)
    with pytest.raises(ArgumentError) as late:
        parse_train(words)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    "words",
    [
        "--model m --no-bf16 --max-length 5 --learning_rate=1e-6 --dataset_name d",
        "--import own.py --option_of_its_own 2",
        "--load_best_model_at_end false --debug underflow_overflow",
    ],
)
def test_what_may_be_right_is_left_alone(words: str):
    check_words("train", words.split())


def shown(capsys: pytest.CaptureFixture[str], flag: str) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main(["train", flag])
    assert end.value.code == 0
    return [line for line in capsys.readouterr().out.splitlines()]


def test_help_shows_forty_settings_and_the_losses(capsys: pytest.CaptureFixture[str]):
    lines = shown(capsys, "--help")
    flags = [match[1] for line in lines if (match := re.match(r"  --(\w+)(?: |$)", line))]
    common = [name for names in COMMON.values() for name in names]
    assert len(common) == 40 and sorted(flags) == sorted([*common, "config", "import"])
    assert [line[:-1] for line in lines if line[:-1] in COMMON] == list(COMMON)
    text = " ".join(" ".join(lines).split())
    assert (
        "paired (prompt, chosen, rejected): alpha_dpo, aot," in text
        and "unpaired (prompt, completion" in text
    )
    assert max(map(len, lines)) <= 110


def test_help_all_shows_all_in_groups(capsys: pytest.CaptureFixture[str]):
    lines = shown(capsys, "--help-all")
    flags = [match[1] for line in lines if (match := re.match(r"  --(\w+)(?: |$)", line))]
    assert sorted(flags) == sorted([*known_settings(), "config", "import"])
    groups = [line for line in lines if re.match(r"\S.*:$", line)]
    assert len(groups) >= 8 and "Of transformers' TrainingArguments:" in groups
