"""A row's prompt and answers as texts, whatever kind of data it is of.

Texts are strings throughout, or lists of messages throughout. Messages go through the tokenizer's chat
template, with ``tools`` and ``chat_template_kwargs`` of the row where it has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastdpo.training.data.chat import Conversation, wants_parts
from fastdpo.training.data.images import IMAGES_REJECTED, ImageRef, column_refs, row_refs
from fastdpo.training.data.messages import (
    ASSISTANT,
    WORD,
    Messages,
    check_unicode,
    fill_images,
    images_of,
    is_list,
    read_messages,
    read_template_arguments,
    read_tools,
    says_something,
)
from fastdpo.training.data.prompts import echoes, shared_start, without_repeated_prompt
from fastdpo.training.data.row_numbers import row_place
from fastdpo.training.data.template_checks import lost_in_the_answer, lost_in_the_prompt, lost_tools
from fastdpo.training.settings.row_checks import BadRow, Finding


@dataclass(frozen=True)
class RowTexts:
    """One row as text; chat texts already hold every special token, plain ones do not.

    Args:
        answers: prompt included.
        cuts: of each answer, texts that it begins with, prompt included: where the assistant's turns begin
            and end by turns, or where its pieces end; none where all of it is scored, in one piece.
        numbers: what the losses use: a number, or one for each answer or piece.
        findings: of checks that the row may stay in spite of, or that mended it.
        images: of each answer's sequence, in the order of the placeholders in its text; of all or none.
        digests, image_tokens: of these, and how many tokens they take in each sequence; once they are read.
    """

    row: int
    prompt: str
    answers: tuple[str, ...]
    is_chat: bool
    cuts: tuple[tuple[str, ...], ...]
    numbers: Mapping[str, float | tuple[float, ...]]
    findings: tuple[Finding, ...] = ()
    images: tuple[tuple[ImageRef, ...], ...] = ()
    digests: tuple[tuple[str, ...], ...] = ()
    image_tokens: tuple[int, ...] = ()

    @property
    def texts(self) -> list[str]:
        """All that has to be tokenised: the prompt, the answers, and the cuts."""
        return [self.prompt, *self.answers, *(text for texts in self.cuts for text in texts)]


@dataclass(frozen=True)
class TextReader:
    """Reads the texts of rows.

    Args:
        source: the data's name, for messages.
        tokenizer: with the chat template.
        assistant_only: of answers of several turns only the assistant's are scored.
        has_prompts: rows have a prompt of their own; else it is what chosen and rejected share.
        cuts_echoes: answers that begin with the prompt's text are meant so.
        placeholder: what stands in a text where an image does; None where images are not seen.
    """

    source: str
    tokenizer: Any
    assistant_only: bool = True
    has_prompts: bool = True
    cuts_echoes: bool = False
    placeholder: str | None = None

    @cached_property
    def _as_parts(self) -> bool:
        return wants_parts(self.tokenizer)

    def where(self, number: int) -> str:
        """How messages name a row."""
        return row_place(self.source, number)

    def read(
        self,
        row: Mapping[str, Any],
        number: int,
        answers: Mapping[str, Any],
        numbers: Mapping[str, float | tuple[float, ...]],
    ) -> RowTexts:
        """The texts of a row.

        Args:
            answers: by their names, for messages. Without prompts the first two tell where theirs ends.

        Raises:
            ValueError: texts of unlike kinds, a list that holds no messages, or a tokenizer without a
                template.
            BadRow: nothing can be learnt from the row, or not what it says.
        """
        where, names = self.where(number), list(answers)
        texts = {"prompt": row.get("prompt"), **answers}
        # Messages tell by themselves where their common start ends; of texts it may be a chance.
        is_pair = "chosen" in answers and all(map(is_list, answers.values()))
        if texts["prompt"] is None and (is_pair or not self.has_prompts):
            del texts["prompt"]
        for name, value in texts.items():
            if value is None:
                raise BadRow("no_text", f"column {name!r} is null or not there")
        notes: list[Finding] = []
        if all(isinstance(value, str) for value in texts.values()):
            prompt, values = self._plain(texts, names, where, notes)
            prompt, values, images = self._plain_images(row, prompt, values, names)
            whole = tuple(prompt + text for text in values)
            found = RowTexts(number, prompt, whole, False, (), numbers, images=images)
            notes += lost_tools(read_tools(row), "\n".join(found.answers))
        else:
            found = self._chat(row, number, texts, names, numbers, notes)
        check_unicode(found.texts)
        return RowTexts(**{**vars(found), "findings": tuple(dict.fromkeys(notes))})

    def without_echo(self, prompt: str, answers: Sequence[str], notes: list[Finding]) -> tuple[str, ...]:
        """Answers that begin with the prompt's text without it, where the file means it so; notes it."""
        is_meant = self.cuts_echoes and echoes(prompt, answers)
        if any(echoes(prompt, [answer]) for answer in answers):
            notes.append(Finding("prompt_repeated" if is_meant else "prompt_echoed"))
        return tuple(answer[len(prompt) :] if is_meant else answer for answer in answers)

    def _plain(
        self, texts: Mapping[str, str], names: Sequence[str], where: str, notes: list[Finding]
    ) -> tuple[str, tuple[str, ...]]:
        values = [texts[name] for name in names]
        if "prompt" in texts:
            prompt = texts["prompt"]
            answers = self.without_echo(prompt, values, notes)
        else:
            prompt, answers = _without_shared_start(dict(zip(names, values, strict=True)), where)
            notes.append(Finding("prompt_shared"))
        if not answers or not all(answers):
            raise BadRow("empty_completion")
        return prompt, answers

    def _plain_images(
        self, row: Mapping[str, Any], prompt: str, answers: tuple[str, ...], names: Sequence[str]
    ) -> tuple[str, tuple[str, ...], tuple[tuple[ImageRef, ...], ...]]:
        """Texts with a placeholder for each image of the row, and the images of each."""
        refs = [] if self.placeholder is None else row_refs(row)
        if self.placeholder is None or not refs:
            return prompt, answers, ()
        texts = [text.replace(WORD, self.placeholder) for text in (prompt, *answers)]
        counts = [text.count(self.placeholder) for text in texts]
        if sum(counts) != len(refs):
            raise BadRow(
                "image_places",
                f"{len(refs)} images for {sum(counts)} places ({self.placeholder} in the texts)",
            )
        parts = [[refs.pop(0) for _ in range(count)] for count in counts]
        return texts[0], tuple(texts[1:]), self._of_sequences(row, names, parts[0], parts[1:])

    @staticmethod
    def _of_sequences(
        row: Mapping[str, Any],
        names: Sequence[str],
        of_prompt: Sequence[ImageRef],
        of_answers: Sequence[Sequence[ImageRef]],
    ) -> tuple[tuple[ImageRef, ...], ...]:
        """The images of each answer's sequence; the rejected one's prompt may have others."""
        found = [(*of_prompt, *own) for own in of_answers]
        others = column_refs(row, IMAGES_REJECTED)
        if others and "rejected" in names:
            if len(others) != len(of_prompt):
                raise BadRow(
                    "image_places", f"{len(others)} images_rejected for {len(of_prompt)} images of the prompt"
                )
            place = list(names).index("rejected")
            found[place] = (*others, *of_answers[place])
        return tuple(found) if any(found) else ()

    def _chat(
        self,
        row: Mapping[str, Any],
        number: int,
        texts: Mapping[str, Any],
        names: Sequence[str],
        numbers: Mapping[str, float | tuple[float, ...]],
        notes: list[Finding],
    ) -> RowTexts:
        where = self.where(number)
        prompt, answers = self._messages(texts, names, where, notes)
        images: tuple[tuple[ImageRef, ...], ...] = ()
        if self.placeholder is not None:
            fill_images(prompt, answers, row_refs(row))
            images = self._of_sequences(row, names, images_of(prompt), list(map(images_of, answers)))
        if not answers or not all(map(bool, answers)):
            raise BadRow("empty_completion")
        for name, answer in zip(names, answers, strict=True):
            roles = list(dict.fromkeys(message["role"] for message in answer))
            if ASSISTANT not in roles:
                notes.append(Finding("no_assistant", f"{name} has {', '.join(roles)}"))
            elif not says_something(answer):
                raise BadRow("empty_completion")
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"{where}: the row holds messages, but the tokenizer has no chat template: set "
                "tokenizer.chat_template (--chat_template FILE), use an instruction-tuned model's "
                "tokenizer, or give strings"
            )
        tools = read_tools(row)
        arguments = read_template_arguments(row)
        talk = Conversation(self.tokenizer, prompt, answers, tools, arguments, self._as_parts)
        opened = talk.opened
        notes += self._lost(talk)
        cuts: list[tuple[str, ...]] = []
        for place, text in enumerate(talk.texts if self.assistant_only else ()):
            has_spoken = any(message["role"] == ASSISTANT for message in answers[place])
            spans = talk.spans(place) if has_spoken else None
            cuts.append(tuple(text[:end] for span in spans or () for end in span))
        if any(cuts):
            notes.append(Finding("others_turns"))
        return RowTexts(number, opened, tuple(talk.texts), True, tuple(cuts), numbers, images=images)

    def _lost(self, talk: Conversation) -> Iterator[Finding]:
        eos = getattr(self.tokenizer, "eos_token", None)
        for place, (answer, text) in enumerate(zip(talk.answers, talk.texts, strict=True)):
            yield from lost_in_the_answer(answer, text[talk.start(place) :], eos)
        yield from lost_in_the_prompt(talk.prompt, talk.opened)
        yield from lost_tools(talk.tools, talk.texts[0])

    def _messages(
        self, texts: Mapping[str, Any], names: Sequence[str], where: str, notes: list[Finding]
    ) -> tuple[Messages, list[Messages]]:
        """Prompt and answers as messages, the prompt once."""
        kinds = {name: type(value).__name__ for name, value in texts.items()}
        wrong = ValueError(
            f"{where}: got {kinds}, wanted strings throughout or lists of messages throughout; where the "
            "answers hold the whole conversation, leave the prompt column out (--ignore_columns prompt)"
        )
        if not all(is_list(texts[name]) for name in names):
            raise wrong
        sees = self.placeholder is not None
        answers = {
            name: read_messages(texts[name], name, where, notes, _path(name) if sees else None)
            for name in names
        }
        if "prompt" not in texts:
            start, cut = _without_shared_start(answers, where)
            return start, list(cut)
        prompt = texts["prompt"]
        if is_list(prompt):
            prompt = read_messages(prompt, "prompt", where, notes, ("prompt",) if sees else None)
        elif not isinstance(prompt, str):
            raise wrong
        whole, rest = without_repeated_prompt(prompt, list(answers.values()))
        if whole is None:
            raise wrong
        if any(len(after) < len(before) for after, before in zip(rest, answers.values(), strict=True)):
            notes.append(Finding("prompt_repeated"))
        return whole, rest


def _path(name: str) -> tuple[str | int, ...]:
    """Where in its row an answer is: a column, or the place in one that is a list."""
    word, _, place = name.partition(" ")
    return ("completions", int(place) - 1) if word == "answer" and place else (name,)


def _without_shared_start(answers: Mapping[str, Any], where: str) -> tuple[Any, tuple[Any, ...]]:
    """What the first two answers share at their start, and all answers without it."""
    first, second, *others = answers.values()
    size = shared_start(first, second)
    prompt = first[:size]
    for name, other in list(answers.items())[2:]:
        if other[:size] != prompt:
            raise ValueError(
                f"{where}: {name!r} does not begin with what chosen and rejected have in common, wanted that "
                "or a column 'prompt'"
            )
    return prompt, tuple(answer[size:] for answer in (first, second, *others))
