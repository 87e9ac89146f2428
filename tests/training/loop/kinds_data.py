"""Rows of every kind of data, made from real ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import SHARED_DATA

# A loss of each kind of data.
LOSS_OF_KIND = {
    "unpaired": "kto",
    "listwise": "sdpo",
    "ranking": "in_context_ranking",
    "steps": "direct_advantage",
    "samples": "nash_md",
}


# What attention costs grows with the square of it.
CHARACTERS = 80


def real_rows(name: str, count: int, characters: int = CHARACTERS) -> list[dict[str, Any]]:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"no {path.name}: the real preference data are not here")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [shortened(json.loads(line), characters) for line in lines[:count]]


def shortened(row: dict[str, Any], characters: int) -> dict[str, Any]:
    """The last question, and the first characters of each text: models here are small, and tests short."""

    def text(value: Any) -> str:
        return (value if isinstance(value, str) else value[-1]["content"])[:characters]

    def messages(role: str, value: Any) -> list[dict[str, str]]:
        return [{"role": role, "content": text(value)}]

    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return {name: messages(roles[name], value) if name in roles else value for name, value in row.items()}


def rows_of(kind: str, count: int, characters: int = CHARACTERS) -> list[dict[str, Any]]:
    """Real rows in the format of a kind of data."""
    if kind == "unpaired":
        return real_rows("unpaired_en.jsonl", count, characters)
    pairs = real_rows("preference_en.jsonl", count, characters)
    return [_as_kind(kind, pair, place) for place, pair in enumerate(pairs)]


def _as_kind(kind: str, pair: dict[str, Any], place: int) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": pair["prompt"]}
    if kind == "listwise":
        # The prompt's own words are a third, worst answer in two rows of three.
        echo = [{"role": "assistant", "content": pair["prompt"][-1]["content"][:60]}]
        answers = [pair["rejected"], pair["chosen"], *([echo] if place % 3 else [])]
        return {**row, "completions": answers, "scores": [0.5, 2.0, -1.0][: len(answers)]}
    if kind == "samples":
        return {**row, "completion": pair["chosen"], "win_rate": (place % 5) / 4}
    words = pair["chosen"][0]["content"].split(" ")
    third = max(len(words) // 3, 1)
    pieces = [" ".join(words[:third]), *(" " + " ".join(words[i : i + third]) for i in (third, 2 * third))]
    pieces = [piece for piece in pieces if piece.strip()]
    if kind == "ranking":
        return {**row, "completion": pieces, "scores": [float((place + i) % 3) for i in range(len(pieces))]}
    return {**row, "completion": pieces, "advantages": [0.02 * (1 - i) for i in range(len(pieces))]}
