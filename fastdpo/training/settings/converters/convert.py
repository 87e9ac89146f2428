"""``fastdpo convert-config``: whose file it is, ours of it, and what was left out of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastdpo.training.settings.command_line import known_settings, parse_train
from fastdpo.training.settings.converters import SOURCES, axolotl, llama_factory, trl_files
from fastdpo.training.settings.converters.parts import Theirs
from fastdpo.training.settings.words import ArgumentError
from fastdpo.training.settings.yaml_file import read_settings


def source_of(given: dict[str, Any]) -> str:
    """Whose settings these are, by the names that only they have.

    Raises:
        ValueError: there are none of anybody's, or as many of two.
    """
    marks = {
        "llama-factory": llama_factory.MARKS,
        "axolotl": axolotl.MARKS,
        "alignment-handbook": trl_files.HANDBOOK_MARKS,
    }
    found = {name: len([mark for mark in of if mark in given]) for name, of in marks.items()}
    best = max(found.values())
    first = [name for name, count in found.items() if count == best and best]
    if not first and any(name in given for name in trl_files.MARKS):
        return "trl"
    if len(first) != 1:
        raise ValueError(f"FILE: whose it is cannot be told by its settings; say --from {', '.join(SOURCES)}")
    return first[0]


def convert(
    given: dict[str, Any],
    source: str | None = None,
    *,
    trainer: str | None = None,
    folder: Path | None = None,
) -> tuple[Theirs, str]:
    """Ours of a file of theirs, and whose it is.

    Args:
        given: its names and values.
        source: of ``SOURCES``; None for what the names tell.
        trainer: of TRL's and alignment-handbook's, ``dpo``, ``kto``, ``cpo`` or ``orpo``.
        folder: where it is, for what is named relative to it.

    Raises:
        ValueError: it is nobody's, or not of preferences.
    """
    source = source or source_of(given)
    if source == "llama-factory":
        return llama_factory.convert(given, folder or Path()), source
    if source == "axolotl":
        return axolotl.convert(given), source
    return trl_files.convert(given, known_settings(), trainer), source


def convert_config(file: Path, source: str | None = None, trainer: str | None = None) -> None:
    """``fastdpo convert-config``: print our YAML, with what it leaves out in comments."""
    import yaml  # type: ignore[import-untyped]

    found, source = convert(read_settings(file), source, trainer=trainer, folder=file.parent)
    if trainer is not None and source not in ("trl", "alignment-handbook"):
        raise ArgumentError(f"--trainer: got {trainer!r}, but {file} is of {source}")
    notes = [f"{name}: {why}" for name, why in found.left_out.items()]
    print(f"# made of {file.name}, of {source}, by fastdpo convert-config")
    if notes:
        print("# not taken as it was, and why:")
        print("\n".join(f"#   {' '.join(note.split())}" for note in notes))
        if not sys.stdout.isatty():
            print("\n".join(notes), file=sys.stderr)
    text = yaml.safe_dump(found.ours, sort_keys=False, allow_unicode=True)
    print(text, end="")
    _say_what_train_says(text)


def _say_what_train_says(text: str) -> None:
    """On standard error, where ``fastdpo train`` would not start with it on this machine."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            parse_train([str(path)])
        except (ValueError, ImportError) as error:
            said = str(error).replace(f"{path}: ", "")
            print(f"`fastdpo train` would not start with it here: {said}", file=sys.stderr)
