"""What a row of tokens is made of: segments, each of which continues another or begins a sequence.

A token sees the tokens of its own segment up to itself, and those of the segments on the path to it; nothing
else of the row. Its position counts along that path. A pair is a prompt with two segments below it, a list of
K answers has K, and a packed row is segments without parents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Span: TypeAlias = tuple[int, int]


class Piece(NamedTuple):
    """Tokens one behind the other in the row, each of which sees all that the one before it sees.

    Args:
        start, stop: their places in the row.
        spans: the places that the last of them sees, in the order of positions, itself included.
    """

    start: int
    stop: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Forest:
    """The segments of one row of tokens, in the row's order.

    Args:
        lengths: tokens of each segment, at least one.
        parents: of each segment the number of the one that it continues, which stands before it; -1 for none.

    Raises:
        ValueError: lengths and parents that are no forest; says which segment is wrong.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.parents) or not self.lengths:
            got = f"{len(self.lengths)} lengths and {len(self.parents)} parents"
            raise ValueError(f"forest: got {got}, wanted as many of both, and at least one")
        for number, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            if length < 1:
                raise ValueError(f"forest: got {length} tokens in segment {number}, wanted at least 1")
            if not -1 <= parent < number:
                raise ValueError(
                    f"forest: got parent {parent} of segment {number}, wanted -1 or a segment before it"
                )

    @classmethod
    def of_sequences(cls, lengths: Sequence[int]) -> Forest:
        """Sequences one behind the other that have nothing in common."""
        return cls(tuple(lengths), (-1,) * len(lengths))

    @property
    def num_tokens(self) -> int:
        """N, the tokens of the row."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each segment begins in the row."""
        return (0, *accumulate(self.lengths))[:-1]

    @cached_property
    def pasts(self) -> tuple[int, ...]:
        """Tokens before each segment on its path: the position of its first token."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + self.lengths[parent])
        return tuple(found)

    def path(self, segment: int) -> tuple[int, ...]:
        """The segments from the root to ``segment``, itself last; none for -1."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = self.parents[segment]
        return tuple(reversed(found))

    def places(self, segment: int) -> Tensor:
        """``(n,)`` int64: where the tokens on the path to the end of ``segment`` stand in the row."""
        parts = [torch.arange(*span) for span in self._spans(segment)]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])

    @property
    def position_ids(self) -> Tensor:
        """``(1, N)`` int64."""
        parts = [
            torch.arange(past, past + length) for past, length in zip(self.pasts, self.lengths, strict=True)
        ]
        return torch.cat(parts)[None]

    def pieces(self, start: int = 0, stop: int | None = None) -> tuple[Piece, ...]:
        """The tokens ``start`` to ``stop`` of the row, cut where a segment does not continue the last one."""
        stop = self.num_tokens if stop is None else stop
        found: list[Piece] = []
        for segment, parent in enumerate(self.parents):
            begin = max(self.starts[segment], start)
            end = min(self.starts[segment] + self.lengths[segment], stop)
            if begin >= end:
                continue
            spans = _merged([*self._spans(parent), (self.starts[segment], end)])
            if found and parent == segment - 1 and found[-1].stop == begin:
                begin = found.pop().start
            found.append(Piece(begin, end, spans))
        return tuple(found)

    def _spans(self, segment: int) -> list[Span]:
        return [(self.starts[s], self.starts[s] + self.lengths[s]) for s in self.path(segment)]

    @property
    def num_pairs(self) -> int:
        """Pairs of tokens of which one sees the other: what attention has to compute."""
        return sum(n * past + n * (n + 1) // 2 for n, past in zip(self.lengths, self.pasts, strict=True))


def _merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same places, with spans that touch made one."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)
