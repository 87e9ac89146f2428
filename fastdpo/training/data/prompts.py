"""Where a row's prompt ends: it has a column of its own, is what two answers share, or stands in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.training.data.messages import Message, Messages, is_list


def shared_start(first: Any, second: Any) -> int:
    """How many characters, or messages, two answers that hold their prompt have in common."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    # A space before the first difference belongs to the answer's first word, and to its first token.
    if isinstance(first, str) and 0 < shared < min(len(first), len(second)) and first[shared - 1] == " ":
        shared -= 1
    return shared


def repeats_prompt(row: Mapping[str, Any]) -> bool:
    """Whether a row of texts has its prompt at the start of every answer, with more behind it."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return False
    answers = [row[name] for name in ("chosen", "rejected", "completion") if row.get(name) is not None]
    if is_list(row.get("completions")):
        answers += row["completions"]
    # An answer in pieces begins with its first.
    answers = [next(iter(answer), None) if is_list(answer) else answer for answer in answers]
    return all(isinstance(answer, str) for answer in answers) and echoes(prompt, answers)


def echoes(prompt: str, answers: Sequence[str]) -> bool:
    """Whether all answers begin with the prompt's text, and go on."""
    is_echo = all(answer.startswith(prompt) and len(answer) > len(prompt) for answer in answers)
    return is_echo and bool(answers) and bool(prompt.strip())


def without_repeated_prompt(
    prompt: str | Messages, answers: Sequence[Messages]
) -> tuple[Messages | None, list[Messages]]:
    """The prompt as messages, and answers without those of the prompt.

    Answers may begin with the prompt's messages, or with its end, from a turn of the user on (without its
    system messages, say); or all of them with system messages that the prompt lacks and then with all of it,
    which are the prompt then. A prompt that is text is its user's turn.

    Returns:
        The prompt, and the answers, cut; None in place of the prompt where it is text and in no answer.
    """
    is_text = isinstance(prompt, str)
    wanted: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    starts = [_start_with(wanted, answer) for answer in answers]
    start = starts[0] if starts else None
    if wanted and start is not None and all(_begin_alike(answers[0][:start], answer) for answer in answers):
        # As the answers have it, with a system prompt before the rest.
        return answers[0][:start], [answer[start:] for answer in answers]
    if is_text:
        return None, list(answers)
    return wanted, [answer[_num_repeated(wanted, answer) :] for answer in answers]


def _num_repeated(prompt: Messages, answer: Messages) -> int:
    """How many messages of an answer are the prompt, or its end from a turn of the user on."""
    for start, message in enumerate(prompt):
        if (start == 0 or message["role"] == "user") and _begin_alike(prompt[start:], answer):
            return len(prompt) - start
    return 0


def _start_with(prompt: Messages, answer: Messages) -> int | None:
    """How many messages of an answer are the prompt, system messages before it included."""
    for systems in range(len(answer)):
        if _begin_alike(prompt, answer[systems:]):
            return systems + len(prompt)
        if answer[systems]["role"] not in ("system", "developer"):
            break
    return None


def _begin_alike(prompt: Messages, answer: Messages) -> bool:
    return len(answer) >= len(prompt) and all(map(_are_alike, prompt, answer))


def _are_alike(one: Message, other: Message) -> bool:
    def said(message: Message) -> tuple[Any, ...]:
        return message["role"], message["content"].strip(), message.get("tool_calls") or None

    return said(one) == said(other)
