"""The losses' options as settings: each is one of its own, and all are ``loss_options``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastdpo.losses import loss_options
from fastdpo.losses.registry import LossOption
from fastdpo.training.settings.kinds import KINDS
from fastdpo.training.settings.names import our_names
from fastdpo.training.settings.values import Hint, read_value

_OPTIONS = Hint(dict[str, Any] | None)


def all_loss_options() -> dict[str, dict[str, LossOption]]:
    """Every option of the losses that the loop takes: option -> loss -> option."""
    options: dict[str, dict[str, LossOption]] = {}
    for inputs in dict.fromkeys(inputs for kind in KINDS.values() for inputs in kind.inputs):
        for name, takers in loss_options(inputs).items():
            options.setdefault(name, {}).update(takers)
    return options


def with_loss_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those that are losses' options in ``loss_options``, read in their type.

    Raises:
        ValueError: a value of another type.
    """
    kinds = {name: next(iter(takers.values())).type for name, takers in all_loss_options().items()}
    given = {name: read_value(name, Hint(kinds[name]), settings[name]) for name in settings if name in kinds}
    others = {name: value for name, value in settings.items() if name not in kinds}
    if given:
        whole = read_value("loss_options", _OPTIONS, others.get("loss_options"))
        others["loss_options"] = {**(whole or {}), **given}
    return others


class TakesLossOptions(type):
    """Of a dataclass of settings: its constructor takes losses' options, and TRL's names, as keywords."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
        ours, problems = our_names(settings, [*(item.name for item in fields), *all_loss_options()])
        if problems:
            raise TypeError(f"{cls.__name__}: {'; '.join(problems)}")
        return super().__call__(*args, **with_loss_options(ours))
