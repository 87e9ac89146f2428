"""Judges that are Python functions: found by name, called, and held to what they return."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.training.settings.own_losses import import_code


def load_function(setting: str, name: str) -> Callable[..., Any]:
    """The function of ``module:function``, or ``FILE.py:function``; modules of the working directory too.

    Raises:
        ValueError: there is none; says what was looked for.
    """
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise ValueError(f"{setting}: got {name!r}, wanted module:function or FILE.py:function")
    import_code(setting, module)
    loaded = sys.modules[Path(module).stem] if module.endswith(".py") else importlib.import_module(module)
    found = getattr(loaded, function, None)
    if not callable(found):
        names = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{setting}: {module} has no function {function!r}; it has {', '.join(names) or 'none'}"
        )
    result: Callable[..., Any] = found
    return result


def source_of(name: str) -> str:
    """A file's own text, or a module's name: what tells one function from another of its name."""
    module = name.rpartition(":")[0]
    path = Path(module)
    return path.read_text(encoding="utf-8") if module.endswith(".py") and path.is_file() else module


def call(
    setting: str,
    function: Callable[..., Any],
    given: Mapping[str, Sequence[Any]],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """What a function says of each of some things.

    Args:
        given: the arguments, each as long as the others.
        columns: of the rows that they are from; a function gets those that it names, or all as keywords.

    Returns:
        Finite numbers, as many.

    Raises:
        ValueError: it fails, or returns something else; says what.
    """
    count = len(next(iter(given.values())))
    taken = _taken(function, columns)
    try:
        found = function(**given, **taken)
    except Exception as error:
        # Whatever a user's code does wrong, the user has to know which code it was.
        raise ValueError(f"{setting}: {_name(function)} fails: {type(error).__name__}: {error}") from error
    if hasattr(found, "tolist"):
        found = found.tolist()
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(
            f"{setting}: {_name(function)} returned {type(found).__name__}, wanted a list of {count} numbers"
        )
    if len(found) != count:
        raise ValueError(
            f"{setting}: {_name(function)} returned {len(found)} numbers, wanted {count}, one for each"
        )
    return [_number(setting, function, value) for value in found]


def _taken(function: Callable[..., Any], columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(columns)
    return {name: column for name, column in columns.items() if name in parameters}


def _number(setting: str, function: Callable[..., Any], value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{setting}: {_name(function)} returned {value!r:.60}, wanted a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{setting}: {_name(function)} returned {number}, wanted a finite number")
    return number


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", function))
