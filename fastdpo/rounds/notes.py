"""What the steps of a round wrote, so that what was changed since is not taken for it.

A step's file appears at once, so one that is not noted yet is whole: its process died in between.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastdpo.training.written import describe, differences, write_json

NOTES_FILE = "files.json"
# Of a model's folder what the next round reads; cards and logs may be edited.
_OF_A_MODEL = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def note(path: Path) -> None:
    """Note a file that a step has just written."""
    notes = path.with_name(NOTES_FILE)
    write_json(notes, {**(read_json(notes) or {}), **describe(path.parent, [path.name])})


def check(path: Path) -> None:
    """Hold a step's file to what was noted, or note it. Raises ValueError where it is another."""
    told = read_json(path.with_name(NOTES_FILE)) or {}
    if path.name not in told:
        note(path)
        return
    _raise_for(path.parent, {path.name: told[path.name]}, "it and the files that were made of it")


def model_files(folder: Path) -> dict[str, list[Any]]:
    """Of a model, whose checkpoints tell theirs themselves."""
    files: Iterable[Path] = sorted(path for path in folder.iterdir() if path.suffix in _OF_A_MODEL)
    return describe(folder, (path.name for path in files if path.is_file()))


def check_model(trained: Path, model: Path) -> None:
    """Hold the model that a round starts from to what was noted. Raises ValueError where it is another."""
    told = read_json(trained) or {}
    _raise_for(model, told.get("files", {}), f"{trained.name} and the folder {model.name} of that round")


def _raise_for(folder: Path, told: Mapping[str, Any], what: str) -> None:
    for name in told:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is not there: remove {what}, and all is made again")
    for path, difference in differences(folder, told):
        raise ValueError(f"{path} {difference}: it was changed; remove {what}, and all is made again")


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file of a round tells; None where there is none. Raises ValueError where it cannot be read."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read: it is cut off or was changed; remove it")
    return found
