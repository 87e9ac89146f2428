"""How the sequences of a batch become rows of backbone calls: pure arithmetic, no tensor in sight.

A *unit* is what must stay in one row: a sequence (``packed``), or a prompt with its answers
(``shared_prompt``). Three arrangements compute the same numbers:

* ``separate``: one call per unit, a row of its own: no padding, no wasted attention, many calls;
* ``bucketed``: units of like length padded together, one call per bucket;
* ``one_row``: all units one after the other in one row of one call.

Costs are in *tokens*: the time of one token's matrix products in the backbone. A call of R rows of T
tokens costs ``call_tokens + R T + pair_tokens * (query-key products)``, R T times ``many_rows`` for R > 1.
A kernel that skips what is masked (variable-length flash attention, flex attention) computes about half of
each unit's square in any arrangement; one that takes a dense mask computes the whole square of the row,
which is why one long row loses on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fastdpo.training.settings.choices import ARRANGEMENTS

LAYOUTS = ("padded", "packed", "shared_prompt")
# Buckets wider than this are not looked at: the search stays linear in the number of units.
_WIDEST_BUCKET = 128


@dataclass(frozen=True)
class RowCosts:
    """What the planner knows of machine and model.

    Args:
        call_tokens: cost of a call that does not depend on its size, in tokens.
        pair_tokens: cost of one query-key product in all layers, in tokens.
        skips_masked: whether the attention kernel leaves masked blocks out.
        many_rows: what a token costs in a call of several rows; above 1 where larger activations fall out
            of the caches and nothing is won by doing them together.
    """

    call_tokens: float
    pair_tokens: float
    skips_masked: bool
    many_rows: float = 1.0

    def call(self, rows: int, length: int, products: float) -> float:
        """Cost of one call of ``rows`` rows of ``length`` tokens."""
        token = self.many_rows if rows > 1 else 1.0
        return self.call_tokens + rows * length * token + self.pair_tokens * products


@dataclass(frozen=True)
class RowPlan:
    """The rows of one batch.

    Args:
        layout: ``padded``, ``packed`` or ``shared_prompt``.
        arrangement: one of ``ARRANGEMENTS``.
        calls: the units of each call; those of ``one_row`` share a row, others have one each.
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
        units = sum(map(len, self.calls))
        kind = "prompts with their answers" if self.layout == "shared_prompt" else "sequences"
        lines = [
            f"{self.layout}, {self.arrangement}: {units} {kind} in {len(self.calls)} "
            f"call{'s' if len(self.calls) != 1 else ''} of the backbone",
            f"  {self.tokens} tokens, {self.padding} of them padding; predicted cost {self.cost:.0f} tokens",
        ]
        for name, why in self.rejected.items():
            lines.append(f"  {name}: " + (why if isinstance(why, str) else f"{why:.0f} tokens"))
        return "\n".join(lines)


def plan_rows(
    lengths: Sequence[int],
    costs: RowCosts,
    *,
    layout: str,
    arrangements: Sequence[str] = ARRANGEMENTS,
    single_call: bool = False,
    multiple_of: int = 1,
) -> RowPlan:
    """Arrange units of ``lengths`` tokens in rows, the cheapest way.

    Args:
        lengths: of the units, each at least 1.
        layout: ``packed`` or ``shared_prompt``; decides what a dense mask costs.
        arrangements: those that may be taken.
        single_call: the backbone may run only once a step.
        multiple_of: rows are padded to a multiple of this.

    Raises:
        ValueError: an arrangement that does not exist, or none that will do.
    """
    if unknown := set(arrangements) - set(ARRANGEMENTS):
        raise ValueError(f"arrangements: got {sorted(unknown)}, wanted some of {ARRANGEMENTS}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    padded = [_round_up(lengths[i], multiple_of) for i in order]
    # A sequence of its own needs no mask, and causal kernels compute half of its square.
    density = 0.5 if costs.skips_masked or layout != "shared_prompt" else 1.0

    def bucket_cost(start: int, end: int) -> float:
        length, rows = padded[start], end - start
        return costs.call(rows, length, rows * density * length * length)

    total = _round_up(sum(lengths), multiple_of)
    products = sum(0.5 * n * n for n in lengths) if costs.skips_masked else float(total) * total
    whole, single = [(0, len(order))], [(i, i + 1) for i in range(len(order))]
    buckets = whole if single_call else _cheapest_buckets(len(order), bucket_cost)
    candidates = {
        "separate": (single, sum(bucket_cost(*bounds) for bounds in single)),
        "bucketed": (buckets, sum(bucket_cost(*bounds) for bounds in buckets)),
        "one_row": (whole, costs.call(1, total, products)),
    }
    rejected: dict[str, float | str] = {name: cost for name, (_, cost) in candidates.items()}
    for name in ARRANGEMENTS:
        if name not in arrangements:
            rejected[name] = "not allowed"
        elif name == "separate" and single_call and len(order) > 1:
            rejected[name] = "needs several calls of the backbone, and only one is possible"
    allowed = [name for name in arrangements if not isinstance(rejected[name], str)]
    if not allowed:
        reasons = "; ".join(f"{name}: {rejected[name]}" for name in arrangements)
        raise ValueError(f"arrangements: got {tuple(arrangements)}, none of which will do: {reasons}")
    taken = min(allowed, key=lambda name: candidates[name][1])
    del rejected[taken]
    bounds, cost = candidates[taken]
    tokens = total if taken == "one_row" else sum((end - start) * padded[start] for start, end in bounds)
    # In one row the order changes nothing: units stay as they came.
    groups = [range(len(lengths))] if taken == "one_row" else [order[start:end] for start, end in bounds]
    calls = tuple(tuple(group) for group in groups)
    return RowPlan(layout, taken, calls, tokens, tokens - sum(lengths), cost, rejected)


def padded_cost(lengths: Sequence[int], costs: RowCosts, *, multiple_of: int = 1) -> float:
    """Predicted cost of sequences padded together, in tokens."""
    longest = _round_up(max(lengths), multiple_of)
    # Padding comes with a mask, which most kernels then compute densely.
    density = 0.5 if costs.skips_masked else 1.0
    return costs.call(len(lengths), longest, len(lengths) * density * longest * longest)


def unit_lengths(prompt: int, answers: Sequence[int], layout: str) -> list[int]:
    """Tokens of the units that a prompt and its answers make."""
    return [prompt + sum(answers)] if layout == "shared_prompt" else [prompt + n for n in answers]


def _cheapest_buckets(count: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut ``count`` units in order of length where the sum of the buckets' costs is least."""
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
