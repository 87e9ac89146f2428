"""How the sequences of a batch become rows of backbone calls: pure arithmetic, no tensor in sight.

A *tree* is what must stay in one row: a sequence (``packed``), or sequences that begin alike
(``shared_prompt``). Three arrangements compute the same numbers:

* ``separate``: a call for each tree, in a row of its own: no padding, many calls;
* ``bucketed``: sequences of like length padded together, one call per bucket;
* ``one_row``: all trees one after the other in the one row of one call.

Costs are in *tokens*: the time of one token's matrix products in the backbone. A call of T tokens costs
``call_tokens + T + pair_tokens * (pairs of tokens that attention computes)``, its T times ``large_call``
where it holds more than one tree. Attention over a forest computes the pairs of which one sees the other;
that of padded rows half of their squares, or all of them where a mask is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastdpo.training.settings.choices import ARRANGEMENTS

LAYOUTS = ("padded", "packed", "shared_prompt")
# Buckets wider than this are not looked at: the search stays linear in the number of trees.
_WIDEST_BUCKET = 128


class TreeSize(NamedTuple):
    """What a tree costs: its distinct tokens, the pairs of them that see each other, and its segments."""

    tokens: int
    pairs: float
    segments: int = 1

    @classmethod
    def of_sequence(cls, tokens: int) -> TreeSize:
        """A sequence alone."""
        return cls(tokens, 0.5 * tokens * tokens)


@dataclass(frozen=True)
class RowCosts:
    """What the planner knows of machine and model.

    Args:
        call_tokens: cost of a call that does not depend on its size, in tokens.
        pair_tokens: cost of one query-key product in all layers, in tokens.
        skips_masked: whether the attention kernel leaves out what padding hides.
        large_call: what a token costs in a call of several trees; above 1 where larger activations fall out
            of the caches and nothing is won by doing them together.
    """

    call_tokens: float
    pair_tokens: float
    skips_masked: bool
    large_call: float = 1.0

    def call(self, trees: int, tokens: int, pairs: float) -> float:
        """Cost of one call of so many trees, of ``tokens`` tokens together."""
        token = self.large_call if trees > 1 else 1.0
        return self.call_tokens + tokens * token + self.pair_tokens * pairs


@dataclass(frozen=True)
class RowPlan:
    """The rows of one batch.

    Args:
        layout: ``padded``, ``packed`` or ``shared_prompt``.
        arrangement: one of ``ARRANGEMENTS``.
        calls: the trees of each call; those of ``one_row`` share a row, others have one each.
        tokens: positions that the backbone computes, padding included.
        padding: how many of them are padding.
        cost: predicted, in tokens.
        rejected: predicted cost of each arrangement that was not taken, or why it could not be.
    """

    layout: str
    arrangement: str
    calls: tuple[tuple[int, ...], ...]
    tokens: int
    padding: int
    cost: float
    rejected: Mapping[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        trees = sum(map(len, self.calls))
        kind = "trees of sequences that begin alike" if self.layout == "shared_prompt" else "sequences"
        lines = [
            f"{self.layout}, {self.arrangement}: {trees} {kind} in {len(self.calls)} "
            f"call{'s' if len(self.calls) != 1 else ''} of the backbone",
            f"  {self.tokens} tokens, {self.padding} of them padding; predicted cost {self.cost:.0f} tokens",
        ]
        for name, why in self.rejected.items():
            lines.append(f"  {name}: " + (why if isinstance(why, str) else f"{why:.0f} tokens"))
        return "\n".join(lines)


def plan_rows(
    trees: Sequence[TreeSize],
    costs: RowCosts,
    *,
    layout: str,
    arrangements: Sequence[str] = ARRANGEMENTS,
    single_call: bool = False,
    multiple_of: int = 1,
) -> RowPlan:
    """Arrange trees in rows, the cheapest way.

    Args:
        trees: each of at least one token.
        layout: ``packed`` or ``shared_prompt``.
        arrangements: those that may be taken.
        single_call: the backbone may run only once a step.
        multiple_of: rows are padded to a multiple of this.

    Raises:
        ValueError: an arrangement that does not exist, or none that will do.
    """
    if unknown := set(arrangements) - set(ARRANGEMENTS):
        raise ValueError(f"arrangements: got {sorted(unknown)}, wanted some of {ARRANGEMENTS}")
    order = sorted(range(len(trees)), key=lambda i: (-trees[i].tokens, i))
    padded = [_round_up(trees[i].tokens, multiple_of) for i in order]

    def bucket_cost(start: int, end: int) -> float:
        length, rows = padded[start], end - start
        return costs.call(rows, rows * length, rows * 0.5 * length * length)

    count = sum(tree.tokens for tree in trees)
    total = _round_up(count, multiple_of)
    whole, single = [(0, len(order))], [(i, i + 1) for i in range(len(order))]
    buckets = whole if single_call else _cheapest_buckets(len(order), bucket_cost)
    alone = sum(costs.call(1, length, trees[i].pairs) for i, length in zip(order, padded, strict=True))
    candidates = {
        "separate": (single, alone),
        "bucketed": (buckets, sum(bucket_cost(*bounds) for bounds in buckets)),
        "one_row": (whole, costs.call(len(trees), total, sum(tree.pairs for tree in trees))),
    }
    rejected: dict[str, float | str] = {name: cost for name, (_, cost) in candidates.items()}
    for name in ARRANGEMENTS:
        if name not in arrangements:
            rejected[name] = "not allowed"
        elif name == "separate" and single_call and len(order) > 1:
            rejected[name] = "needs several calls of the backbone, and only one is possible"
        elif name == "bucketed" and any(tree.segments > 1 for tree in trees):
            rejected[name] = "pads sequences, and here some share their beginning"
    allowed = [name for name in arrangements if not isinstance(rejected[name], str)]
    if not allowed:
        reasons = "; ".join(f"{name}: {rejected[name]}" for name in arrangements)
        raise ValueError(f"arrangements: got {tuple(arrangements)}, none of which will do: {reasons}")
    taken = min(allowed, key=lambda name: candidates[name][1])
    del rejected[taken]
    bounds, cost = candidates[taken]
    tokens = total if taken == "one_row" else sum((end - start) * padded[start] for start, end in bounds)
    # In one row the order changes nothing: trees stay as they came.
    groups = [range(len(trees))] if taken == "one_row" else [order[start:end] for start, end in bounds]
    calls = tuple(tuple(group) for group in groups)
    return RowPlan(layout, taken, calls, tokens, tokens - count, cost, rejected)


def padded_cost(lengths: Sequence[int], costs: RowCosts, *, multiple_of: int = 1) -> float:
    """Predicted cost of sequences padded together, in tokens."""
    longest = _round_up(max(lengths), multiple_of)
    # Padding comes with a mask, which most kernels then compute densely.
    density = 0.5 if costs.skips_masked else 1.0
    return costs.call(len(lengths), len(lengths) * longest, len(lengths) * density * longest * longest)


def _cheapest_buckets(count: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut ``count`` trees in order of length where the sum of the buckets' costs is least."""
    best = [0.0] + [float("inf")] * count
    start_of = [0] * (count + 1)
    for end in range(1, count + 1):
        for start in range(max(0, end - _WIDEST_BUCKET), end):
            value = best[start] + cost(start, end)
            if value < best[end]:
                best[end], start_of[end] = value, start
    bounds, end = [], count
    while end > 0:
        bounds.append((start_of[end], end))
        end = start_of[end]
    return bounds[::-1]


def _round_up(value: int, multiple_of: int) -> int:
    return -(-value // multiple_of) * multiple_of
