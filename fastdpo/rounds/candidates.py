"""What is judged: rows of a prompt with its answers, and what a judge may say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdpo.rounds.prompts import SAMPLED_COLUMNS
from fastdpo.training.data.messages import is_list, read_messages, says_something
from fastdpo.training.data.row_numbers import row_place
from fastdpo.training.settings.row_checks import BadRow


@dataclass(frozen=True, eq=False)
class Candidates:
    """One prompt's answers, as they were drawn.

    Args:
        number: of the row.
        where: how messages name it.
        prompt: a string or messages.
        answers: strings behind the one, messages behind the other.
        finished: of each, whether it came to its end.
        sources: of each, which model it is from.
        columns: the row's others.
    """

    number: int
    where: str
    prompt: Any
    answers: tuple[Any, ...]
    finished: tuple[bool, ...]
    sources: tuple[str, ...]
    columns: Mapping[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether the answers are messages."""
        return not isinstance(self.prompt, str)

    def is_empty(self, place: int) -> bool:
        """Whether an answer says nothing."""
        answer = self.answers[place]
        return not (says_something(answer) if self.is_chat else answer.strip())


def read_candidates(row: Mapping[str, Any], number: int, source: str) -> Candidates:
    """A row of ``fastdpo sample``, or one like it. Raises ValueError, naming the row, for anything else."""
    where = row_place(source, number)
    for name in ("prompt", "completions"):
        if row.get(name) is None:
            raise ValueError(
                f"{where}: got {sorted(row)}, wanted prompt and completions, as `fastdpo sample` writes them"
            )
    prompt, found = row["prompt"], row["completions"]
    if not is_list(found):
        raise ValueError(f"{where}: column 'completions': got {type(found).__name__}, wanted a list")
    is_chat = is_list(prompt)
    if not is_chat and not isinstance(prompt, str):
        raise ValueError(
            f"{where}: column 'prompt': got {type(prompt).__name__}, wanted a string or messages"
        )
    if any(is_list(answer) != is_chat or not (is_chat or isinstance(answer, str)) for answer in found):
        raise ValueError(
            f"{where}: column 'completions': wanted strings behind a string, or messages behind messages"
        )
    try:
        answers = tuple(read_messages(a, "completions", where, []) if is_chat else a for a in found)
        prompt = read_messages(prompt, "prompt", where, []) if is_chat else prompt
    except BadRow as error:
        raise ValueError(f"{where}: {error}") from None
    told: dict[str, list[Any]] = {"finished": [True] * len(found), "sources": ["policy"] * len(found)}
    for name, default in told.items():
        given = row.get(name)
        if given is not None and (not is_list(given) or len(given) != len(default)):
            raise ValueError(
                f"{where}: column {name!r}: wanted a list of {len(default)}, one for each answer"
            )
        told[name] = default if given is None else list(given)
    kept = {name: value for name, value in row.items() if name not in ("prompt", *SAMPLED_COLUMNS)}
    return Candidates(
        number, where, prompt, answers, tuple(map(bool, told["finished"])), tuple(told["sources"]), kept
    )


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one row's answers, those that were judged.

    Args:
        scores: of each answer; None where there is none.
        wins: ``wins[i][j]``: the probability that answer i is better than j, None where they did not meet;
            None for all of it where the judge gives scores.
    """

    scores: list[float | None]
    wins: list[list[float | None]] | None = None
