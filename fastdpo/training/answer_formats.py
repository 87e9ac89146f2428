"""Rows of the kinds beside pairs, as texts and numbers: single answers, lists, and answers in pieces.

``prompt`` is a string or a list of messages; answers are strings behind the one and messages behind the
other. Pieces are strings in either case: one behind the other they are the answer, or the assistant's
message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.training.formats import check_messages, has_content, read_number, render_chat
from fastdpo.training.kinds import DataKind
from fastdpo.training.scores import ScoreRules, read_scores

EMPTY, NOT_FINITE = "an empty completion", "a number that is missing or not finite"
ONE_CANDIDATE = "one candidate"


@dataclass(frozen=True)
class AnswerTexts:
    """One row as text; chat texts already hold every special token, plain ones do not.

    Args:
        answers: prompt included.
        beginnings: prompt included, the answer up to the end of each piece but the last.
        numbers: what the kind's losses use: a number, or one for each answer or piece.
        problem: why nothing can be learnt from the row.
    """

    row: int
    prompt: str
    answers: tuple[str, ...]
    beginnings: tuple[str, ...]
    is_chat: bool
    numbers: Mapping[str, float | tuple[float, ...]]
    problem: str | None


def render_answers(
    row: Mapping[str, Any],
    number: int,
    source: str,
    tokenizer: Any,
    kind: DataKind,
    columns: Mapping[str, str],
    *,
    list_size: int | None = None,
    scores: ScoreRules | None = None,
) -> list[AnswerTexts]:
    """Check one row and render it; of a pair, given where single answers are wanted, both answers (where
    nothing is said of them, the chosen one).

    Args:
        columns: further numbers per row to read: name in the result -> name of the row's column.
        list_size: how many candidates there must be.
        scores: what the losses ask of scores; None: they use none.

    Raises:
        ValueError: the row has not the columns of its kind, or not the right things in them; names the row,
            the column, what was got and wanted.
    """
    where = f"{source}, row {number}"
    is_pair = "completion" not in row and {"chosen", "rejected"} <= set(row)
    if kind.name == "unpaired" and is_pair:
        sides = (("chosen", True), ("rejected", False))
        singles = [{**row, "completion": row[side], "label": label} for side, label in sides]
    elif kind.name == "prompt-completion" and is_pair:
        singles = [{**row, "completion": row["chosen"]}]
    else:
        singles = [dict(row)]
    return [_render(single, number, where, tokenizer, kind, columns, list_size, scores) for single in singles]


def _render(
    row: Mapping[str, Any],
    number: int,
    where: str,
    tokenizer: Any,
    kind: DataKind,
    columns: Mapping[str, str],
    list_size: int | None,
    scores: ScoreRules | None,
) -> AnswerTexts:
    prompt = _column(row, "prompt", where, kind)
    pieces: tuple[str, ...] = ()
    if kind.name == "listwise":
        answers = _list(row, "completions", where, kind)
        if list_size is not None and len(answers) != list_size:
            raise ValueError(f"{where}: column 'completions': got {len(answers)}, wanted {list_size}")
    elif kind.has_pieces:
        pieces = tuple(_list(row, "completion", where, kind))
        if not all(isinstance(piece, str) for piece in pieces):
            raise ValueError(f"{where}: column 'completion': got {pieces!r:.80}, wanted a list of strings")
        text = "".join(pieces)
        answers = [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]]
    else:
        answers = [_column(row, "completion", where, kind)]
    numbers = _numbers(row, kind, len(pieces) if pieces else len(answers), where, scores)
    numbers |= {name: read_number(row, name, column, where) for name, column in columns.items()}
    opened, texts, is_chat = _texts(row, prompt, answers, where, tokenizer)
    beginnings = _beginnings(opened, pieces, texts, where) if pieces else ()
    problem = _problem(kind, answers, pieces, numbers)
    if problem is None and scores is not None and "scores" in numbers:
        problem = scores.problem(numbers["scores"])  # type: ignore[arg-type]
    return AnswerTexts(number, opened, tuple(texts), beginnings, is_chat, numbers, problem)


def _column(row: Mapping[str, Any], name: str, where: str, kind: DataKind) -> Any:
    value = row.get(name)
    if value is None:
        raise ValueError(
            f"{where}: no column {name!r}: got {sorted(row)}, wanted {', '.join(kind.columns)} "
            f"({kind.name} data, as the losses ask for)"
        )
    return value


def _may_be_null(row: Mapping[str, Any], name: str, where: str, kind: DataKind) -> Any:
    """A column that is there; null in a row is a number that is missing, not a column."""
    return row[name] if name in row else _column(row, name, where, kind)


def _list(row: Mapping[str, Any], name: str, where: str, kind: DataKind) -> list[Any]:
    value = _column(row, name, where, kind)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{where}: column {name!r}: got {type(value).__name__}, wanted a list")
    return list(value)


def _texts(
    row: Mapping[str, Any], prompt: Any, answers: Sequence[Any], where: str, tokenizer: Any
) -> tuple[str, list[str], bool]:
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, [prompt + answer for answer in answers], False
    named = {f"answer {place}": answer for place, answer in enumerate(answers, start=1)}
    check_messages({"prompt": prompt, **named}, where)
    if not answers:
        return "", [], True
    return *render_chat(row, prompt, answers, where, tokenizer), True


def _beginnings(opened: str, pieces: Sequence[str], texts: Sequence[str], where: str) -> tuple[str, ...]:
    """The answer up to the end of each piece but the last."""
    ends = [opened + "".join(pieces[: count + 1]) for count in range(len(pieces) - 1)]
    if ends and not texts[0].startswith(ends[-1]):
        raise ValueError(
            f"{where}: the chat template changes the answer's text, so where its pieces end is not known: "
            "use a template that leaves it as it is, or give strings"
        )
    return tuple(ends)


def _numbers(
    row: Mapping[str, Any], kind: DataKind, count: int, where: str, scores: ScoreRules | None
) -> dict[str, float | tuple[float, ...]]:
    """What the kind's losses use; NaN where a number is missing."""
    if kind.name == "unpaired":
        label = _may_be_null(row, "label", where, kind)
        if label is not None and not isinstance(label, bool):
            raise ValueError(f"{where}: column 'label': got {label!r}, wanted true or false")
        return {"is_desirable": math.nan if label is None else float(label)}
    if kind.name == "samples":
        rate = _number(_may_be_null(row, "win_rate", where, kind), "win_rate", where)
        if not math.isnan(rate) and not 0 <= rate <= 1:
            raise ValueError(f"{where}: column 'win_rate': got {rate!r}, wanted a number from 0 to 1")
        return {"win_rates": rate}
    if kind.name == "steps":
        return {"advantages": _per_answer(row, "advantages", count, where, kind)}
    if scores is None or kind.name not in ("listwise", "ranking"):
        return {}
    return {
        "scores": read_scores(row, lambda name: _per_answer(row, name, count, where, kind), where, scores)
    }


def _per_answer(
    row: Mapping[str, Any], name: str, count: int, where: str, kind: DataKind
) -> tuple[float, ...]:
    if name in row and row[name] is None:
        return (math.nan,) * count
    values = _list(row, name, where, kind)
    if len(values) != count:
        raise ValueError(f"{where}: column {name!r}: got {len(values)} numbers, wanted {count}")
    return tuple(_number(value, name, where) for value in values)


def _number(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: column {name!r}: got {value!r}, wanted a number")
    return float(value)


def _problem(
    kind: DataKind, answers: Sequence[Any], pieces: Sequence[str], numbers: Mapping[str, Any]
) -> str | None:
    """Why nothing can be learnt from a row, as far as its texts say."""
    flat = [x for value in numbers.values() for x in (value if isinstance(value, tuple) else (value,))]
    if not all(map(math.isfinite, flat)):
        return NOT_FINITE
    if not answers or not all(
        answer if isinstance(answer, str) else has_content(answer) for answer in answers
    ):
        return EMPTY
    if kind.has_pieces and not all(pieces):
        return "an empty piece"
    if kind.name in ("listwise", "ranking") and max(len(answers), len(pieces)) < 2:
        return ONE_CANDIDATE
    return None
