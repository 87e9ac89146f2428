"""The row formats TRL documents, turned into three texts: prompt, prompt + chosen, prompt + rejected.

A row is ``prompt``, ``chosen``, ``rejected``, each a string, or each a list of messages (``role``,
``content``). Without ``prompt`` the part that chosen and rejected share at their start is the
prompt. Messages go through the tokenizer's chat template, with ``tools`` and
``chat_template_kwargs`` of the row where it has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = list[Mapping[str, Any]]
# What a number per pair may be, by its name in the data set; any number where it has no entry.
RANGES = {
    "pair_weights": (0.0, math.inf),
    **dict.fromkeys(("soft_labels", "chosen_win_rate", "rejected_win_rate"), (0.0, 1.0)),
}


@dataclass(frozen=True)
class PairTexts:
    """One row as text; chat texts already hold every special token, plain ones do not."""

    row: int
    prompt: str
    chosen: str  # prompt included
    rejected: str  # prompt included
    is_chat: bool
    has_empty_answer: bool
    columns: Mapping[str, float]
    gold: str | None = None  # prompt included

    @property
    def answers(self) -> tuple[str, ...]:
        """Chosen, rejected and, if there is one, gold; each behind the prompt."""
        return (self.chosen, self.rejected, *([] if self.gold is None else [self.gold]))


def render_row(
    row: Mapping[str, Any],
    number: int,
    source: str,
    tokenizer: Any,
    columns: Mapping[str, str],
    gold_column: str | None = None,
) -> PairTexts:
    """Check one row and render it.

    Args:
        columns: per-pair numbers to read: name in the result -> name of the row's column.
        gold_column: of a third, gold answer.

    Raises:
        ValueError: the row has the wrong shape, or the tokenizer cannot render it; names the row.
    """
    where = f"{source}, row {number}"
    prompt, *answers = _split_row(row, where, gold_column)
    numbers = {name: read_number(row, name, column, where) for name, column in columns.items()}
    if isinstance(prompt, str):
        is_empty, is_chat = not all(answers), False
        opened, texts = prompt, [prompt + answer for answer in answers]
    else:
        is_empty, is_chat = not all(has_content(answer) for answer in answers), True
        opened, texts = render_chat(row, prompt, answers, where, tokenizer)
    return PairTexts(number, opened, texts[0], texts[1], is_chat, is_empty, numbers, *texts[2:])


def _split_row(row: Mapping[str, Any], where: str, gold_column: str | None) -> tuple[Any, ...]:
    """Prompt, chosen, rejected and, if it is asked for, gold answer."""
    names = ("chosen", "rejected", *([] if gold_column is None else [gold_column]))
    for name in names:
        if row.get(name) is None:
            raise ValueError(
                f"{where}: no column {name!r}; got {sorted(row)}, wanted {', '.join(names)} and (unless it "
                "is their common start) prompt"
            )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    named = {name: row[name] for name in names}
    if prompt is not None:
        named["prompt"] = prompt
    if not all(isinstance(value, str) for value in named.values()):
        check_messages(named, where)
    if prompt is not None:
        return prompt, *(row[name] for name in names)
    shared = _shared_prefix(chosen, rejected)
    prompt = chosen[:shared]
    for name in names[2:]:
        if row[name][:shared] != prompt:
            raise ValueError(
                f"{where}: {name!r} does not begin with what chosen and rejected have in common, wanted that "
                "or a column 'prompt'"
            )
    return prompt, *(row[name][shared:] for name in names)


def _shared_prefix(chosen: Any, rejected: Any) -> int:
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    # A space before the first difference belongs to the answer's first word, and to its first token.
    if isinstance(chosen, str) and 0 < shared < min(len(chosen), len(rejected)) and chosen[shared - 1] == " ":
        shared -= 1
    return shared


def check_messages(named: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless all of a row's texts, by name, are lists of messages."""
    kinds = {name: type(value).__name__ for name, value in named.items()}
    if any(isinstance(value, str) or not isinstance(value, Sequence) for value in named.values()):
        hint = ""
        if kinds.get("prompt") == "str":
            hint = "; if chosen and rejected hold the whole conversation, leave the prompt column out"
        raise ValueError(
            f"{where}: got {kinds}, wanted strings throughout or lists of messages throughout{hint}"
        )
    for name, messages in named.items():
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise ValueError(
                    f"{where}: got {str(message)[:80]!r} in {name}, wanted a message with role and content"
                )


def has_content(messages: Messages) -> bool:
    """Whether any message says or calls something."""
    return any(message["content"] or message.get("tool_calls") for message in messages)


def read_number(row: Mapping[str, Any], name: str, column: str, where: str) -> float:
    """The number of a row that is called ``name`` here. Raises ValueError for none, or out of range."""
    value = row.get(column)
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: column {column!r}: got {value!r}, wanted a number")
    if name == "beta" and value <= 0:
        raise ValueError(f"{where}: column {column!r}: got {value!r}, wanted a number above 0")
    if value < low or value > high:
        raise ValueError(
            f"{where}: column {column!r}: got {value!r}, wanted a number from {low:g} to {high:g}"
        )
    return float(value)


def render_chat(
    row: Mapping[str, Any], prompt: Messages, answers: Sequence[Messages], where: str, tokenizer: Any
) -> tuple[str, list[str]]:
    """The prompt, and the prompt with each answer, as the tokenizer's chat template has them.

    Raises:
        ValueError: there is no template, it refuses the messages, or it leaves unknown where answers begin.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where}: the row holds messages, but the tokenizer has no chat template: set "
            "tokenizer.chat_template (--chat_template FILE), use an instruction-tuned model's tokenizer, or "
            "give strings"
        )
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }

    def render(messages: Messages, *, add_generation_prompt: bool = False) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except Exception as error:
            # Templates raise whatever they like on roles they do not know; the row number is what helps.
            raise ValueError(f"{where}: the chat template refused the messages: {error}") from error
        return text

    texts = [render([*prompt, *answer]) for answer in answers]
    if not prompt:
        return "", texts
    opened = render(prompt, add_generation_prompt=True)
    if not all(text.startswith(opened) for text in texts):
        # Some templates open the answer differently when it is still to come (a "<think>" for the model
        # to continue): the answer then begins where the texts part. More must not differ.
        closed = render(prompt)
        if not all(text.startswith(closed) for text in texts):
            raise ValueError(
                f"{where}: the chat template renders the prompt differently once an answer follows, so where "
                "the answer begins is not known: use a template that only appends"
            )
    return opened, texts
