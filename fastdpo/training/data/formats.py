"""Rows of every kind, as texts and numbers: pairs, single answers, lists, and answers in pieces.

``prompt`` is a string or a list of messages; answers are strings behind the one and messages behind the
other. Pieces are strings in either case: one behind the other they are the answer, or the assistant's
message. A pair without ``prompt`` has for one what chosen and rejected share at their start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastdpo.training.data.images import IMAGES_REJECTED
from fastdpo.training.data.messages import is_list
from fastdpo.training.data.numbers import (
    check_finite,
    read_columns,
    read_number,
    read_numbers,
)
from fastdpo.training.data.scores import ScoreRules, read_scores
from fastdpo.training.data.texts import RowTexts, TextReader
from fastdpo.training.settings.kinds import PAIRS, DataKind
from fastdpo.training.settings.row_checks import BadRow, Finding

_SIDES = {"chosen": True, "rejected": False}
# Numbers that are called otherwise than the columns that they are from.
_COLUMNS = {"is_desirable": "label", "win_rates": "win_rate"}


@dataclass(frozen=True)
class Wanted:
    """What the losses of a run ask of their data.

    Args:
        kind: of the data.
        gold_column: of third, gold answers of pairs, which are bound to ``max_length`` like the others.
        list_size: how many candidates a list must have; None for any number from two.
        scores: what the losses ask of scores; None: they use none.
        has_mismatched: whether rows come with another row's answer.
    """

    kind: DataKind = PAIRS
    gold_column: str | None = None
    list_size: int | None = None
    scores: ScoreRules | None = field(default_factory=ScoreRules)
    has_mismatched: bool = False

    @property
    def pair_columns(self) -> tuple[str, ...]:
        """Columns of a pair's answers."""
        return (*_SIDES, *([] if self.gold_column is None else [self.gold_column]))


