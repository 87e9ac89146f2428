"""Scores of a row's answers, or of an answer's items: read from scores or ranks, and held to the losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fastdpo.losses import LossSpec
from fastdpo.losses.list_scores import has_levels
from fastdpo.losses.ranges import Interval


@dataclass(frozen=True)
class ScoreRules:
    """What the losses of a run ask of scores, which all take higher for better.

    Args:
        legal: loss -> the only numbers it has a meaning for.
        must_differ: whether nothing can be learnt from a row whose scores are all the same.
    """

    legal: Mapping[str, Interval] = field(default_factory=dict)
    must_differ: bool = False

    @classmethod
    def of(cls, losses: Sequence[LossSpec]) -> ScoreRules | None:
        """The rules of losses of lists; None where none of them uses scores."""
        if all("scores" not in spec.needs for spec in losses):
            return None
        legal = {spec.name: spec.ranges["scores"] for spec in losses if "scores" in spec.ranges}
        return cls(legal, any(spec.counted is has_levels for spec in losses))

    def are_flat(self, scores: Sequence[float]) -> bool:
        """Whether nothing can be learnt from a row with these scores: they are all the same."""
        return self.must_differ and len(set(scores)) < 2

    def check(self, scores: Sequence[float], column: str, where: str) -> None:
        """Raise ValueError, naming row and column, for a score that a loss would misread. NaN is no score."""
        for name, legal in self.legal.items():
            for score in scores:
                if not math.isnan(score) and score not in legal:
                    raise ValueError(
                        f"{where}: column {column!r}: got a score of {score:g}, wanted {legal} for {name}"
                    )


def read_scores(
    columns: Mapping[str, object], read: Callable[[str], tuple[float, ...]], where: str, rules: ScoreRules
) -> tuple[float, ...]:
    """The scores of one row: its ``scores``, or n - rank of its n ``ranks``, of which 1 is the best.

    So the last of n has 0, and none is negative, as relevances must not be. NaN where one is missing.

    Args:
        columns: the row.
        read: the numbers of a column of it, one per answer or item.

    Raises:
        ValueError: a rank that is no whole number from 1 to n, ranks that say another order than scores, or a
            score that a loss has no meaning for.
    """
    ranks = read("ranks") if columns.get("ranks") is not None else None
    if ranks is not None:
        for rank in ranks:
            if not math.isnan(rank) and (rank != int(rank) or not 1 <= rank <= len(ranks)):
                wanted = f"whole numbers from 1, the best, to {len(ranks)}"
                raise ValueError(f"{where}: column 'ranks': got {rank:g}, wanted {wanted}")
    if "scores" in columns or ranks is None:
        column, scores = "scores", read("scores")
    else:
        column, scores = "ranks", tuple(len(ranks) - rank for rank in ranks)
    if ranks is not None and any(
        score > other and rank > worse
        for score, rank in zip(scores, ranks, strict=True)
        for other, worse in zip(scores, ranks, strict=True)
    ):
        got = f"{list(scores)} beside ranks {list(ranks)}"
        raise ValueError(
            f"{where}: column 'scores': got {got}, wanted one order: rank 1 for the highest score"
        )
    rules.check(scores, column, where)
    return scores
