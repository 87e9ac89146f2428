"""What others may rely on: public names, their parameters and fields, settings, commands and backends.

``tests/public_names.txt`` is the list as it is promised: a name that goes, or a parameter that is renamed,
shows as a test that fails. A change that is meant is written by

    python -m tests.public_names
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import fastdpo
from fastdpo.cli import COMMANDS
from fastdpo.losses import LOSSES
from fastdpo.training.settings.losses import all_loss_options
from fastdpo.training.settings.typos import SETTINGS
from fastdpo.types import BACKENDS, MODES, TOKEN_STATISTICS

FROZEN = Path(__file__).with_name("public_names.txt")


def names() -> Iterator[str]:
    """A line for each name, with what it takes; parameters in their order, keywords behind a star."""
    for name in sorted(fastdpo.__all__):
        yield f"fastdpo.{name}{_taken(getattr(fastdpo, name))}"
    for name, spec in sorted(LOSSES.items()):
        yield f"loss {name} of {spec.inputs.__name__}"
    yield from (f"option of losses {name}" for name in sorted(all_loss_options()))
    yield from (f"command {name}" for name in COMMANDS)
    for command, settings in SETTINGS.items():
        yield from (f"setting of {command} --{name}" for name in sorted(set(settings)))
    yield f"modes {', '.join(MODES)}"
    yield f"backends {', '.join(BACKENDS)}"
    yield f"statistics {', '.join(TOKEN_STATISTICS)}"


def _taken(value: object) -> str:
    if dataclasses.is_dataclass(value):
        if value is fastdpo.PreferenceConfig:
            return ""  # its fields are the settings below, and transformers'
        return f" with {', '.join(item.name for item in dataclasses.fields(value) if item.repr)}"  # type: ignore[arg-type]
    if fields := getattr(value, "_fields", None):
        return f" with {', '.join(fields)}"
    if not callable(value):
        return ""
    shown, has_star = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not has_star:
            shown.append("*")
            has_star = True
        star = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        has_default = parameter.default is not parameter.empty
        shown.append(f"{star}{parameter.name}{'=' if has_default else ''}")
    return f"({', '.join(shown)})"


if __name__ == "__main__":
    FROZEN.write_text("".join(f"{line}\n" for line in names()), encoding="utf-8")
