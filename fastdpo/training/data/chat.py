"""A row's messages through the tokenizer's chat template: texts, and where in them the assistant speaks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from os.path import commonprefix
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from fastdpo.training.data.messages import ASSISTANT, IMAGES_OF, MARK, Message, Messages
from fastdpo.training.data.template_checks import contains, last_words, words_of
from fastdpo.training.settings.row_checks import BadRow

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Conversation:
    """A prompt and its answers, as the template has them.

    Args:
        tokenizer: with a chat template.
        prompt, answers: messages.
        tools: of the row, or None.
        arguments: further ones of the template.
        as_parts: contents are to be lists of parts (``wants_parts``).

    Raises:
        BadRow: the template refuses the messages, or leaves unknown where answers begin.
    """

    tokenizer: Any
    prompt: Messages
    answers: Sequence[Messages]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    as_parts: bool = False

    @cached_property
    def texts(self) -> list[str]:
        """The prompt with each answer."""
        return [self._render([*self.prompt, *answer]) for answer in self.answers]

    @cached_property
    def opened(self) -> str:
        """The prompt, up to where an answer goes on."""
        if not self.prompt:
            return ""
        opened = self._render(self.prompt, add_generation_prompt=True)
        if not all(text.startswith(opened) for text in self.texts):
            # Some templates open the answer differently when it is still to come (a "<think>" for the model
            # to continue): the answer then begins where the texts part. More must not differ.
            closed = self._render(self.prompt)
            if not all(text.startswith(closed) for text in self.texts):
                raise BadRow("prompt_rewritten", "the chat template renders the prompt differently")
        return opened

    def start(self, place: int) -> int:
        """Where in its text an answer begins."""
        return _shared(self.opened, self.texts[place])

    def spans(self, place: int) -> list[tuple[int, int]] | None:
        """Where in its text the assistant speaks, of an answer that others have turns in; None for all of it.

        Raises:
            BadRow: it is not known.
        """
        if all(message["role"] == ASSISTANT for message in self.answers[place]):
            return None
        marked = self._marked_spans(place)
        spans = self._added_spans(place) if marked is None else marked
        scored = "".join(self.texts[place][start:end] for start, end in spans)
        for message in self.answers[place]:
            if message["role"] == ASSISTANT and not contains(scored, words_of(message)):
                raise BadRow("turns_unknown")
        return spans

    def _marked_spans(self, place: int) -> list[tuple[int, int]] | None:
        """What the template itself marks as the assistant's; None where it marks nothing."""
        template = self.tokenizer.get_chat_template(None, self.tools)
        if not _MARKED.search(template):
            return None
        rendered: Any = render_jinja_template(
            [self._as_the_template_wants([*self.prompt, *self.answers[place]])],
            tools=list(self.tools) if self.tools else None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.arguments},
        )
        texts, spans = rendered
        if texts[0] != self.texts[place]:
            raise BadRow("turns_unknown")
        start = self.start(place)
        return [(max(begin, start), end) for begin, end in spans[0] if end > start]

    def _added_spans(self, place: int) -> list[tuple[int, int]]:
        """What each turn of the assistant adds to the text of those before it."""
        text, messages = self.texts[place], [*self.prompt, *self.answers[place]]
        spans = []
        for first, end in _assistant_turns(messages, len(self.prompt)):
            start = self._end_of(messages[:first], text)
            spans.append((start, self._end_of_turn(messages[:end], text, start)))
        return spans

    def _end_of(self, messages: Messages, text: str) -> int:
        """Where the beginning of a conversation ends in its text, opened for the assistant."""
        if not messages:
            return 0
        closed = self._rendered_part(messages)
        opened = self._rendered_part(messages, add_generation_prompt=True)
        if not text.startswith(closed) and not text.startswith(opened):
            raise BadRow("turns_unknown")
        return max(_shared(opened, text), _shared(closed, text))

    def _end_of_turn(self, messages: Messages, text: str, start: int) -> int:
        """Where the assistant's turn that a beginning of a conversation ends with ends in the whole text."""
        alone = self._rendered_part(messages)
        if text.startswith(alone):
            return len(alone)
        # A turn that others follow may lack what it has at the end (an empty "<think>"): it ends with the
        # same words, and what marks the end.
        last = last_words(messages)
        closing = last + alone.rpartition(last)[2].rstrip() if last else ""
        place = text.find(closing, start) if closing != last else -1
        return _shared(alone, text) if place < 0 else place + len(closing)

    def _rendered_part(self, messages: Messages, **how: bool) -> str:
        try:
            return self._render(messages, **how)
        except BadRow:
            # It is the whole that a template has to take.
            raise BadRow("turns_unknown") from None

    def _render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                self._as_the_template_wants(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                tools=self.tools,
                **self.arguments,
            )
        except Exception as error:
            # Templates raise whatever they like on roles they do not know; the row number is what helps.
            raise BadRow("template_refuses", f"the chat template refused the messages: {error}") from error
        return text

    def _as_the_template_wants(self, messages: Messages) -> Messages:
        return [self._as_it_wants(message) for message in messages]

    def _as_it_wants(self, message: Message) -> Message:
        if not self.as_parts and IMAGES_OF not in message:
            return message
        own = {key: value for key, value in message.items() if key != IMAGES_OF}
        return {**own, "content": _parts(message["content"])}


def wants_parts(tokenizer: Any) -> bool:
    """Whether a chat template shows contents that are lists of parts alone, as some of vision models do."""

    def shows(content: Any) -> bool:
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # whatever a template raises on what it does not know
            return False
        return "some words" in text

    return not shows("some words") and shows(_parts("some words"))


def _parts(text: str) -> list[dict[str, str]]:
    """Text as parts, with an image for each mark."""
    first, *others = text.split(MARK)
    parts = [{"type": "text", "text": first}] if first or not others else []
    for other in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": other}] if other else [])]
    return parts


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common from their start."""
    if other.startswith(one):
        return len(one)
    return len(commonprefix([one, other]))


def _assistant_turns(messages: Messages, first: int) -> Iterator[tuple[int, int]]:
    """Runs of the assistant's messages, from the ``first`` on: the number of one, and of the one after."""
    numbers = range(first, len(messages))
    for is_assistant, run in groupby(numbers, lambda number: messages[number]["role"] == ASSISTANT):
        if is_assistant:
            found = list(run)
            yield found[0], found[-1] + 1
