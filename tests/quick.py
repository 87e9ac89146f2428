"""``pytest --quick``: a meaningful answer in a small part of the time (`make quick`).

What is slow by nature is left out, and so is what starts a process of its own; of every other test
function one case is run: its first. Tests that plant bugs are run whole, and so are those of the rooms that a
change touches, where they are few: what differs from the last commit, or in a clean checkout the last
commit itself.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import FunctionType

import pytest

from tests import ROOT

SLOW = ("slow", "distributed", "network", "gpu")
WHOLE = ("test_tolerances_have_teeth.py", "test_layers.py")
# Rooms of more tests than this are not run whole.
_AT_MOST = 200


def changed_files() -> list[str]:
    """Paths that differ from the last commit, or that it changed; none where there is no git."""
    for arguments in (["diff", "--name-only", "HEAD"], ["diff", "--name-only", "HEAD~1", "HEAD"]):
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.split():
            return done.stdout.split()
    return []


def rooms_of(files: list[str]) -> set[str]:
    """The folders of tests that belong to files: ``fastdpo/losses/x.py`` to ``tests/losses``."""
    folders = set()
    for name in files:
        top, *rest = Path(name).parts
        if top in ("fastdpo", "tests", "benchmarks") and rest:
            inside = rest[:-1] if top != "benchmarks" else ["benchmarks"]
            folders.add("/".join(["tests", *inside]) if inside else name)
    return folders


def chosen(items: list[pytest.Item], rooms: set[str]) -> list[pytest.Item]:
    """The items that a quick run runs."""
    paths = {item: item.path.relative_to(ROOT).as_posix() for item in items}
    in_room = {item: _room(path) in rooms or path in rooms for item, path in paths.items()}
    whole = sum(in_room.values()) <= _AT_MOST
    seen: set[tuple[str, str]] = set()
    kept = []
    for item in items:
        if any(item.get_closest_marker(name) for name in SLOW):
            continue
        function = (paths[item], getattr(item, "originalname", item.name))
        is_first = function not in seen
        seen.add(function)
        if item.path.name in WHOLE or (whole and in_room[item]):
            kept.append(item)
        elif is_first and not _starts_processes(item.function):  # type: ignore[attr-defined]
            kept.append(item)
    return kept


def _starts_processes(function: FunctionType) -> bool:
    """By itself or by a helper: seconds for a new interpreter and its imports alone."""
    helpers = (function.__globals__.get(name) for name in function.__code__.co_names)
    own = [function, *(helper for helper in helpers if isinstance(helper, FunctionType))]
    return any(name in one.__code__.co_names for one in own for name in ("subprocess", "multiprocessing"))


def _room(path: str) -> str:
    return path.rpartition("/")[0]
