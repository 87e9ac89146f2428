"""Losses that a user brings: modules that are imported for what they register."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

IMPORTED: list[str] = []
"""What has been imported in this process."""


def import_losses(names: Sequence[str]) -> None:
    """Import modules by name, from the working directory too, or ``.py`` files by path.

    Raises:
        ValueError: there is no such module or file, or it fails; says which and how.
    """
    for name in names:
        import_code("import", name)
        IMPORTED.extend([name] if name not in IMPORTED else [])


def import_code(setting: str, name: str) -> None:
    """Import a user's module by name, from the working directory too, or a ``.py`` file by path.

    Raises:
        ValueError: as ``import_losses``; names the setting.
    """
    try:
        _import(name)
    except ModuleNotFoundError as error:
        missing = f"no module {error.name!r}" if error.name != name.split(".")[0] else "no such module"
        raise ValueError(
            f"{setting}: got {name}, wanted a module or a .py file: {missing}, here or where Python looks"
        ) from error
    except Exception as error:
        # Whatever a user's code does wrong, the user has to know which code it was.
        raise ValueError(f"{setting}: {name} fails: {type(error).__name__}: {error}") from error


def _import(name: str) -> None:
    if not name.endswith(".py"):
        # The console script's path has its own folder in place of the working directory.
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        importlib.import_module(name)
        return
    path = Path(name).resolve()
    if not path.is_file():
        raise ModuleNotFoundError(name=name.split(".")[0])
    if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) == str(path):
        return  # once a process, as any module
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # as import does: dataclasses and pickles look there
    spec.loader.exec_module(module)
