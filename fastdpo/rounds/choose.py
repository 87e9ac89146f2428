"""Pairs, lists and samples out of judged answers, and a count of what became of them all.

Equal answers of a prompt are judged once. They stay samples of the policy, so win rates count each of them.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from fastdpo.rounds.candidates import Candidates, Verdict
from fastdpo.rounds.judge_settings import JudgeArguments
from fastdpo.rounds.partial import digest
from fastdpo.rounds.settings import SOURCES

# What is counted, and how it is said; of prompts, of answers, and of what is written.
_PROMPTS = {
    "no_answer": "without an answer to judge",
    "single": "with a single candidate",
    "all_equal": "with equal scores alone",
    "below_margin": "with no pair as far apart as min_margin",
    "no_opponent": "with nothing to win against",
}
_ANSWERS = {
    "empty": "empty",
    "unfinished": "cut off by max_new_tokens",
    "no_score": "without a score in their judgement",
    "duplicates": "said before",
}
_TIES = {"tied_best": "best", "tied_worst": "worst"}


@dataclass
class JudgeReport:
    """What became of prompts and answers. ``counts`` has a number for each name that came up."""

    source: str
    unit: str
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = self.counts
        text = f"{self.source}: {counts['written']} {self.unit} of {counts['prompts']} prompts, "
        text += f"{counts['answers']} answers"
        parts = [f"{counts[name]} {words}" for name, words in _ANSWERS.items() if counts[name]]
        text += f" ({', '.join(parts)})" if parts else ""
        left_out = [f"{counts[name]} {words}" for name, words in _PROMPTS.items() if counts[name]]
        text += f"; prompts left out: {', '.join(left_out)}" if left_out else ""
        ties = [f"{counts[name]} with several {words}" for name, words in _TIES.items() if counts[name]]
        text += f"; lists of equal scores: {counts['flat']}" if counts["flat"] else ""
        return text + (f"; ties, of which the first drawn counts: {', '.join(ties)}" if ties else "")


@dataclass(frozen=True)
class Unlike:
    """The answers of a prompt that are judged, equal ones once.

    Args:
        places: of each, where it was drawn first.
        of: place of an answer -> its number among ``places``; only answers that are kept.
    """

    places: tuple[int, ...]
    of: Mapping[int, int]


class Chooser:
    """Chooses what is written.

    Args:
        source: the data's name, for the report.
    """

    def __init__(self, args: JudgeArguments, source: str) -> None:
        self.args = args
        self.report = JudgeReport(source, args.format)

    def unlike(self, row: Candidates) -> Unlike:
        """Which answers of a row are judged."""
        places: list[int] = []
        of: dict[int, int] = {}
        for place in range(len(row.answers)):
            if row.is_empty(place) or self.args.drop_unfinished and not row.finished[place]:
                continue
            same = [number for number, other in enumerate(places) if row.answers[other] == row.answers[place]]
            of[place] = same[0] if same else len(places)
            places += [] if same else [place]
        return Unlike(tuple(places), of)

    def rows(self, row: Candidates, unlike: Unlike, verdict: Verdict) -> Iterator[dict[str, Any]]:
        """What is written of a row; counts it."""
        count = self.report.counts
        self._count_answers(row, unlike, verdict)
        scored = [number for number, score in enumerate(verdict.scores) if score is not None]
        if not scored:
            count["no_answer"] += 1
            return
        if self.args.format == "samples":
            written = list(self._samples(row, unlike, verdict))
        elif len(scored) < 2:
            count["single"] += 1
            return
        elif self.args.format == "lists":
            written = [self._list(row, unlike, verdict, scored)]
        else:
            written = list(self._pairs(row, unlike, verdict, scored))
        count["written"] += len(written)
        yield from written

    def _count_answers(self, row: Candidates, unlike: Unlike, verdict: Verdict) -> None:
        count, places = self.report.counts, range(len(row.answers))
        count["prompts"] += 1
        count["answers"] += len(places)
        count["empty"] += sum(row.is_empty(place) for place in places)
        count["unfinished"] += sum(not finished for finished in row.finished)
        count["duplicates"] += len(unlike.of) - len(unlike.places)
        count["no_score"] += sum(verdict.scores[number] is None for number in unlike.of.values())

    def _list(self, row: Candidates, unlike: Unlike, verdict: Verdict, scored: list[int]) -> dict[str, Any]:
        if len({verdict.scores[number] for number in scored}) == 1:
            self.report.counts["flat"] += 1  # is written: whether a loss learns from it is the loss's to say
        return {
            **row.columns,
            "prompt": row.prompt,
            "completions": [row.answers[unlike.places[number]] for number in scored],
            "scores": [verdict.scores[number] for number in scored],
        }

    def _samples(self, row: Candidates, unlike: Unlike, verdict: Verdict) -> Iterator[dict[str, Any]]:
        rates = self._win_rates(row, unlike, verdict)
        against = self.args.win_rate_against
        kept = [place for place in rates if row.sources[place] != against]
        if not any(rates[place] is not None for place in kept):
            self.report.counts["no_opponent"] += 1
        for place in kept:
            if rates[place] is not None:
                yield {
                    **row.columns,
                    "prompt": row.prompt,
                    "completion": row.answers[place],
                    "win_rate": rates[place],
                    "score": verdict.scores[unlike.of[place]],
                }

    def _pairs(
        self, row: Candidates, unlike: Unlike, verdict: Verdict, scored: list[int]
    ) -> Iterator[dict[str, Any]]:
        scores: Any = verdict.scores
        count, args = self.report.counts, self.args
        best, worst = max(scores[n] for n in scored), min(scores[n] for n in scored)
        if best == worst:
            count["all_equal"] += 1
            return
        if args.pairs != "all":
            count["tied_best"] += sum(scores[n] == best for n in scored) > 1
        if args.pairs == "best_worst":
            count["tied_worst"] += sum(scores[n] == worst for n in scored) > 1
        pairs = [
            (i, j)
            for i, j in permutations(scored, 2)
            if scores[i] > scores[j] and scores[i] - scores[j] >= args.min_margin
        ]
        if not pairs:
            count["below_margin"] += 1
            return
        rates = self._win_rates(row, unlike, verdict)
        for i, j in self._chosen(row, scores, pairs):
            yield self._pair(row, unlike.places[i], unlike.places[j], (scores[i], scores[j]), rates)

    def _chosen(self, row: Candidates, scores: Any, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        rng = random.Random(digest([self.args.seed, row.number, "pairs"]))
        if self.args.pairs == "all":
            limit = self.args.max_pairs
            return pairs if limit is None or len(pairs) <= limit else sorted(rng.sample(pairs, limit))
        # The first of the best, by the order that they were drawn in.
        best = min((i for i, _ in pairs), key=lambda n: (-scores[n], n))
        worse = [j for i, j in pairs if i == best]
        if self.args.pairs == "best_random":
            return [(best, rng.choice(worse))]
        return [(best, min(worse, key=lambda n: (scores[n], n)))]

    def _pair(
        self,
        row: Candidates,
        chosen: int,
        rejected: int,
        scores: tuple[float, float],
        rates: Mapping[int, float | None],
    ) -> dict[str, Any]:
        pair = {
            **row.columns,
            "prompt": row.prompt,
            "chosen": row.answers[chosen],
            "rejected": row.answers[rejected],
            "chosen_score": scores[0],
            "rejected_score": scores[1],
            "reward_gap": scores[0] - scores[1],
        }
        if rates[chosen] is not None and rates[rejected] is not None:
            pair |= {"chosen_win_rate": rates[chosen], "rejected_win_rate": rates[rejected]}
        if set(row.sources) != {"policy"}:
            sources = row.sources[chosen], row.sources[rejected]
            pair |= {"chosen_source": sources[0], "rejected_source": sources[1]}
            if sources.count("reference") == 1:
                pair["chosen_is_reference"] = int(sources[0] == "reference")
        return pair

    def _win_rates(self, row: Candidates, unlike: Unlike, verdict: Verdict) -> dict[int, float | None]:
        """Of each answer with a score, by its place; None where nothing was there to win against."""
        against, scores = self.args.win_rate_against, verdict.scores
        places = [place for place, number in unlike.of.items() if scores[number] is not None]
        rates: dict[int, float | None] = {}
        for place in places:
            others = [
                other
                for other in places
                if (other != place or against == "all")
                and (against not in SOURCES or row.sources[other] == against)
            ]
            won = [_chance(verdict, unlike.of[place], unlike.of[other]) for other in others]
            met = [chance for chance in won if chance is not None]
            rates[place] = sum(met) / len(met) if met else None
        return rates


def _chance(verdict: Verdict, i: int, j: int) -> float | None:
    """The probability that answer i is better than j: told, or Bradley and Terry's of their scores."""
    if i == j:
        return 0.5
    if verdict.wins is not None:
        return verdict.wins[i][j]
    scores: Any = verdict.scores
    return 0.5 * (1 + math.tanh((scores[i] - scores[j]) / 2))
