"""One meaning of a setting in Python, in YAML and on the command line: a table over every field there is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from fastdpo.training.settings.command_line import given_settings, parse_train
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.losses import all_loss_options, with_loss_options
from fastdpo.training.settings.run import (
    AdapterArguments,
    ArgumentError,
    DataArguments,
    ModelArguments,
    ScoreArguments,
)
from fastdpo.training.settings.values import Hint, hints_of, read_value
from fastdpo.training.settings.yaml_file import read_settings

KINDS = (ModelArguments, DataArguments, AdapterArguments, ScoreArguments, PreferenceConfig)
# Of every field of every dataclass of settings: which, its name, what its type hint says.
FIELDS = [(kind, name, hint) for kind in KINDS for name, hint in hints_of(kind).items() if hint.is_known]
# What is written in Python, in YAML, and as words after the flag.
ROUNDS = {
    "nothing": lambda hint: (None, "null", ["none"]),
    "nothing, spelt None": lambda hint: ("None", "None", ["None"]) if hint.takes_none else None,
    "true": lambda hint: (True, "true", []) if hint.takes_bool else None,
    "yes": lambda hint: ("yes", "yes", ["yes"]) if hint.takes_bool else None,
    "no": lambda hint: (False, "no", ["no"]) if hint.takes_bool else None,
    "automatic": lambda hint: ("auto", "auto", ["auto"]) if hint.takes_bool and hint.takes_none else None,
    "a whole number": lambda hint: (7, "7", ["7"]) if {int, float} & {*hint.parts} else None,
    "a number with a point": lambda hint: (0.25, "0.25", ["0.25"]) if {int, float} & {*hint.parts} else None,
    "a number with a power": lambda hint: (1e-6, "1e-6", ["1e-6"]) if {int, float} & {*hint.parts} else None,
    "a number as text": lambda hint: ("8", '"8"', ["8"]) if {int, float} & {*hint.parts} else None,
    "text": lambda hint: ("a b", "a b", ["a b"]) if str in hint.parts and not hint.takes_dict else None,
    "a choice": lambda hint: (
        [(m.value, f'"{m.value}"', [m.value]) for m in hint.enum][-1] if hint.enum else None
    ),
    "a list": lambda hint: (["1", "2"], '["1", "2"]', ["1", "2"]) if hint.item in (str, float) else None,
    "one for many": lambda hint: ("1", '"1"', ["1"]) if hint.item in (str, float) else None,
    "an empty list": lambda hint: ([], "[]", []) if hint.item is not None else None,
    "a dict": lambda hint: (
        ({"a": 1e-3, "b": "no"}, "{a: 1e-3, b: no}", ['{"a": 1e-3, "b": "no"}']) if hint.takes_dict else None
    ),
}


def outcome(name: str, hint: Hint, value: Any) -> Any:
    """What a value means, or that it is refused."""
    try:
        return read_value(name, hint, value)
    except ValueError as error:
        assert str(error).startswith(f"{name}: got {value!r}, wanted "), error
        return "refused"


@pytest.mark.parametrize("round_name", ROUNDS)
def test_a_value_means_the_same_in_python_yaml_and_on_the_command_line(round_name: str, tmp_path: Path):
    values = {(kind, name): ROUNDS[round_name](hint) for kind, name, hint in FIELDS}
    for kind in KINDS:
        written = {name: value for (of, name), value in values.items() if of is kind and value is not None}
        path = tmp_path / f"{kind.__name__}.yaml"
        path.write_text("".join(f"{name}: {text}\n" for name, (_, text, _) in written.items()))
        in_yaml = given_settings([kind], [str(path)])
        flags = given_settings(
            [kind], [w for name, (_, _, words) in written.items() for w in (f"--{name}", *words)]
        )
        for name, (in_python, _, _) in written.items():
            hint = hints_of(kind)[name]
            meant = outcome(name, hint, in_python)
            assert outcome(name, hint, in_yaml[name]) == meant, f"{name} in YAML"
            # Of text that has to be there, none is a word like another.
            is_word = round_name == "nothing" and str in (*hint.parts, hint.item) and not hint.takes_none
            assert is_word or outcome(name, hint, flags[name]) == meant, f"{name} on the command line"
            assert round_name != "nothing" or (meant is None) == hint.takes_none, name


def test_every_dataclass_reads_its_values():
    for kind in KINDS:
        name, hint = next((n, h) for n, h in hints_of(kind).items() if h.takes_bool or h.takes_none)
        assert getattr(kind(**{name: "none" if hint.takes_none else "no"}), name) in (
            None,
            False,
            "trainer_output",
        )
    assert ModelArguments(trust_remote_code="yes").trust_remote_code is True
    assert ModelArguments().trust_remote_code is False
    assert DataArguments(held_out="1e-1").held_out == 0.1
    assert AdapterArguments(use_peft="yes", lora_r="4").lora_r == 4
    assert PreferenceConfig(use_cpu="on", max_length="none").max_length is None


def test_transformers_own_parser_of_arguments_takes_them_too():
    parser = HfArgumentParser(PreferenceConfig)
    words = "--use_cpu --loss_type simpo ipo --bf16 --dynamic_beta null --resume_from_checkpoint out/last"
    (args,) = parser.parse_args_into_dataclasses(words.split(), look_for_args_file=False)
    assert args.loss_type == ["simpo", "ipo"] and args.bf16 is True and args.dynamic_beta is None
    assert args.resume_from_checkpoint == "out/last" and args.debug == []


@pytest.mark.parametrize(("given", "meant"), [(True, "true"), (False, None), ("true", "true"), (None, None)])
def test_going_on(given: Any, meant: str | None, tmp_path: Path):
    assert PreferenceConfig(use_cpu=True, resume_from_checkpoint=given).resume_from_checkpoint == meant
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndataset: d\nuse_cpu: true\nresume_from_checkpoint: {json.dumps(given)}")
    assert parse_train([str(path)]).config.resume_from_checkpoint == meant
    words = [] if given is None or given is False else ["--resume_from_checkpoint"]
    found = parse_train(["--model", "m", "--dataset", "d", "--use_cpu", *words])
    assert found.config.resume_from_checkpoint == meant


def test_fields_that_only_python_can_give_are_few():
    unknown = [name for kind in KINDS for name, hint in hints_of(kind).items() if not hint.is_known]
    assert set(unknown) <= {"parallelism_config"}


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (int, None, "a whole number"),
        (int, 1.5, "a whole number"),
        (int, True, "a whole number"),
        (int | None, "x", "a whole number or none"),
        (float, float("nan"), "a number"),
        (float, "nan", "a number"),
        (bool, 2, "true or false"),
        (bool, "maybe", "true or false"),
        (str, 12, "text"),
        (str, None, "text"),
        (list[float] | None, ["x"], "a number"),
        (str, ["a", "b"], "text"),
        (dict | None, "[1]", "a dict"),
        (dict | None, "{a", "a dict"),
        (dict | None, "missing.json", "a dict"),
        (int, {"a": 1}, "a whole number"),
    ],
)
def test_what_a_hint_does_not_allow_is_refused(hint: Any, value: Any, wanted: str):
    with pytest.raises(ValueError, match=f"size: got .*, wanted {wanted}"):
        read_value("size", Hint(hint), value)


def test_whole_numbers_stay_whole_and_others_do_not_become_so():
    assert type(read_value("steps", Hint(float), 500)) is int
    assert read_value("steps", Hint(int), 500.0) == 500 and type(read_value("steps", Hint(int), 500.0)) is int
    assert read_value("steps", Hint(int), 10**17 + 1) == 10**17 + 1
    assert read_value("rate", Hint(float), "1e-6") == 1e-6


def test_a_dict_may_be_a_json_file(tmp_path: Path):
    path = tmp_path / "options.json"
    path.write_text('{"min_lr": 1e-7}')
    assert read_value("kwargs", Hint(dict | str | None), str(path)) == {"min_lr": 1e-7}
    path.write_text("[]")
    with pytest.raises(ValueError, match="which holds no JSON object"):
        read_value("kwargs", Hint(dict | None), str(path))


def test_a_copy_of_settings_is_the_same():
    # What transformers has made of them is read again.
    args = PreferenceConfig(
        use_cpu=True,
        loss_type="simpo",
        gamma=1.0,
        eval_strategy="no",
        accelerator_config={"even_batches": True},
    )
    again = dataclasses.replace(args)
    assert again.loss_options == {"gamma": 1.0} and again.accelerator_config == args.accelerator_config
    assert again.to_dict() == args.to_dict()


@pytest.mark.parametrize("name", sorted(all_loss_options()))
def test_options_of_the_losses_are_keywords_flags_and_names_in_yaml(name: str, tmp_path: Path):
    option = next(iter(all_loss_options()[name].values()))
    path = tmp_path / "run.yaml"
    path.write_text(f"{name}: {json.dumps(option.default)}\n")
    word = json.dumps(option.default) if option.type is not str else option.default
    wanted = {"loss_options": {name: option.default}}
    assert given_settings([PreferenceConfig], [str(path)]) == wanted
    assert given_settings([PreferenceConfig], [f"--{name}", word]) == wanted
    assert with_loss_options({name: option.default}) == wanted


def test_flags_win_over_the_file_option_by_option(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("loss_options: {gamma: 1.0, label_smoothing: 0.1}\nalpha: 0.3\nmax_length: null\n")
    words = [str(path), "--loss_options", '{"gamma": 2}', "--label_smoothing", "0.2", "--max_length", "9"]
    assert given_settings([PreferenceConfig], words) == {
        "loss_options": {"gamma": 2, "label_smoothing": 0.2, "alpha": 0.3},
        "max_length": "9",
    }


def test_yaml_has_the_numbers_and_words_of_yaml_1_2(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "a: 1e-6\nb: no\nc: 010\nd: 1.5e+3\ne: {f: 2E-7}\ng: 1:30\nh: -3\ni: .5\nj: 2025-01-01\nk:\n"
    )
    assert read_settings(path) == {
        "a": 1e-6, "b": "no", "c": "010", "d": 1500.0, "e": {"f": 2e-7}, "g": "1:30", "h": -3, "i": 0.5,
        "j": "2025-01-01", "k": None,
    }  # fmt: skip
    path.write_text("beta: 0.1\nloss_type: ipo\nbeta: 0.2\n")
    with pytest.raises(ArgumentError, match="beta is there twice"):
        read_settings(path)
    path.write_text("lr_scheduler_kwargs: &a {x: 1, y: 2}\noptim_args: {<<: *a, y: 3}\n")
    assert read_settings(path)["optim_args"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("given", ["{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_chat_template_is_itself_or_a_file(given: str, tmp_path: Path):
    from fastdpo.training.settings.run import template_text

    path = tmp_path / "chat.jinja"
    path.write_text(given)
    assert template_text(given) == template_text(str(path)) == given
    with pytest.raises(ArgumentError, match="chat_template: got 'llama3', wanted a file or a Jinja template"):
        template_text("llama3")