@dataclass(frozen=True)
class RowReader:
    """Reads rows.

    Args:
        texts: reads their texts.
        wanted: by the losses.
        columns: further numbers per row to read: name in the result -> name of the row's column.
        two_views: rows with ``images_rejected`` make a pair of two texts and one of two views.
    """

    texts: TextReader
    wanted: Wanted
    columns: Mapping[str, str]
    two_views: bool = False

    @property
    def kind(self) -> DataKind:
        """Of the data."""
        return self.wanted.kind

    def used(self, names: Sequence[str]) -> tuple[str, ...]:
        """Which of the columns named are read, beside those of all kinds."""
        if self.kind.is_paired:
            return self.wanted.pair_columns
        if self.kind.name in ("unpaired", "prompt-completion") and "completion" not in names:
            return tuple(_SIDES)[: 2 if self.kind.name == "unpaired" or not self.texts.has_prompts else 1]
        if self.wanted.scores is None:
            return tuple(name for name in self.kind.columns if name != "scores")
        return (*self.kind.columns, "ranks") if "scores" in self.kind.columns else self.kind.columns

    def render(self, row: Mapping[str, Any], number: int) -> Iterator[RowTexts | BadRow]:
        """Check one row and render it; of a pair, given where single answers are wanted, both answers (where
        nothing is said of them, the chosen one). A part that nothing can be learnt from is its ``BadRow``.

        Raises:
            ValueError: the row has not the columns of its kind, or not the right things in them; names the
                row, the column, what was got and wanted.
        """
        if self.two_views and row.get(IMAGES_REJECTED):
            yield self._attempt({**row, IMAGES_REJECTED: None}, number)
            yield self._of_two_views(row, number)
            return
        is_pair = "completion" not in row and set(_SIDES) <= set(row)
        if not is_pair or self.kind.name not in ("unpaired", "prompt-completion"):
            yield self._attempt(row, number)
            return
        sides = [side for side in _SIDES if side == "chosen" or self.kind.name == "unpaired"]
        if row.get("prompt") is None:
            yield from self._taken_apart(row, number, sides)
            return
        for side in sides:
            yield self._attempt({**row, "label": _SIDES[side]}, number, side)

    def _of_two_views(self, row: Mapping[str, Any], number: int) -> RowTexts | BadRow:
        """The chosen answer over itself, each with its own images in the prompt."""
        pair = self._attempt({**row, "rejected": row.get("chosen")}, number)
        if isinstance(pair, RowTexts) and any(ref.path[0] == "rejected" for ref in pair.images[1]):
            return BadRow("image_places", "an answer has some of its own, which no two views are made of")
        return pair

    def _attempt(self, row: Mapping[str, Any], number: int, name: str = "completion") -> RowTexts | BadRow:
        try:
            return self._render(row, number, name)
        except BadRow as bad:
            return bad

    def _taken_apart(
        self, row: Mapping[str, Any], number: int, sides: list[str]
    ) -> Iterator[RowTexts | BadRow]:
        """Answers of a pair whose prompt is what they share."""
        numbers = read_columns(row, self.columns, self.texts.where(number))
        try:
            check_finite(numbers, self.columns)
            pair = self.texts.read(row, number, {side: row[side] for side in _SIDES}, numbers)
        except BadRow as bad:
            yield bad
            return
        for place, side in enumerate(sides):
            own = {"is_desirable": float(_SIDES[side])} if self.kind.name == "unpaired" else {}
            yield replace(
                pair,
                answers=pair.answers[place : place + 1],
                cuts=pair.cuts[place : place + 1],
                images=pair.images[place : place + 1],
                numbers={**own, **numbers},
            )

    def _render(self, row: Mapping[str, Any], number: int, name: str) -> RowTexts:
        """Of a row with one answer, ``name`` is its column."""
        if self.kind.is_paired:
            return self._pair(row, number)
        where = self.texts.where(number)
        prompt = self._column(row, "prompt", where)
        notes: list[Finding] = []
        answers: dict[str, Any]
        pieces: tuple[str, ...] = ()
        if self.kind.name == "listwise":
            found = self._list(row, "completions", where)
            if self.wanted.list_size is not None and len(found) != self.wanted.list_size:
                wanted = f"got {len(found)}, wanted {self.wanted.list_size}"
                raise ValueError(f"{where}: column 'completions': {wanted}")
            answers = {f"answer {place}": answer for place, answer in enumerate(found, start=1)}
        elif self.kind.has_pieces:
            pieces = self._pieces(row, prompt, where, notes)
            text = "".join(pieces)
            answers = {
                "completion": text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            }
        else:
            answers = {name: self._column(row, name, where)}
        numbers = self._numbers(row, len(pieces) if self.kind.has_pieces else len(answers), where)
        numbers |= read_columns(row, self.columns, where)
        scores_of = {} if "scores" in row else {"scores": "ranks"}
        check_finite(numbers, {**_COLUMNS, **scores_of, **self.columns})
        if self.kind.name in ("listwise", "ranking") and max(len(answers), len(pieces)) == 1:
            raise BadRow("one_candidate")
        scores = numbers.get("scores")
        if (
            self.wanted.scores is not None
            and isinstance(scores, tuple)
            and self.wanted.scores.are_flat(scores)
        ):
            raise BadRow("one_level")
        texts = self.texts.read(row, number, answers, numbers)
        cuts = (_piece_ends(texts, pieces),) if pieces else texts.cuts
        return replace(texts, cuts=cuts, findings=tuple(dict.fromkeys((*texts.findings, *notes))))

    def _pair(self, row: Mapping[str, Any], number: int) -> RowTexts:
        where, names = self.texts.where(number), self.wanted.pair_columns
        for name in names:
            if name not in row:
                raise ValueError(
                    f"{where}: no column {name!r}; got {sorted(row)}, wanted {', '.join(names)} and (unless "
                    "it is their common start) prompt"
                )
        numbers = read_columns(row, self.columns, where)
        check_finite(numbers, self.columns)
        return self.texts.read(row, number, {name: row[name] for name in names}, numbers)

    def _pieces(
        self, row: Mapping[str, Any], prompt: Any, where: str, notes: list[Finding]
    ) -> tuple[str, ...]:
        pieces = tuple(self._list(row, "completion", where))
        if not all(isinstance(piece, str) for piece in pieces):
            raise ValueError(f"{where}: column 'completion': got {pieces!r:.80}, wanted a list of strings")
        if not pieces or not "".join(pieces):
            raise BadRow("empty_completion")
        if not all(pieces):
            raise BadRow("empty_piece")
        if isinstance(prompt, str):
            pieces = (*self.texts.without_echo(prompt, pieces[:1], notes), *pieces[1:])
        return pieces

    def _column(self, row: Mapping[str, Any], name: str, where: str) -> Any:
        if name not in row:
            raise ValueError(
                f"{where}: no column {name!r}: got {sorted(row)}, wanted {', '.join(self.kind.columns)} "
                f"({self.kind.name} data, as the losses ask for)"
            )
        return row[name]

    def _list(self, row: Mapping[str, Any], name: str, where: str) -> list[Any]:
        value = self._column(row, name, where)
        if value is None:
            raise BadRow("no_text", f"column {name!r} is null")
        if not is_list(value):
            raise ValueError(f"{where}: column {name!r}: got {type(value).__name__}, wanted a list")
        return list(value)

    def _numbers(
        self, row: Mapping[str, Any], count: int, where: str
    ) -> dict[str, float | tuple[float, ...]]:
        """What the kind's losses use; NaN where a number is missing."""
        kind = self.kind.name
        if kind == "unpaired":
            label = self._column(row, "label", where)
            if isinstance(label, str):  # as CSV has it
                label = {"true": True, "false": False}.get(label.strip().lower(), label)
            if label is not None and not isinstance(label, bool):
                raise ValueError(f"{where}: column 'label': got {label!r}, wanted true or false")
            return {"is_desirable": math.nan if label is None else float(label)}
        if kind == "samples":
            rate = self._column(row, "win_rate", where)
            return {"win_rates": read_number(rate, "win_rate", "win_rate", where)}
        if kind == "steps":
            return {
                "advantages": read_numbers(self._column(row, "advantages", where), "advantages", count, where)
            }
        if self.wanted.scores is None or kind not in ("listwise", "ranking"):
            return {}

        def read(name: str) -> tuple[float, ...]:
            return read_numbers(self._column(row, name, where), name, count, where)

        return {"scores": read_scores(row, read, where, self.wanted.scores)}


def _piece_ends(texts: RowTexts, pieces: tuple[str, ...]) -> tuple[str, ...]:
    """The answer up to the end of each piece but the last.

    Raises:
        BadRow: the template changes the answer's text, so where its pieces end is not known.
    """
    ends = [texts.prompt + "".join(pieces[: count + 1]) for count in range(len(pieces) - 1)]
    if ends and not texts.answers[0].startswith(ends[-1]):
        raise BadRow("pieces_lost")
    return tuple(ends)
