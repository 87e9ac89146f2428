"""What a row says has to be in what the chat template makes of it: in every kind of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.training.data.data_cases import ALL_KINDS, KINDS_OF_MESSAGES, assistant, encode, row_of, user
from tests.training.data.templates import FORGETFUL, MARKED, OPEN, PLAIN, THINKING

MakeTokenizer = Callable[..., Any]
PROMPT, OTHER = [user("seed")], [assistant("walk")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Zürich "x"', "days": 3}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def case(prompt: Any = PROMPT, answer: Any = None, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer or [assistant("lamp")], **more}


THOUGHT = case(answer=[assistant("<think>stone river</think>lamp")])
FIELD = case(answer=[assistant("lamp", reasoning_content="stone river")])
CALLED = case(answer=[assistant("", tool_calls=[CALL])])
LOST = [
    (FORGETFUL, THOUGHT, "an answer's reasoning that the chat template leaves out"),
    (PLAIN, FIELD, "an answer's reasoning that the chat template leaves out"),
    (
        PLAIN,
        case(answer=[assistant("lamp", thinking="stone")]),
        "an answer's reasoning that the chat template",
    ),
    (PLAIN, CALLED, "a tool call that the chat template leaves out"),
    (PLAIN, case(tools=[TOOL]), "tools that the chat template leaves out"),
    (FORGETFUL, case([{"role": "system", "content": "Be brief."}, *PROMPT]), "a prompt's text that the chat"),
    (
        PLAIN,
        case([user("seed"), assistant("", tool_calls=[CALL]), user("go")]),
        "a prompt's text that the chat",
    ),
    (OPEN, case(), "an answer that the chat template leaves without an end"),
]


@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
@pytest.mark.parametrize(("template", "given", "message"), LOST)
def test_what_is_lost_is_named(
    make_tokenizer: MakeTokenizer, kind: str, template: str, given: dict[str, Any], message: str
):
    """Under ``skip`` with count and rows, under ``error`` as an error, and kept where it is allowed."""
    tokenizer = make_tokenizer(chat_template=template)
    more = {name: value for name, value in given.items() if name == "tools"}
    # A row of strings needs no template; a prompt of its own keeps it apart.
    rows = [
        row_of(kind, "river:", " stone", " walk"),
        row_of(kind, given["prompt"], given["answer"], OTHER, **more),
    ]
    report = encode(kind, rows, tokenizer).report
    (found,) = report.skipped.items()
    assert found[0].startswith(message) and found[1] == [2] and "skipped 1 with" in str(report)
    with pytest.raises(ValueError, match=rf"{message}.* \(row 2"):
        encode(kind, rows, tokenizer, on_bad_row="error")
    names = ("reasoning_lost", "tool_call_lost", "tools_lost", "prompt_lost", "open_turn")
    kept = encode(kind, rows, tokenizer, allow_bad_rows=names).report
    assert kept.kept == 2 and not kept.skipped and [2] in kept.found.values()


@pytest.mark.parametrize("kind", ["ranking", "steps"])
@pytest.mark.parametrize(("template", "message"), [(OPEN, "without an end"), (FORGETFUL, "leaves out")])
def test_pieces_behind_messages(make_tokenizer: MakeTokenizer, kind: str, template: str, message: str):
    tokenizer = make_tokenizer(chat_template=template)
    prompt = [{"role": "system", "content": "Be brief."}, *PROMPT]
    rows = [row_of(kind, "river:", " stone", " walk"), row_of(kind, prompt, "stone", " lamp")]
    (found,) = encode(kind, rows, tokenizer).report.skipped
    assert message in found


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_tools_beside_strings_have_no_place(tokenizer: Any, kind: str):
    rows = [row_of(kind, "river:", " stone", " walk", tools=tools) for tools in (None, [TOOL])]
    assert encode(kind, rows, tokenizer).report.skipped == {"tools that the chat template leaves out": [2]}


@pytest.mark.parametrize(
    ("template", "given"),
    [
        (THINKING, THOUGHT),
        (THINKING, FIELD),
        (THINKING, {**CALLED, "tools": [TOOL]}),
        (
            THINKING,
            case(answer=[assistant("", tool_calls=[{"function": {"name": "f", "arguments": '{"a": "é"}'}}])]),
        ),
        (THINKING.replace("| tojson", "| tojson(ensure_ascii=true)"), CALLED),
        # What an assistant thought in earlier turns goes by design.
        (THINKING, case([user("seed"), assistant("<think>stone</think>lamp"), user("go")])),
        (PLAIN, case([user("  seed\n")], [assistant("\n lamp \n")])),
        (PLAIN, case(answer=[assistant("<")])),
        (MARKED, case()),
        (OPEN, case(answer=[assistant("lamp<eos>")])),  # the words bring their own end
        (FORGETFUL, case()),
    ],
)
def test_what_is_there_is_not_lost(make_tokenizer: MakeTokenizer, template: str, given: dict[str, Any]):
    tokenizer = make_tokenizer(chat_template=template)
    more = {name: value for name, value in given.items() if name == "tools"}
    other = [assistant("walk<eos>" if template == OPEN else "walk")]
    report = encode(
        "pairs", [row_of("pairs", given["prompt"], given["answer"], other, **more)], tokenizer
    ).report
    assert report.kept == 1 and not set(report.found) - {"merged"}


def test_a_template_that_refuses_is_one_bad_row(make_tokenizer: MakeTokenizer):
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN
    tokenizer = make_tokenizer(chat_template=template)
    rows = [case()["prompt"], [{"role": "tool", "content": "seed"}]]
    report = encode("pairs", [row_of("pairs", x, [assistant("lamp")], OTHER) for x in rows], tokenizer).report
    assert report.skipped == {"messages that the chat template refuses": [2]} and "no tools" in str(report)


def test_unknown_tokens_are_named():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "river": 2, "stone": 3, "walk": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    rows = [row_of("pairs", "river", " stone", last) for last in (" walk", " ocean")]
    assert encode("pairs", rows, tokenizer).report.found == {"unknown_tokens": [2]}
