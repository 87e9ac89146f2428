"""A rule as judge: whether an answer ends with the right number. Used by ``irpo.yaml``."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(prompts: list[Any], completions: list[Any], answer: list[Any]) -> list[float]:
    """1 where the last number of an answer is the last one of the data's column ``answer``, else 0."""
    return [
        float(_last(_text(completion)) is not None and _last(_text(completion)) == _last(str(wanted)))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _last(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
