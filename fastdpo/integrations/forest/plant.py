"""Sequences that begin alike as trees: each token of a common beginning once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastdpo.integrations.forest.segments import Forest

# Beginnings of fewer tokens are not shared: a few tokens saved do not pay for an attention that starts behind
# them (a causal kernel computes half of a square, and one behind a beginning all of it).
SHORTEST_SHARED = 16


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments of which all but the first continue another.

    Args:
        segments: the token ids of each ``(n,)``, parents before children.
        parents: of each segment; -1 for the first.
        ends: of each sequence, by its number, the segment that it ends with.
    """

    segments: tuple[Tensor, ...]
    parents: tuple[int, ...]
    ends: dict[int, int]

    @cached_property
    def forest(self) -> Forest:
        """The tree alone in a row."""
        return Forest(tuple(map(len, self.segments)), self.parents)

    @property
    def num_tokens(self) -> int:
        """Distinct tokens: what a backbone computes."""
        return sum(map(len, self.segments))


@dataclass(eq=False)
class _Node:
    """A segment while its tree grows. No two children of a node begin with the same ``shortest`` tokens."""

    ids: Tensor
    children: dict[bytes, _Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)


def plant(sequences: Sequence[tuple[int, Tensor]], *, shortest: int = SHORTEST_SHARED) -> list[Tree]:
    """The trees of some sequences, in the order of their first ones.

    Args:
        sequences: number and token ids ``(n,)`` of each; those without tokens are in no tree.
        shortest: common beginnings of fewer tokens are not shared, unless a sequence is a whole beginning of
            another's.
    """
    roots: dict[bytes, _Node] = {}
    for number, ids in sequences:
        if len(ids):
            _insert(roots, number, torch.as_tensor(ids), shortest)
    return [_flattened(root) for root in roots.values()]


def distinct_tokens(sequences: Iterable[Tensor]) -> int:
    """How many tokens a backbone computes of sequences ``(n,)`` in one row: common beginnings once."""
    return sum(tree.num_tokens for tree in plant(list(enumerate(sequences))))


def _insert(children: dict[bytes, _Node], number: int, ids: Tensor, shortest: int) -> None:
    """Walk down as far as the tokens agree, cut the last segment there, and hang the rest below."""
    while True:
        node = children.get(_key(ids, shortest)) or _short_beginning(children, ids, shortest)
        if node is None:
            children[_key(ids, shortest)] = _Node(ids, ends=[number])
            return
        common = _common(node.ids, ids)
        if common < len(node.ids):
            rest = node.ids[common:]
            below = _Node(rest, node.children, node.ends)
            node.ids, node.ends = node.ids[:common], []
            node.children = {_key(rest, shortest): below}
        if common == len(ids):
            node.ends.append(number)
            return
        children, ids = node.children, ids[common:]


def _short_beginning(children: dict[bytes, _Node], ids: Tensor, shortest: int) -> _Node | None:
    """A child of fewer tokens than ``shortest`` that ``ids`` goes on behind; its key is another's."""
    short = (node for node in children.values() if len(node.ids) < min(shortest, len(ids)))
    return next((node for node in short if _common(node.ids, ids) == len(node.ids)), None)


def _key(ids: Tensor, shortest: int) -> bytes:
    """Equal exactly where the first ``shortest`` tokens are, or all of two that have fewer."""
    return ids[:shortest].to(torch.int64).numpy().tobytes()


def _common(first: Tensor, second: Tensor) -> int:
    """With how many equal tokens two sequences begin."""
    size = min(len(first), len(second))
    differs = (first[:size] != second[:size]).numpy()
    return int(differs.argmax()) if differs.any() else size


def _flattened(root: _Node) -> Tree:
    segments: list[Tensor] = []
    parents: list[int] = []
    ends: dict[int, int] = {}
    waiting = [(root, -1)]
    while waiting:
        node, parent = waiting.pop()
        place = len(segments)
        segments.append(node.ids)
        parents.append(parent)
        ends |= dict.fromkeys(node.ends, place)
        # The last one in is the first one out: the first child stands right behind its parent.
        waiting += [(child, place) for child in reversed(node.children.values())]
    return Tree(tuple(segments), tuple(parents), ends)
