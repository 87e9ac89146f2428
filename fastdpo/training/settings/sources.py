"""The data sets that a run is told: one or several, each with its split and its share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# alignment-handbook's, of this version and of former ones.
MIXTURES = ("dataset_mixture", "dataset_mixer")
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


def read_mixture(name: str, given: Any) -> dict[str, Any]:
    """alignment-handbook's data sets as our settings: ids, their splits, and the share held out.

    Columns are not looked at: losses read what they need. The seed is of its shuffle, which is not ours.

    Raises:
        ValueError: it asks for a configuration, or for a part of a data set's rows.
    """
    if given is None:
        return {}
    if name == "dataset_mixer" and isinstance(given, Mapping):
        given = {"datasets": [{"id": path, "weight": weight} for path, weight in given.items()]}
    parts = given.get("datasets") if isinstance(given, Mapping) else None
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) and "id" in part for part in parts):
        raise ValueError(f"{name}: got {given!r}, wanted datasets, a list of their id, split and weight")
    for part in parts:
        if part.get("config") not in (None, "default"):
            raise ValueError(
                f"{name}: got the configuration {part['config']!r} of {part['id']}, wanted none: load it "
                "with `datasets`, save it, and give its folder as dataset"
            )
        if float(1 if part.get("weight") is None else part["weight"]) != 1:
            raise ValueError(
                f"{name}: got {part['weight']} of {part['id']}, which is a part of its rows there, wanted 1: "
                "dataset_weights are the shares of the rows that each has"
            )
    found: dict[str, Any] = {"dataset": _one_or_all([part["id"] for part in parts])}
    if any(part.get("split") for part in parts):
        found["dataset_split"] = _one_or_all([part.get("split") or "train" for part in parts])
    if given.get("test_split_size") is not None:
        found["held_out"] = given["test_split_size"]
    return found


def _one_or_all(items: list[str]) -> str | list[str]:
    return items[0] if len(items) == 1 else items


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
