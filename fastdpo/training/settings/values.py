"""What the value of a setting means: one reading for Python, YAML and the command line.

Every dataclass of settings runs its fields through ``settle``, so that ``None`` and ``null``, ``"1e-6"`` and
``1e-6``, one name and a list of one are the same wherever they come from.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

YES = ("true", "yes", "on", "t", "y", "1")
NO = ("false", "no", "off", "f", "n", "0")
NOTHING = ("none", "null")
_PLAIN = (str, int, float, bool)


class Hint:
    """A field's type hint, taken apart.

    Args:
        hint: of a dataclass field: some of ``None``, ``str``, numbers, ``bool``, an ``Enum``, lists, dicts.
    """

    def __init__(self, hint: Any) -> None:
        parts = get_args(hint) if get_origin(hint) not in (list, dict, Literal) else ()
        self.parts = parts or (hint,)
        self.takes_none = type(None) in self.parts
        self.item = next((get_args(part)[0] for part in self.parts if get_origin(part) is list), None)
        self.takes_dict = any(dict in (part, get_origin(part)) for part in self.parts)
        self.enum = next((p for p in self.parts if isinstance(p, type) and issubclass(p, Enum)), None)
        # Of a field that is one of a few words or false, false is no more than one of its values.
        self.takes_bool = bool in self.parts or Literal[False] in self.parts

    @property
    def is_known(self) -> bool:
        """Whether values can be read at all; others are a library's own objects."""
        takes_list_or_dict = self.item is not None or self.takes_dict
        is_plain = self.takes_bool or any(part in _PLAIN for part in self.parts)
        return takes_list_or_dict or is_plain or self.enum is not None

    def __str__(self) -> str:
        names = {int: "a whole number", float: "a number", str: "text"}
        words = ["true or false"] if self.takes_bool else []
        is_text = self.enum is None and not self.takes_dict
        words += [text for kind, text in names.items() if kind in self.parts and is_text]
        if self.enum is not None:
            words.append("one of " + ", ".join(str(member.value) for member in self.enum))
        if self.item is not None:
            words.append(f"a list of {'numbers' if self.item in (int, float) else 'texts'}")
        words += ["a dict, JSON or a JSON file of names and values"] if self.takes_dict else []
        words += ["none"] if self.takes_none else []
        return " or ".join(words)


@cache
def hints_of(kind: Any) -> dict[str, Hint]:
    """The hint of every field that a dataclass is made from."""
    found = get_type_hints(kind)
    return {item.name: Hint(found[item.name]) for item in dataclasses.fields(kind) if item.init}


def settle(settings: Any) -> None:
    """Read every field of a dataclass in the sense of its hint, in place.

    Raises:
        ValueError: a value that is none of what the hint allows; names the field, got and wanted.
    """
    kind: Any = type(settings)
    defaults = _defaults(settings)
    for name, hint in hints_of(kind).items():
        value = getattr(settings, name)
        if value is not defaults[name]:
            setattr(settings, name, read_value(name, hint, value))


def plain_values(settings: Any) -> dict[str, Any]:
    """A dataclass's settings as YAML has them: enums as their values, objects as dicts."""
    kind: Any = type(settings)
    return {name: _plain(getattr(settings, name)) for name in hints_of(kind)}


def not_default(settings: Any) -> dict[str, Any]:
    """Those of ``plain_values`` that are not the fields' defaults."""
    defaults = _defaults(settings)
    return {name: value for name, value in plain_values(settings).items() if value != _plain(defaults[name])}


def _defaults(settings: Any) -> dict[str, Any]:
    return {
        item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        for item in dataclasses.fields(settings)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return value.to_dict() if hasattr(value, "to_dict") else value


def read_value(name: str, hint: Hint, value: Any) -> Any:
    """``value`` in the sense of ``hint``.

    A string is read as on the command line: ``none`` and ``null`` where there may be nothing, numbers, true
    and false, JSON for a dict; ``auto`` is nothing said where the choice is yes, no or nothing.

    Raises:
        ValueError: it is none of what the hint allows.
    """
    if not hint.is_known:
        return value
    if isinstance(value, str) and hint.takes_none and value.strip().lower() in NOTHING:
        return None
    if value is None:
        if hint.takes_none:
            return None
        raise _refusal(name, hint, value)
    if isinstance(value, (list, tuple)):
        return _read_list(name, hint, list(value))
    if isinstance(value, Mapping):
        if hint.takes_dict:
            return dict(value)
        raise _refusal(name, hint, value)
    return _read_one(name, hint, value)


def _read_list(name: str, hint: Hint, items: list[Any]) -> Any:
    if hint.item is not None:
        return [read_value(name, Hint(hint.item), item) for item in items]
    if len(items) == 1 and not hint.takes_dict:
        return read_value(name, hint, items[0])
    raise _refusal(name, hint, items)


def _read_one(name: str, hint: Hint, value: Any) -> Any:
    if hint.enum is not None:
        return _read_enum(name, hint.enum, value)
    if hint.takes_dict:
        return _read_dict(name, hint, value)
    for read in (_as_bool, _as_number, _as_text):
        found = read(hint, value)
        if found is not None:
            return found[0]
    if hint.takes_bool and hint.takes_none and value == "auto":
        return None
    if hint.item is not None:
        return [read_value(name, Hint(hint.item), value)]
    raise _refusal(name, hint, value)


# Each returns what it found in a tuple, or None for a value that is nothing of its kind.


def _as_bool(hint: Hint, value: Any) -> tuple[Any] | None:
    if not hint.takes_bool:
        return None
    if isinstance(value, bool) or value in (0, 1):
        return (bool(value),)
    word = value.strip().lower() if isinstance(value, str) else None
    return (word in YES,) if word in (*YES, *NO) else None


def _as_number(hint: Hint, value: Any) -> tuple[Any] | None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    if int in hint.parts and number.is_integer():
        return (int(value) if isinstance(value, int) else int(number),)
    if float in hint.parts and not math.isnan(number):
        # What is whole stays so: fields that take a share take a number of steps too.
        is_whole = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdigit())
        return (int(value) if is_whole else number,)
    return None


def _as_text(hint: Hint, value: Any) -> tuple[Any] | None:
    return (os.fspath(value),) if str in hint.parts and isinstance(value, (str, os.PathLike)) else None


def _read_enum(name: str, enum: type[Enum], value: Any) -> Any:
    try:
        return enum(value)
    except ValueError:
        choices = [str(member.value) for member in enum]
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}{hint}") from None


def _read_dict(name: str, hint: Hint, value: Any) -> Any:
    if not isinstance(value, (str, int, float, os.PathLike)):
        return value  # an object of a library's own, in Python
    text, where = str(value), ""
    if Path(text).is_file():
        text, where = Path(text).read_text(encoding="utf-8"), f", which holds no JSON object in {value}"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: got {value!r}, wanted {hint}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: got {value!r}{where}, wanted {hint}")
    return found


def _refusal(name: str, hint: Hint, value: Any) -> ValueError:
    return ValueError(f"{name}: got {value!r}, wanted {hint}")
