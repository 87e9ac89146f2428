"""Attributes of other packages, replaced and put back as they were, where their source is one that was read.

What `patch_trl` replaces is private to TRL and changes without notice: it is known by a hash of its source,
whatever the package's version says.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """One attribute and what it was; ``owner`` is a module or a class."""

    path: str
    owner: Any
    name: str
    original: Any
    replacement: Any


@dataclass(frozen=True)
class Around:
    """A replacement that needs what it replaces."""

    around: Callable[[Any], Any]


class AppliedPatch:
    """What a patch did. As a context manager it undoes that at the end of the block.

    Args:
        package: whose methods are replaced.
        version: of the package.
        replaced: what is replaced now, as ``module:attribute``.
        is_new: whether this call replaced it; a call that found the package patched undoes nothing.
        undo: puts everything back.
    """

    def __init__(
        self, package: str, version: str, replaced: tuple[str, ...], is_new: bool, undo: Callable[[], None]
    ) -> None:
        self.package = package
        self.version = version
        self.replaced = replaced
        self.is_new = is_new
        self._undo = undo

    def __enter__(self) -> AppliedPatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_new:
            self._undo()

    def __repr__(self) -> str:
        return f"AppliedPatch({self.package} {self.version}, replaced: {', '.join(self.replaced)})"


def replace(replacements: Mapping[str, Any]) -> tuple[Replaced, ...]:
    """Put replacements, by ``module:attribute``, in their places; nothing is set before all were found."""
    made = []
    for path, replacement in replacements.items():
        owner, name, original = find(path)
        if isinstance(replacement, Around):
            replacement = replacement.around(original)
        made.append(Replaced(path, owner, name, original, replacement))
    for entry in made:
        setattr(entry.owner, entry.name, entry.replacement)
    return tuple(made)


def put_back(replaced: tuple[Replaced, ...], patch: str) -> None:
    """The very objects that ``replace`` replaced.

    Raises:
        RuntimeError: something else has been put in the place of a replacement since; nothing is changed.
    """
    for entry in replaced:
        if (found := vars(entry.owner).get(entry.name)) is not entry.replacement:
            raise RuntimeError(
                f"un{patch}: {entry.path} is {found!r}, wanted what {patch} put there; undo the later "
                "patch first"
            )
    for entry in replaced:
        setattr(entry.owner, entry.name, entry.original)


def unknown_source(package: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """The first path whose source is none of those known, and what is wrong with it; None for none.

    Args:
        package: its name and version, for the message.
        known: path -> hash of the source -> the releases that have it.
    """
    for path, releases in known.items():
        try:
            digest = source_hash(find(path)[2])
        except (ImportError, AttributeError, OSError, TypeError) as error:
            return path, f"{package}: the source of {path} cannot be read ({type(error).__name__}: {error})"
        if digest not in releases:
            wanted = " or ".join(f"{each} ({names})" for each, names in releases.items())
            return path, (
                f"{package}: the source of {path} has the sha256 {digest}, wanted {wanted}; it was changed, "
                "or this release is newer than this fastdpo"
            )
    return None


def source_hash(found: Any) -> str:
    """sha256 of the source of a class or function, first 16 hex digits."""
    lines = textwrap.dedent(inspect.getsource(found)).splitlines()
    return hashlib.sha256("\n".join(line.rstrip() for line in lines).encode()).hexdigest()[:16]


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def find(path: str) -> tuple[Any, str, Any]:
    """``(owner, name, value)`` of ``module:attribute.attribute``; the value as the owner itself holds it."""
    module, _, attributes = path.partition(":")
    with warnings.catch_warnings():
        # Of importing trl.experimental; who uses it has been told, who does not need not be.
        warnings.filterwarnings("ignore", message=".*trl.experimental.*")
        owner: Any = import_module(module)
    *parents, name = attributes.split(".")
    owner = functools.reduce(getattr, parents, owner)
    if name not in vars(owner):
        raise AttributeError(f"{owner.__name__} has no {name} of its own")
    return owner, name, vars(owner)[name]
