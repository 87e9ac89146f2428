"""Rows of the kinds beside pairs to token ids; the same way as ``encode.py``.

Rows nothing can be learnt from are skipped and counted, or raise, as ``on_bad_row`` says: an empty prompt,
answer or piece, a list of one candidate or of equal ones, a number that is missing or not finite, a prompt
that fills ``max_length``. A token that spans the end of a piece belongs to the next one. Where an answer is
cut, pieces behind the cut go with their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.answer_formats import EMPTY, NOT_FINITE, ONE_CANDIDATE, AnswerTexts, render_answers
from fastdpo.training.answer_reference import RowReferences
from fastdpo.training.answers import AnswerDataset, Ragged
from fastdpo.training.data import RowSource
from fastdpo.training.encode import (
    BATCH_ROWS,
    EncodedRows,
    EncodingOptions,
    RowTokenizer,
    common_prefix,
    truncate,
)
from fastdpo.training.kinds import DataKind
from fastdpo.training.scores import ScoreRules

# Numbers of which a row has one for each answer or piece.
_PER_ANSWER = ("scores", "advantages")


@dataclass(frozen=True)
class AnswerOptions:
    """What the losses of a run ask of their data.

    Args:
        kind: of the data.
        list_size: how many candidates a list must have; None for any number from two.
        scores: what the losses ask of scores; None: they use none.
        has_mismatched: whether rows come with another row's answer.
        has_reference: whether the rows' reference log-probabilities are read (``answer_reference.py``).
    """

    kind: DataKind
    list_size: int | None = None
    scores: ScoreRules | None = field(default_factory=ScoreRules)
    has_mismatched: bool = False
    has_reference: bool = False


def encode_answers(
    source: RowSource, tokenizer: Any, options: EncodingOptions, wanted: AnswerOptions
) -> AnswerDataset:
    """Tokenise rows into an ``AnswerDataset`` whose ``report`` says what became of each.

    Raises:
        ValueError: a row of the wrong shape, a tokenizer that lacks what the rows need, a bad row
            under ``on_bad_row="error"``, or no row left.
    """
    encoder = _Encoder(tokenizer, options, wanted)
    if wanted.has_reference:
        encoder.references = RowReferences(source.name, has_mismatched=wanted.has_mismatched)
    rows = iter(source)
    while batch := list(islice(rows, BATCH_ROWS)):
        for number, row in batch if encoder.references is not None else ():
            encoder.references.expect(number, row)  # type: ignore[union-attr]
        encoder.add(
            [
                texts
                for number, row in batch
                for texts in render_answers(
                    row, number, source.name, tokenizer, wanted.kind, options.columns,
                    list_size=wanted.list_size, scores=wanted.scores,
                )
            ]
        )  # fmt: skip
    return encoder.finish(source)


@dataclass
class _Encoder:
    """Collects the rows of one data set, batch by batch."""

    raw_tokenizer: Any
    options: EncodingOptions
    wanted: AnswerOptions
    encoded: EncodedRows = field(default_factory=EncodedRows)
    sizes: list[tuple[int, list[int], list[int]]] = field(default_factory=list)  # prompt, answers, pieces
    numbers: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    references: RowReferences | None = None

    def __post_init__(self) -> None:
        self.tokenizer = RowTokenizer(self.raw_tokenizer)

    def add(self, batch: Sequence[AnswerTexts]) -> None:
        flat = [text for row in batch for text in (row.prompt, *row.answers, *row.beginnings)]
        is_chat = [row.is_chat for row in batch for _ in range(1 + len(row.answers) + len(row.beginnings))]
        ids = iter(self.tokenizer.tokenize(flat, is_chat))
        for row in batch:
            prompt = next(ids)
            answers = list(islice(ids, len(row.answers)))
            self._add_row(row, prompt, answers, list(islice(ids, len(row.beginnings))))

    def _add_row(
        self, row: AnswerTexts, prompt: list[int], texts: list[list[int]], beginnings: list[list[int]]
    ) -> None:
        problem = row.problem
        if problem is None and self.references is not None and not self.references.are_finite(row.row):
            problem = NOT_FINITE
        if problem is not None:
            self.encoded.skipped[problem].append(row.row)
            return
        prompt, answers, is_merged = self.tokenizer.split(row.prompt, prompt, texts, is_chat=row.is_chat)
        problem = self._why_bad(prompt, answers)
        cut = (prompt, answers)
        if problem is None:
            *cut, problem = truncate(prompt, answers, self.options)  # type: ignore[assignment]
        kept, kept_answers = cut
        numbers = dict(row.numbers)
        pieces: list[int] = []
        if problem is None and self.wanted.kind.has_pieces:
            ends = [common_prefix(texts[0], text) - len(prompt) for text in beginnings]
            pieces, problem = _piece_lengths(ends, len(answers[0]), len(kept_answers[0]))
            numbers |= {name: numbers[name][: len(pieces)] for name in _PER_ANSWER if name in numbers}  # type: ignore[index]
            if self.wanted.kind.name == "ranking" and problem is None and len(pieces) < 2:
                problem = f"{ONE_CANDIDATE} once truncated"
        elif problem is None and self._are_equal(kept_answers):
            problem = "answers identical once truncated"
        if problem is not None:
            self.encoded.skipped[problem].append(row.row)
            return
        if self.references is not None:
            counts = {"answer": len(kept_answers), "piece": len(pieces), "token": len(kept_answers[0])}
            self.references.take(row.row, counts[self.wanted.kind.reference_per])
        whole = sum(map(len, (prompt, *answers)))
        self.encoded.keep(row.row, (kept, *kept_answers), whole, is_merged=is_merged)
        self.sizes.append((len(kept), [len(answer) for answer in kept_answers], pieces))
        for name, value in numbers.items():
            self.numbers[name].append(value)

    def _why_bad(self, prompt: list[int], answers: list[list[int]]) -> str | None:
        if not prompt:
            # Its first answer token would have nothing to be predicted from.
            return "an empty prompt"
        if not all(answers):
            return EMPTY
        return "identical answers" if self._are_equal(answers) else None

    def _are_equal(self, answers: list[list[int]]) -> bool:
        return self.wanted.kind.name == "listwise" and all(answer == answers[0] for answer in answers)

    def finish(self, source: RowSource) -> AnswerDataset:
        report = self.encoded.report(source, self.options, "rows")
        lengths = torch.tensor([len(row) for row in self.encoded.tokens])
        numbers: dict[str, Tensor | Ragged] = {
            name: Ragged.of_lists(values, torch.float32) if name in _PER_ANSWER else torch.tensor(values)
            for name, values in self.numbers.items()
        }
        prompts, answers, pieces = zip(*self.sizes, strict=True)
        dataset = AnswerDataset(
            self.wanted.kind,
            torch.cat(self.encoded.tokens),
            lengths.cumsum(0) - lengths,
            torch.tensor(prompts),
            Ragged.of_lists(answers, torch.int64),
            torch.tensor(self.encoded.rows),
            numbers,
            report,
            pieces=Ragged.of_lists(pieces, torch.int64) if self.wanted.kind.has_pieces else None,
            has_mismatched=self.wanted.has_mismatched,
            max_length=self.options.max_length,
        )
        return dataset if self.references is None else self.references.added_to(dataset)


def _piece_lengths(ends: Sequence[int], whole: int, kept: int) -> tuple[list[int], str | None]:
    """Tokens of each piece of an answer cut to ``kept`` of ``whole`` tokens, without those that are gone."""
    bounds = [0, *ends, whole]
    if any(after <= before for before, after in zip(bounds, bounds[1:], strict=False)):
        return [], "a piece without a token of its own"
    bounds = [min(bound, kept) for bound in bounds]
    return [after - before for before, after in zip(bounds, bounds[1:], strict=False) if after > before], None
