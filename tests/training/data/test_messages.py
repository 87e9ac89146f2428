"""Messages: content that is not text, nulls of Arrow, tools, broken texts; in every kind of data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from tests.training.conftest import write_jsonl
from tests.training.data.data_cases import (
    ALL_KINDS,
    KINDS_OF_MESSAGES,
    assistant,
    encode,
    ids_of,
    row_of,
    texts_of,
    user,
)
from tests.training.data.templates import PARTS, PLAIN, THINKING

MakeTokenizer = Callable[..., Any]
PROMPT, OTHER = [user("seed")], [assistant("walk")]


def good(kind: str) -> dict[str, Any]:
    return row_of(kind, PROMPT, [assistant("Paris.")], OTHER)


@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Paris."}],
        [{"type": "text", "text": "Par", "image_url": None}, {"type": "text", "text": "is."}],
        ["Par", {"text": "is."}],
    ],
)
def test_text_parts_are_text(tokenizer: Any, kind: str, content: Any):
    rows = [good(kind), row_of(kind, [user([{"type": "text", "text": "seed"}])], [assistant(content)], OTHER)]
    dataset = encode(kind, rows, tokenizer)
    assert ids_of(dataset, len(dataset) // 2) == ids_of(dataset, 0)
    assert dataset.report.found["text_parts"] == [2] and not dataset.report.skipped


@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
@pytest.mark.parametrize(
    "content",
    [
        7,
        True,
        1.5,
        {"text": "Paris."},
        [{"type": "image"}],
        [{"type": "text"}, {"type": "image_url"}],
        [7],
        [["a"]],
    ],
)
def test_content_that_is_not_text_is_left_out(tokenizer: Any, kind: str, content: Any):
    in_answer = row_of(kind, PROMPT, [assistant(content)], [assistant(content)])
    in_prompt = row_of(kind, [user(content)], [assistant("Paris.")], OTHER)
    report = encode(kind, [good(kind), in_answer, in_prompt], tokenizer).report
    assert report.skipped == {"content that is not text": [2, 3]} and report.kept == 1
    with pytest.raises(ValueError, match=r"2 with content that is not text \(rows 2, 3; the first: "):
        encode(kind, [good(kind), in_answer, in_prompt], tokenizer, on_bad_row="error")


@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}], " \n"])
def test_empty_content_is_empty(tokenizer: Any, kind: str, content: Any):
    row = row_of(kind, PROMPT, [assistant(content)], [assistant(content)])
    assert encode(kind, [good(kind), row], tokenizer).report.skipped == {"an empty completion": [2]}


@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
def test_a_template_of_parts_gets_parts(make_tokenizer: MakeTokenizer, kind: str):
    rows = [good(kind), row_of(kind, PROMPT, [*OTHER, user("go on"), assistant("Paris.")], OTHER)]
    wanted = encode(kind, rows, make_tokenizer(chat_template=PLAIN))
    dataset = encode(kind, rows, make_tokenizer(chat_template=PARTS))
    assert dataset.fingerprint() == wanted.fingerprint() and not dataset.report.skipped


def test_reasoning_is_text_too(make_tokenizer: MakeTokenizer):
    tokenizer = make_tokenizer(chat_template=THINKING)
    parts = [{"type": "text", "text": "stone"}]
    rows = [
        row_of("pairs", PROMPT, [assistant("lamp", reasoning_content=x)], OTHER) for x in ("stone", parts, 7)
    ]
    dataset = encode("pairs", rows, tokenizer)
    assert ids_of(dataset, 0) == ids_of(dataset, 1) and dataset.report.skipped == {
        "content that is not text": [3]
    }


# Arrow has one schema for all rows

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OTHER_CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": {"name": "utc"}}}}
OTHER_TOOL = {"type": "function", "function": {"name": "clock", "description": "The time."}}
CALLS = [
    row_of("pairs", PROMPT, [assistant("", tool_calls=[CALL])], OTHER, tools=[TOOL]),
    row_of("pairs", PROMPT, [assistant("So.", tool_calls=[OTHER_CALL])], OTHER, tools=[OTHER_TOOL]),
    row_of("pairs", PROMPT, [assistant("stone")], OTHER),
]


def jsonl(folder: Path) -> Any:
    return str(write_jsonl(folder / "rows.jsonl", CALLS))


def as_json(folder: Path) -> Any:
    (folder / "rows.json").write_text(json.dumps(CALLS))
    return str(folder / "rows.json")


def parquet(folder: Path) -> Any:
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files.write_table(pyarrow.Table.from_pylist(CALLS), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def in_memory(folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(CALLS)


def on_disk(folder: Path) -> Any:
    in_memory(folder).save_to_disk(folder / "rows")
    return str(folder / "rows")


@pytest.mark.parametrize("write", [jsonl, as_json, parquet, in_memory, on_disk])
def test_nulls_of_arrow_are_not_there(
    make_tokenizer: MakeTokenizer, tmp_path: Path, write: Callable[[Path], Any]
):
    tokenizer = make_tokenizer(chat_template=THINKING)
    wanted = encode("pairs", CALLS, tokenizer)
    dataset = encode_rows(read_rows(write(tmp_path)), tokenizer, EncodingOptions())
    assert dataset.fingerprint() == wanted.fingerprint() and len(dataset) == 3
    text = texts_of(dataset, tokenizer)
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in text[1][0] and "null" not in str(text)


def test_a_call_needs_no_content(make_tokenizer: MakeTokenizer):
    tokenizer = make_tokenizer(chat_template=THINKING)
    without = {"role": "assistant", "tool_calls": [CALL]}
    rows = [
        row_of("pairs", PROMPT, [message], OTHER, tools=[TOOL])
        for message in (without, {**without, "content": None}, {**without, "content": ""})
    ]
    dataset = encode("pairs", rows, tokenizer)
    assert ids_of(dataset, 0) == ids_of(dataset, 1) == ids_of(dataset, 2) and not dataset.report.skipped


# Tools, their calls, and template arguments


@pytest.mark.parametrize("calls", [json.dumps([CALL]), [json.dumps(CALL)]])
def test_calls_as_text(make_tokenizer: MakeTokenizer, calls: Any):
    tokenizer = make_tokenizer(chat_template=THINKING)
    rows = [row_of("pairs", PROMPT, [assistant("So.", tool_calls=given)], OTHER) for given in ([CALL], calls)]
    dataset = encode("pairs", rows, tokenizer)
    assert ids_of(dataset, 0) == ids_of(dataset, 1)


@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
@pytest.mark.parametrize("calls", [7, "[{", "7", [7], {"function": CALL["function"]}])
def test_calls_that_are_none(make_tokenizer: MakeTokenizer, kind: str, calls: Any):
    rows = [good(kind), row_of(kind, PROMPT, [assistant("So.", tool_calls=calls)], OTHER)]
    report = encode(kind, rows, make_tokenizer(chat_template=THINKING)).report
    assert report.skipped == {"tool calls that are no list of objects": [2]}


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]", "null"])
def test_no_tools(make_tokenizer: MakeTokenizer, tools: Any):
    tokenizer = make_tokenizer(chat_template=THINKING)
    dataset = encode("pairs", [good("pairs"), {**good("pairs"), "tools": tools}], tokenizer)
    assert ids_of(dataset, 0) == ids_of(dataset, 1)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_as_objects_and_as_text(make_tokenizer: MakeTokenizer, tools: Any):
    tokenizer = make_tokenizer(chat_template=THINKING)
    rows = [{**good("pairs"), "tools": given} for given in ([TOOL], tools)]
    dataset = encode("pairs", rows, tokenizer)
    assert ids_of(dataset, 0) == ids_of(dataset, 1) and "weather" in texts_of(dataset, tokenizer)[0]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tools", ["[{", '{"name": 1}', "7", 7, [7], ["stone"], {"name": "weather"}])
def test_tools_that_are_none(make_tokenizer: MakeTokenizer, kind: str, tools: Any):
    tokenizer = make_tokenizer(chat_template=THINKING)
    rows = [row_of(kind, "seed", " lamp", " walk", tools=given) for given in (None, tools)]
    assert encode(kind, rows, tokenizer).report.skipped == {"tools that are no list of objects": [2]}


def test_template_arguments_as_text(make_tokenizer: MakeTokenizer):
    tokenizer = make_tokenizer(chat_template="{{ tone }}{% for m in messages %}{{ m.content }}#{% endfor %}")
    given = [{"tone": "!"}, '{"tone": "!"}', "", None, {"tone": None}, "{", "7", [1]]
    dataset = encode("pairs", [{**good("pairs"), "chat_template_kwargs": x} for x in given], tokenizer)
    assert [texts_of(dataset, tokenizer, i)[0] for i in range(5)] == [
        "!seed#",
        "!seed#",
        "seed#",
        "seed#",
        "seed#",
    ]
    assert dataset.report.skipped == {"chat_template_kwargs that are no object": [6, 7, 8]}


# Texts without bytes


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("place", ["prompt", "answer"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_half_a_surrogate_pair_is_one_bad_row(tokenizer: Any, kind: str, place: str, is_chat: bool):
    texts = {"prompt": "river:", "answer": " stone", place: " st\ud83done"}
    if is_chat and kind in KINDS_OF_MESSAGES:
        bad = row_of(kind, [user(texts["prompt"])], [assistant(texts["answer"])], OTHER)
    else:
        bad = row_of(kind, texts["prompt"], texts["answer"], " walk")
    rows = [row_of(kind, "river:", " lamp", " walk"), bad]
    report = encode(kind, rows, tokenizer).report
    assert report.skipped == {"text that is not Unicode": [2]} and "character" in str(report)
