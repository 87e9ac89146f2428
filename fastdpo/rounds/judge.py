"""``fastdpo judge``: scores of drawn answers, and the pairs, lists or samples that training reads.

All rows are read and looked at before the first is judged; verdicts are kept while they come.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields

from fastdpo.rounds.candidates import Candidates, Verdict, read_candidates
from fastdpo.rounds.choose import Chooser, JudgeReport, Unlike
from fastdpo.rounds.functions import source_of
from fastdpo.rounds.judge_settings import JudgeArguments
from fastdpo.rounds.judges import make_judge
from fastdpo.rounds.partial import PartialWork, digest, stamp
from fastdpo.rounds.ranks import Ranks
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.hub import check_there

# Rows whose verdicts are kept together.
ROWS_AT_ONCE = 64
# How the run is done, or what is made of verdicts: these stay what they are.
_NOT_OF_VERDICTS = (
    "dataset", "dataset_split", "output", "overwrite_output", "use_cpu", "format", "pairs", "min_margin",
    "max_pairs", "win_rate_against",
)  # fmt: skip
logger = logging.getLogger(__name__)


def judge(args: JudgeArguments) -> JudgeReport:
    """Judge answers and write what ``format`` says; beside it, ``OUTPUT.report.json`` with all counts.

    Returns:
        What became of prompts and answers.

    Raises:
        ValueError: rows that are none of ``fastdpo sample``'s kind, a judge that cannot be had or that says
            something else than a finite number for each answer, an output in use, nothing left to write.
    """
    for name in ("reward_model", "judge_model"):
        if getattr(args, name) is not None:
            check_there(name, getattr(args, name))
    ranks = Ranks.joined(args.use_cpu)
    source = read_rows(args.dataset, split=args.dataset_split)
    rows = [read_candidates(row, number, source.name) for number, row in source]
    chooser = Chooser(args, source.name)
    unlike = [chooser.unlike(row) for row in rows]
    _check_sources(args, rows)
    told = _told(args, rows)
    work = ranks.together(lambda: PartialWork(args.path, told, ranks, overwrite=args.overwrite_output))
    ranks.together(lambda: _judge_missing(args, work, rows, unlike, ranks))
    verdicts = _verdicts(work, len(rows))
    ranks.wait()
    written = [
        made
        for row, these, verdict in zip(rows, unlike, verdicts, strict=True)
        for made in chooser.rows(row, these, verdict)
    ]
    if not written:
        raise ValueError(f"{chooser.report}: nothing left to write")
    counts = {args.path.with_suffix(".report.json"): dict(chooser.report.counts)}
    ranks.together(lambda: work.finish(written, beside=counts))
    return chooser.report


def _check_sources(args: JudgeArguments, rows: Sequence[Candidates]) -> None:
    against = args.win_rate_against
    found = sorted({source for row in rows for source in row.sources})
    if against not in ("others", "all", *found):
        raise ValueError(
            f"win_rate_against: got {against!r}, wanted a source of the samples: {', '.join(found)}"
        )


def _told(args: JudgeArguments, rows: Sequence[Candidates]) -> dict[str, object]:
    """What decides on the verdicts."""
    told = {item.name: getattr(args, item.name) for item in fields(args) if item.name not in _NOT_OF_VERDICTS}
    for name in ("function", "pairwise"):
        if told[name] is not None:
            told[f"{name}_source"] = digest(source_of(told[name]))
    for name in ("reward_model", "judge_model"):
        told[name] = stamp(told[name])
    if args.judge_prompt is not None:
        told["judge_prompt"] = digest(args.judge_template())
    told["samples"] = digest([(row.prompt, row.answers, row.finished, row.columns) for row in rows])
    return told


def _judge_missing(
    args: JudgeArguments,
    work: PartialWork,
    rows: Sequence[Candidates],
    unlike: Sequence[Unlike],
    ranks: Ranks,
) -> None:
    done = {record["part"] for record in work.records()}
    asked = [(row, these.places) for row, these in zip(rows, unlike, strict=True)]
    parts = [asked[start : start + ROWS_AT_ONCE] for start in range(0, len(asked), ROWS_AT_ONCE)]
    missing = [
        place for place in range(len(parts)) if place % ranks.count == ranks.rank and place not in done
    ]
    if done:
        logger.info("going on: the verdicts of %d of %d parts are there", len(done), len(parts))
    if missing:
        judging = make_judge(args)
        judging.check(asked)
        for place in missing:
            verdicts = judging.judge(parts[place])
            work.add({"part": place, "verdicts": [(verdict.scores, verdict.wins) for verdict in verdicts]})
            logger.info("judged: part %d of %d", place + 1, len(parts))
    work.close()


def _verdicts(work: PartialWork, count: int) -> list[Verdict]:
    records = sorted(work.records(), key=lambda record: record["part"])
    found = [Verdict(scores, wins) for record in records for scores, wins in record["verdicts"]]
    assert len(found) == count
    return found
