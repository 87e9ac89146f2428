"""Whether what a row says is in what the chat template made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fastdpo.training.data.messages import ASSISTANT, MARK, Message, Messages, reasoning_of
from fastdpo.training.settings.row_checks import Finding

_THOUGHT, _THOUGHT_ENDS = "<think>", "</think>"


def contains(text: str, what: str) -> bool:
    """Whether a text has something in it, whatever white space is around it, or escaped as in JSON."""
    what = what.strip()
    if what in text:
        return True
    plain, ascii_only = (json.dumps(what, ensure_ascii=flag)[1:-1] for flag in (False, True))
    # Arguments that are JSON text already are escaped once more.
    return any(form in text for form in (plain, ascii_only, json.dumps(plain)[1:-1])) or (
        "".join(what.split()) in "".join(text.split())
    )


def sayings(message: Message) -> Iterator[tuple[str, str]]:
    """What a message says, each with the check that it is of."""
    content = message["content"]
    if message["role"] == ASSISTANT and _THOUGHT_ENDS in content:
        thought, _, content = content.rpartition(_THOUGHT_ENDS)
        yield "reasoning_lost", thought.replace(_THOUGHT, "")
    yield "reasoning_lost", reasoning_of(message)
    yield from (("answer_lost", text) for text in content.split(MARK))
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        called = function if isinstance(function, dict) else {"name": function}
        yield "tool_call_lost", str(called.get("name", ""))
        for leaf in _leaves(called.get("arguments")):
            yield "tool_call_lost", leaf


def words_of(message: Message) -> str:
    """What a message says, without thoughts and calls."""
    return "".join(what for check, what in sayings(message) if check == "answer_lost")


def last_words(messages: Messages) -> str:
    """What a conversation says or calls last."""
    said = [what.strip() for message in messages for _, what in sayings(message)]
    return next((what for what in reversed(said) if what), "")


def _leaves(value: Any) -> Iterator[str]:
    """Names and values of a called function's arguments, as text."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        if isinstance(parsed, dict | list):
            value = parsed
    if isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def lost_in_the_answer(messages: Messages, text: str, end_of_text: str | None) -> Iterator[Finding]:
    """What an answer says that is not in its text, and whether the text has an end.

    Args:
        text: what is rendered of the answer.
        end_of_text: the tokenizer's EOS token.
    """
    for message in messages:
        for check, what in sayings(message):
            if what.strip() and not contains(text, what):
                yield Finding(check, f"{what.strip()!r:.60}")
    last = last_words(messages)
    tail = text.rpartition(last)[2] if last in text else "?"
    is_ended = bool(end_of_text) and text.rstrip().endswith(str(end_of_text))
    if last and not tail.strip() and not is_ended:
        yield Finding("open_turn")


def lost_in_the_prompt(messages: Messages, text: str) -> Iterator[Finding]:
    """What a prompt says that is not in its text. The thoughts of earlier turns are left out by design."""
    for message in messages:
        for check, what in sayings(message):
            if check != "reasoning_lost" and what.strip() and not contains(text, what):
                yield Finding("prompt_lost", f"{what.strip()!r:.60}")


def lost_tools(tools: Sequence[dict[str, Any]] | None, text: str) -> Iterator[Finding]:
    """Tools that a text does not name."""
    for tool in tools or ():
        function = tool.get("function", tool)
        name = str(function.get("name", "") if isinstance(function, dict) else function)
        if name and not contains(text, name):
            yield Finding("tools_lost", name)
