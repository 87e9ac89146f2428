"""Which columns are read: under other names, not at all, and none that is taken for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastdpo.training.data.columns import select_columns, survey
from fastdpo.training.data.rows import RowSource
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.setup import prepare_pairs
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows
from tests.training.data.data_cases import ALL_KINDS, encode, ids_of, row_of

MakeArgs = Callable[..., PreferenceConfig]
LOSSES = {
    "pairs": "sigmoid",
    "unpaired": "bco",
    "pair taken apart": "bco",
    "listwise": "sdpo",
    "samples": "nash_md",
    "ranking": "in_context_ranking",
    "steps": "direct_advantage",
    "prompt-completion": "aligndistil",
}


def rows_of(kind: str, count: int = 3) -> list[dict[str, Any]]:
    return [row_of(kind, f"river {i}:", f" stone {i}", " walk") for i in range(count)]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_columns_of_other_names(make_args: MakeArgs, tokenizer: Any, kind: str):
    """Every column of every kind may be called otherwise, in place of one of its name."""
    rows = rows_of(kind)
    names = {name: f"my_{name}" for name in rows[0]}
    renamed = [{f"my_{name}": value for name, value in row.items()} | {"prompt": "another"} for row in rows]
    args = make_args(loss_type=LOSSES[kind], **{f"{name}_column": names[name] for name in names})
    dataset = prepare_pairs(renamed, tokenizer, args)
    assert (
        dataset.fingerprint()
        == prepare_pairs(rows, tokenizer, make_args(loss_type=LOSSES[kind])).fingerprint()
    )
    assert dataset.report.unused == ()


def test_where_nothing_is_selected_rows_stay_as_they_are():
    source, empty = read_rows(rows_of("pairs")), RowSource([], [], "data")
    assert select_columns(source, {}, ()) is source
    assert select_columns(empty, {"prompt": "question"}, ("source",)) is empty


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("name", ["question", "instruction", "Prompt", "query"])
def test_a_prompt_of_another_name_is_not_passed_over(
    make_args: MakeArgs, tokenizer: Any, kind: str, name: str
):
    rows = [{name: row["prompt"], **{k: v for k, v in row.items() if k != "prompt"}} for row in rows_of(kind)]
    with pytest.raises(ValueError, match=rf"no column 'prompt', but '{name}'; got .*--prompt_column {name}"):
        prepare_pairs(rows, tokenizer, make_args(loss_type=LOSSES[kind]))
    dataset = prepare_pairs(rows, tokenizer, make_args(loss_type=LOSSES[kind], prompt_column=name))
    assert ids_of(dataset)[0] == ids_of(encode(kind, rows_of(kind), tokenizer))[0]


@pytest.mark.parametrize("kind", ["pairs", "pair taken apart"])
def test_a_common_start_is_the_prompt_where_it_is_asked_for(make_args: MakeArgs, tokenizer: Any, kind: str):
    rows = [
        {
            "question": "x",
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
        }
        for row in rows_of("pairs")
    ]
    args = make_args(loss_type=LOSSES[kind], ignore_columns=["question"])
    dataset = prepare_pairs(rows, tokenizer, args)
    assert (
        dataset.fingerprint()
        == prepare_pairs(
            rows_of("pairs"),
            tokenizer,
            args.__class__(output_dir=args.output_dir, loss_type=args.loss_type, use_cpu=True),
        ).fingerprint()
    )


def test_unused_columns_are_named(make_args: MakeArgs, tokenizer: Any):
    rows = [{**row, "source": "web", "gap": 1.0, "ref_chosen_logps": -1.0} for row in make_rows(3)]
    report = prepare_pairs(rows, tokenizer, make_args(margin_column="gap")).report
    assert report.unused == ("source", "ref_chosen_logps")
    assert str(report).endswith("columns not used: source, ref_chosen_logps")
    assert prepare_pairs(rows, tokenizer, make_args()).report.unused == ("source", "gap", "ref_chosen_logps")


def test_columns_that_only_later_rows_have_are_seen():
    found = survey(read_rows([{"a": 1, "b": None}, {"a": 1, "b": None, "c": 2}]))
    assert found.names == ("a", "b", "c") and found.filled == {"a", "c"}


@pytest.mark.parametrize(
    ("names", "ignored", "message"),
    [
        ({"prompt": "nothing"}, (), "prompt_column: got 'nothing', wanted one of the columns prompt, chosen"),
        ({}, ("nothing",), "ignore_columns: got 'nothing', wanted one of the columns"),
    ],
)
def test_columns_that_are_not_there(names: dict[str, str], ignored: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        select_columns(read_rows(make_rows(2)), names, ignored)


def test_settings_of_columns_that_the_losses_do_not_read(make_args: MakeArgs):
    with pytest.raises(ValueError, match="completions_column: got a value with sigmoid, which reads prompt"):
        make_args(completions_column="x")
    assert make_args(ignore_columns="prompt").ignore_columns == ["prompt"]
    with pytest.raises(ValueError, match="allow_bad_rows: got 'empty', wanted some of no_assistant"):
        make_args(allow_bad_rows=["empty"])
    for share in (1.5, -1, True, "all"):
        with pytest.raises(ValueError, match="max_bad_rows: got .*, wanted a number"):
            make_args(max_bad_rows=share)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_more_than_a_tenth_left_out_is_an_error(make_args: MakeArgs, tokenizer: Any, kind: str):
    bad = row_of(kind, "", " stone", " walk")
    args = make_args(loss_type=LOSSES[kind])
    assert prepare_pairs([*rows_of(kind, 9), bad], tokenizer, args).report.share_skipped == 0.1
    with pytest.raises(
        ValueError, match=r"2 with an empty prompt \(rows 9, 10\): 20% of the rows left out, wanted 10%"
    ):
        prepare_pairs([*rows_of(kind, 8), bad, bad], tokenizer, args)
    allowed = make_args(loss_type=LOSSES[kind], max_bad_rows=0.2)
    assert prepare_pairs([*rows_of(kind, 8), bad, bad], tokenizer, allowed).report.kept == 8
