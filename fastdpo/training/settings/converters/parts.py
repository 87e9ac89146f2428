"""What converters share: a file's settings, taken one after the other, and what became of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from transformers import TrainingArguments

from fastdpo.training.settings.loop import FIXED
from fastdpo.training.settings.names import ALIASES, our_names
from fastdpo.training.settings.values import NO, YES

TRAINING_ARGUMENTS = frozenset(item.name for item in dataclasses.fields(TrainingArguments))
_OF_TRANSFORMERS = frozenset(
    "evaluation_strategy warmup_ratio group_by_length no_cuda use_flash_attention_2 dataset_num_proc".split()
)


class Theirs:
    """A file of another library on its way to ours.

    Args:
        given: its names and values. What is none there is said nowhere.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = {name: value for name, value in given.items() if value is not None and value != ""}
        self.ours: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}

    def take(self, name: str, default: Any = None) -> Any:
        """A setting, which is done with then."""
        return self.given.pop(name, default)

    def switch(self, name: str, default: bool = False) -> bool:
        """A setting that is on or off; YAML 1.2 has words for it."""
        value = self.take(name, default)
        return str(value).lower() in YES or (value is True)

    def leave(self, name: str, why: str) -> None:
        """Name what has no place here."""
        self.given.pop(name, None)
        self.left_out[name] = why

    def put(self, name: str, value: Any) -> None:
        """A setting of ours; none is not written."""
        if value is not None:
            self.ours[name] = value

    def rename(self, names: Mapping[str, str]) -> None:
        """Settings that are the same under another name."""
        for theirs, ours in names.items():
            self.put(ours, self.take(theirs))

    def drop(self, names: Mapping[str, str]) -> None:
        """Those that nothing answers to: named where they are on, with the reason."""
        for name, why in names.items():
            if name in self.given and not _is_off(self.take(name)):
                self.leave(name, why)

    def rest(self, known: Collection[str], why_not: str) -> None:
        """What is left: transformers' settings and those of ``known`` are ours too, the others are named."""
        for name, value in list(self.given.items()):
            self.take(name)
            if name in FIXED:
                if value != FIXED[name][0]:
                    self.leave(name, FIXED[name][1])
            elif name not in TRAINING_ARGUMENTS | _OF_TRANSFORMERS and name not in known:
                self.leave(name, why_not)
            else:
                ours, problems = our_names({name: value}, (*known, *TRAINING_ARGUMENTS, *ALIASES.values()))
                self.ours |= ours
                for problem in problems:
                    self.leave(name, problem.partition(": ")[2])

    def default(self, **values: Any) -> None:
        """What their default is, where ours is another and the file says nothing."""
        for name, value in values.items():
            if name == "num_train_epochs" and int(self.ours.get("max_steps") or -1) > 0:
                continue
            self.ours.setdefault(name, value)


def listed(value: Any) -> list[str]:
    """Names in a list, or with commas between them."""
    if value is None:
        return []
    return (
        [str(item) for item in value]
        if isinstance(value, list)
        else [item.strip() for item in str(value).split(",") if item.strip()]
    )


def one_or_all(items: list[Any]) -> Any:
    """One is itself."""
    return items[0] if len(items) == 1 else items


def _is_off(value: Any) -> bool:
    return value in (False, [], {}) or str(value).strip().lower() in NO
