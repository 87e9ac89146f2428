"""The data sets that a run is told: one or several, each with its split and its share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of a part of a list: our names, and TRL's.
_KEYS = {"path": "path", "split": "split", "weight": "weight", "fraction": "weight"}


def read_parts(name: str, given: Any, split: Any, weights: Any) -> tuple[Any, Any, Any]:
    """What a list of data sets says, taken apart.

    Args:
        name: the setting, for messages.
        given: a name, or a list of names and of mappings with ``path``, ``split`` and ``weight``; as YAML and
            Python have it.
        split, weights: what is set beside it.

    Returns:
        The names, their splits and their weights; ``split`` and ``weights`` where the list says none.

    Raises:
        ValueError: a part says something else, or what is set beside the list too.
    """
    parts = given if isinstance(given, list | tuple) else [given]
    if not any(isinstance(part, Mapping) for part in parts):
        return given, split, weights
    read = [_read_part(name, part) for part in parts]
    for key, beside in (("split", split), ("weight", weights)):
        if isinstance(beside, list) and any(key in part for part in read):
            raise ValueError(
                f"{name}: got a {key} of a part and a list of them beside it: give one of the two"
            )
    if any("split" in part for part in read):
        split = [part.get("split", split or "test") for part in read]  # none is said of evaluations alone
    if any("weight" in part for part in read):
        without = [part["path"] for part in read if "weight" not in part]
        if without:
            raise ValueError(f"{name}: got no weight of {without[0]}, wanted one of every part, or of none")
        weights = [part["weight"] for part in read]
    return [part["path"] for part in read], split, weights


def _read_part(name: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        return {"path": part}
    read: dict[str, Any] = {}
    for key, value in part.items():
        if key not in _KEYS or _KEYS[key] in read:
            raise ValueError(f"{name}: got {key!r} of a part, wanted path, split and weight, each once")
        if value is not None:
            read[_KEYS[key]] = value
    if "path" not in read:
        raise ValueError(f"{name}: got a part without a path: {dict(part)}")
    return read


def names_of(given: str | list[str] | None) -> list[str]:
    """The names of a setting that is one, several or none."""
    return [given] if isinstance(given, str) else list(given or ())
