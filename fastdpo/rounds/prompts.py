"""Prompts of rows: as the data have them, to be written again, and as the tokens that a model reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.training.data.chat import Conversation, wants_parts
from fastdpo.training.data.columns import check_prompt_column, select_columns, survey
from fastdpo.training.data.messages import (
    Messages,
    check_unicode,
    is_list,
    read_messages,
    read_template_arguments,
    read_tools,
)
from fastdpo.training.data.prompts import shared_start, without_repeated_prompt
from fastdpo.training.data.row import WRITTEN_COLUMNS
from fastdpo.training.data.row_numbers import row_list, row_place
from fastdpo.training.data.source import RowSource
from fastdpo.training.data.template_checks import lost_in_the_prompt
from fastdpo.training.data.tokens import RowTokenizer
from fastdpo.training.settings.row_checks import CHECKS, BadRow

# What `fastdpo sample` writes beside the prompt.
SAMPLED_COLUMNS = ("completions", "finished", "sources", "prompt_row")
# Of the data's own answers, which are not the model's.
_ANSWERS = (
    "chosen", "rejected", "completion", "completions", "label", "scores", "ranks", "advantages", "win_rate",
    *WRITTEN_COLUMNS,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row's prompt.

    Args:
        number: of the row, from 1.
        value: a string or messages.
        text: what the model goes on from.
        ids: its tokens.
        columns: the row's others, to be written along.
    """

    number: int
    value: str | Messages
    text: str
    ids: tuple[int, ...]
    columns: Mapping[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether the answer is a message."""
        return not isinstance(self.value, str)


class PromptReader:
    """Reads prompts in every format that training reads, by the same rules.

    Args:
        source: the data's name, for messages.
        tokenizer: of the model that answers.
    """

    def __init__(self, source: str, tokenizer: Any) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._tokens = RowTokenizer(tokenizer)
        self._as_parts = bool(getattr(tokenizer, "chat_template", None)) and wants_parts(tokenizer)

    def read(self, row: Mapping[str, Any], number: int) -> Prompt:
        """The prompt of a row.

        Raises:
            ValueError: texts of unlike kinds, or messages without a chat template.
            BadRow: there is no prompt, or none that the template takes.
        """
        where = row_place(self.source, number)
        value = self._value(row, where)
        if isinstance(value, str):
            text, ids = value, self._plain(value)
        else:
            text = self._opened(value, row, where)
            ids = self._tokens.tokenize([text], [True])[0]
        check_unicode([text])
        if not ids:
            raise BadRow("empty_prompt")
        kept = {name: item for name, item in row.items() if name not in (*_ANSWERS, "prompt")}
        taken = [name for name in SAMPLED_COLUMNS if name in kept]
        if taken:
            raise ValueError(
                f"{where}: got a column {taken[0]!r}, which is written here: leave it out with "
                f"--ignore_columns {taken[0]}"
            )
        return Prompt(number, value, text, tuple(ids), kept)

    def _plain(self, text: str) -> list[int]:
        ids = self._tokens.tokenize([text], [False])[0]
        return self._tokens.split(text, ids, [ids], is_chat=False)[0] if ids else ids

    def _opened(self, messages: Messages, row: Mapping[str, Any], where: str) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"{where}: the prompt holds messages, but the tokenizer has no chat template: give "
                "--chat_template FILE, an instruction-tuned model's tokenizer, or prompts as strings"
            )
        arguments = read_template_arguments(row)
        opened = Conversation(self.tokenizer, messages, (), read_tools(row), arguments, self._as_parts).opened
        for finding in lost_in_the_prompt(messages, opened):
            raise BadRow(*finding)
        return opened

    def _value(self, row: Mapping[str, Any], where: str) -> str | Messages:
        """The prompt, which may stand in the answers too, or alone."""
        prompt = row.get("prompt")
        answers = {
            name: row[name] for name in ("chosen", "rejected", "completion") if row.get(name) is not None
        }
        if is_list(row.get("completions")):
            answers |= {f"answer {place}": item for place, item in enumerate(row["completions"], start=1)}
        talks = {
            name: read_messages(item, name, where, [])
            for name, item in answers.items()
            if is_list(item) and all(isinstance(part, Mapping) for part in item)
        }
        if prompt is None:
            return self._shared(answers, talks)
        if is_list(prompt):
            prompt = read_messages(prompt, "prompt", where, [])
        elif not isinstance(prompt, str):
            raise BadRow("not_text", f"prompt has {str(prompt)!r:.60}")
        if talks:
            whole, _ = without_repeated_prompt(prompt, list(talks.values()))
            if whole is None:
                raise ValueError(
                    f"{where}: got a prompt that is a string and answers that are messages and do not begin "
                    "with it, wanted strings throughout or lists of messages throughout"
                )
            return whole
        found: str | Messages = prompt
        return found

    @staticmethod
    def _shared(answers: Mapping[str, Any], talks: Mapping[str, Messages]) -> str | Messages:
        pair: list[Any] = [talks.get(name, answers.get(name)) for name in ("chosen", "rejected")]
        if any(answer is None for answer in pair) or type(pair[0]) is not type(pair[1]):
            raise BadRow("no_text", "column 'prompt' is null or not there")
        found: str | Messages = pair[0][: shared_start(*pair)]
        if not found:
            raise BadRow("empty_prompt")
        return found


def read_prompts(
    source: RowSource, tokenizer: Any, *, prompt_column: str | None, ignored: Sequence[str], skips: bool
) -> tuple[list[Prompt], dict[str, list[int]]]:
    """The prompts of all rows, and the numbers of those left out, by what was wrong with them.

    Args:
        skips: bad rows are left out; else all of them are named in one error.

    Raises:
        ValueError: bad rows, or none left.
    """
    source = select_columns(source, {} if prompt_column is None else {"prompt": prompt_column}, ignored)
    found = survey(source)
    check_prompt_column(found, source.name, may_be_shared={"chosen", "rejected"} <= set(found.names))
    reader = PromptReader(source.name, tokenizer)
    prompts: list[Prompt] = []
    bad: dict[str, list[int]] = defaultdict(list)
    details: dict[str, str] = {}
    for number, row in source:
        try:
            prompts.append(reader.read(row, number))
        except BadRow as error:
            bad[error.finding.check].append(number)
            details.setdefault(error.finding.check, error.finding.detail)
    check_bad_rows(source.name, bad, details, skips=skips)
    if not prompts:
        raise ValueError(f"{source.name}: no prompt left")
    return prompts, dict(bad)


def check_bad_rows(
    name: str, bad: Mapping[str, list[int]], details: Mapping[str, str], *, skips: bool
) -> None:
    """Raise ValueError, naming all of them, for rows that are not to be skipped."""
    if not bad or skips:
        return
    texts = []
    for check, rows in bad.items():
        detail = f" ({details[check]})" if details.get(check) else ""
        texts.append(f"{CHECKS[check].message} in {row_list(rows)}{detail}. {CHECKS[check].remedy}")
    raise ValueError(f"{name}: got {'; '.join(texts)} Or leave such rows out: --on_bad_row skip")
