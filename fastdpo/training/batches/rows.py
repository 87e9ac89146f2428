"""Rows without padding: sequences one after the other, or a prompt once with all its answers behind it.

A *unit* is a prompt and one or more answers, each a branch that continues the prompt: an answer's
positions go on from the prompt's, whatever lies between. Of every token of a row it is written down

* ``position_ids``: its place in its own sequence;
* ``documents``: its unit (-1 is padding);
* ``branches``: 0 for a prompt (and for a unit of one answer, which is plain text), k for its k-th answer.

A token sees those before it of its own document that are of its own branch or of branch 0
(``integrations/row_masks.py``). Where every unit has one answer, positions say all there is to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.types import TokenLayout

PADDING = -1


@dataclass(frozen=True)
class Unit:
    """A prompt ``(m,)`` and its answers, with the number of the sequence that each makes with the prompt.

    ``prompt_sequence`` is the number of one that the prompt's own tokens make, where they are labelled too,
    with those of the first answer that are not scored. ``scored`` says of each answer which are, bool; None:
    all.
    """

    prompt: Tensor
    answers: tuple[Tensor, ...]
    sequences: tuple[int, ...]
    prompt_sequence: int | None = None
    scored: tuple[Tensor | None, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the unit in a row."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def has_branches(self) -> bool:
        """Whether answers have to be kept from seeing each other."""
        return len(self.answers) > 1


@dataclass(frozen=True)
class Rows:
    """Inputs of the backbone's calls, and the labelled tokens over all of them.

    Args:
        calls: each ``input_ids``, ``position_ids`` ``(R, T)`` int64 and, where units have branches,
            ``documents`` and ``branches`` ``(R, T)`` int64.
        tokens: the labelled tokens, sequence after sequence; with ``lengths``.
    """

    calls: tuple[dict[str, Tensor], ...]
    tokens: TokenLayout


def build_rows(
    units: Sequence[Unit],
    calls: Sequence[Sequence[int]],
    *,
    num_sequences: int,
    is_one_row: bool,
    pad_token_id: int,
    multiple_of: int = 1,
) -> Rows:
    """Lay units out in rows.

    Args:
        calls: units of each call, each of them once: in one row (``is_one_row``) or a row each.
        num_sequences: 2P, or with third ones 3P; each unit names its own.
    """
    token_index: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * num_sequences
    target_ids: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * num_sequences
    inputs, offset = [], 0
    for call in calls:
        rows = [list(call)] if is_one_row else [[place] for place in call]
        longest = max((sum(units[place].length for place in row) for row in rows), default=1)
        length = -(-max(longest, 1) // multiple_of) * multiple_of
        table = _Table(len(rows), length, pad_token_id)
        for number, row in enumerate(rows):
            start = 0
            for document, place in enumerate(row):
                table.write(number, start, document, units[place])
                for sequence, at, targets in _predictions(units[place]):
                    token_index[sequence] = at + (offset + number * length + start)
                    target_ids[sequence] = targets
                start += units[place].length
            table.close_row(number, start, goes_on=len(row) == 1)
        inputs.append(table.inputs(any(units[place].has_branches for place in call)))
        offset += len(rows) * length
    lengths = tuple(map(len, target_ids))
    layout = TokenLayout(
        torch.cat(token_index),
        torch.cat(target_ids),
        torch.repeat_interleave(torch.arange(num_sequences), torch.tensor(lengths, dtype=torch.int64)),
        lengths,
    )
    return Rows(tuple(inputs), layout)


class _Table:
    """The tensors of one call, filled unit by unit."""

    def __init__(self, rows: int, length: int, pad_token_id: int) -> None:
        self.input_ids = torch.full((rows, length), pad_token_id)
        self.position_ids = torch.arange(length).repeat(rows, 1)
        self.documents = torch.full((rows, length), PADDING)
        self.branches = torch.zeros((rows, length), dtype=torch.int64)

    def write(self, row: int, start: int, document: int, unit: Unit) -> None:
        size = len(unit.prompt)
        place = slice(start, start + unit.length)
        self.input_ids[row, place] = torch.cat([unit.prompt, *unit.answers]).long()
        self.documents[row, place] = document
        self.position_ids[row, start : start + size] = torch.arange(size)
        at = start + size
        for number, answer in enumerate(unit.answers, start=1):
            place = slice(at, at + len(answer))
            self.position_ids[row, place] = torch.arange(size, size + len(answer))
            self.branches[row, place] = number if unit.has_branches else 0
            at += len(answer)

    def close_row(self, row: int, end: int, *, goes_on: bool) -> None:
        """Padding goes on where the row's one sequence ends, or is a sequence of its own after several."""
        if not goes_on:
            self.position_ids[row, end:] = torch.arange(self.position_ids.shape[1] - end)

    def inputs(self, has_branches: bool) -> dict[str, Tensor]:
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if has_branches:
            inputs |= {"documents": self.documents, "branches": self.branches}
        return inputs


def _predictions(unit: Unit) -> list[tuple[int, Tensor, Tensor]]:
    """Of each sequence: its number, the offsets that predict its tokens, and these tokens."""
    found, start = [], len(unit.prompt)
    # Without a prompt nothing predicts an answer's first token.
    first = 0 if start else 1
    scored = unit.scored or (None,) * len(unit.answers)
    others: tuple[Tensor, Tensor] | None = None
    for place, (sequence, answer, mask) in enumerate(zip(unit.sequences, unit.answers, scored, strict=True)):
        at = torch.arange(start - 1, start - 1 + len(answer))
        if len(answer):
            at[0] = len(unit.prompt) - 1  # every answer follows the prompt
        start += len(answer)
        at, targets = at[first:], answer[first:].long()
        if mask is not None:
            mask = mask[first:]
            others = (at[~mask], targets[~mask]) if place == 0 else others
            at, targets = at[mask], targets[mask]
        found.append((sequence, at, targets))
    if unit.prompt_sequence is not None and len(unit.prompt):
        at, targets = torch.arange(len(unit.prompt) - 1), unit.prompt[1:].long()
        if others is not None:
            at, targets = torch.cat([at, others[0]]), torch.cat([targets, others[1]])
        found.append((unit.prompt_sequence, at, targets))
    return found
