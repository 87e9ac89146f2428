"""Messages, tools and template arguments of a row as a chat template should see them.

Content is text: of text parts, theirs; null is empty; ``MARK`` stands where an image does, and which one
stands beside the text (``IMAGES_OF``). Other keys that are null are not there, at any depth:
Arrow (Parquet, ``datasets``) has one schema for all rows, and fills what a row lacks with nulls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.training.data.images import ImageRef, ref_of
from fastdpo.training.settings.row_checks import BadRow, Finding

Message = dict[str, Any]
Messages = list[Message]
# Under which names templates and data have what an assistant thought before it answered.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
ASSISTANT = "assistant"
# In a message's text, an image; a character of private use.
MARK = "\U000ffffd"
# The key of a message's images, in the order of their marks; none of the message's own.
IMAGES_OF = "_images"
# What data written for LLaVA, LLaMA-Factory and ms-swift have in texts where an image stands.
WORD = "<image>"
_IMAGE_PARTS = ("image", "image_url", "input_image")


def is_list(value: Any) -> bool:
    """Whether it is a list of whatever, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def read_messages(
    value: Any,
    name: str,
    where: str,
    notes: list[Finding],
    path: tuple[str | int, ...] | None = None,
) -> Messages:
    """The messages of a column; appends to ``notes`` what was mended.

    Args:
        path: keys that lead to the messages in their row; with them parts that are images are read.

    Raises:
        ValueError: something in the list is no message; names it.
        BadRow: its content is no text, or an image is none.
    """
    return [
        _read_message(message, name, where, notes, None if path is None else (*path, place))
        for place, message in enumerate(value)
    ]


def _read_message(
    message: Any, name: str, where: str, notes: list[Finding], path: tuple[str | int, ...] | None
) -> Message:
    is_message = isinstance(message, Mapping) and isinstance(message.get("role"), str)
    if not is_message or not ("content" in message or message.get("tool_calls")):
        raise ValueError(
            f"{where}: got {str(message)[:80]!r} in {name}, wanted a message with role and content"
        )
    content = message.get("content")
    images: list[ImageRef] = []
    text = _text_of(content, name, None if path is None else (*path, "content"), images)
    if is_list(content) and not images:
        notes.append(Finding("text_parts"))
    read = {**without_nulls({**message, "content": None}), "content": text}
    if images:
        read[IMAGES_OF] = images
    for field in REASONING_FIELDS:
        if field in read:
            read[field] = _text_of(read[field], name)
    calls = _objects(read.pop("tool_calls", None), "tool_calls")
    return {**read, "tool_calls": calls} if calls else read


def _text_of(
    content: Any,
    name: str,
    path: tuple[str | int, ...] | None = None,
    images: list[ImageRef] | None = None,
) -> str:
    """Text, of what may be parts; appends their images to ``images``. Raises BadRow for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if is_list(content):
        parts = []
        for place, part in enumerate(content):
            if path is not None and images is not None and _is_image(part):
                images.append(ref_of(part, (*path, place)))
                parts.append(MARK)
            else:
                parts.append(_text_of_part(part, name))
        return "".join(parts)
    raise BadRow("not_text", f"{name} has {str(content)!r:.60}")


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _IMAGE_PARTS


def _text_of_part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    part = without_nulls(part)
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text", "" if "type" in part else None)
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise BadRow("not_text", f"{name} has a part {str(kind)!r:.60}")


def without_nulls(value: Any) -> Any:
    """A copy in which keys that are null are not there; items of lists may be null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if is_list(value):
        return [without_nulls(item) for item in value]
    return value


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """``tools`` of a row, given as objects or as JSON text, or None. Raises BadRow for anything else."""
    return _objects(row.get("tools"), "tools") or None


def read_template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """``chat_template_kwargs`` of a row. Raises BadRow unless they are an object, or JSON text of one."""
    found = _parsed(row.get("chat_template_kwargs"), "template_arguments")
    if found is not None and not isinstance(found, dict):
        raise BadRow("template_arguments", f"got {type(found).__name__}")
    return found or {}


def _objects(value: Any, check: str) -> list[dict[str, Any]]:
    """A list of objects, each or all of it given as JSON text."""
    found = _parsed(value, check)
    if not is_list(found) and found is not None:
        raise BadRow(check, f"got {type(found).__name__}")
    items = [_parsed(item, check) for item in found or ()]
    for item in items:
        if not isinstance(item, dict):
            raise BadRow(check, f"got {str(item)!r:.60} in the list")
    return items


def _parsed(value: Any, check: str) -> Any:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(check, str(error)) from None
    elif isinstance(value, str):
        return None
    return without_nulls(value)


def says_something(messages: Messages) -> bool:
    """Whether an answer's assistant says, calls or thinks something."""
    return any(
        message["content"].strip() or message.get("tool_calls") or reasoning_of(message)
        for message in messages
        if message["role"] == ASSISTANT
    )


def reasoning_of(message: Message) -> str:
    """The reasoning that stands in a field of its own, or nothing."""
    return next((message[field] for field in REASONING_FIELDS if message.get(field)), "")


def fill_images(prompt: Messages, answers: Sequence[Messages], refs: Sequence[ImageRef]) -> None:
    """Put the images of a row's column where its messages have places for them; in place.

    Where they have none, and their texts as many ``<image>`` as there are images, these are the places; else
    the images go before the first text of the prompt's user, as in TRL.

    Raises:
        BadRow: other than one place for each.
    """
    messages = [*prompt, *(message for answer in answers for message in answer)]
    waiting = [ref for message in messages for ref in message.get(IMAGES_OF, ()) if ref.value is None]
    if not waiting and refs:
        if sum(message["content"].count(WORD) for message in messages) == len(refs):
            for message in messages:
                _open(message, message["content"])
        elif user := next((message for message in prompt if message["role"] == "user"), None):
            _open(user, WORD * len(refs) + user["content"])
        waiting = [ref for message in messages for ref in message.get(IMAGES_OF, ()) if ref.value is None]
    if len(waiting) != len(refs):
        raise BadRow("image_places", f"{len(refs)} images for {len(waiting)} places")
    given = iter(refs)
    for message in messages:
        if IMAGES_OF in message:
            message[IMAGES_OF] = [next(given) if ref.value is None else ref for ref in message[IMAGES_OF]]


def _open(message: Message, text: str) -> None:
    """Give a message the text, with a place for an image where it has the word for one."""
    own, places = iter(message.get(IMAGES_OF, ())), re.findall(f"{WORD}|{MARK}", text)
    if places:
        message["content"] = text.replace(WORD, MARK)
        message[IMAGES_OF] = [ImageRef(None) if place == WORD else next(own) for place in places]


def images_of(messages: Messages) -> list[ImageRef]:
    """The images of some messages, in their order."""
    return [ref for message in messages for ref in message.get(IMAGES_OF, ())]


def check_unicode(texts: Sequence[str]) -> None:
    """Raise BadRow for a text that has no bytes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("not_unicode", f"{text[error.start]!r} at character {error.start}") from None
