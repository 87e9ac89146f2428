"""Rows of the kinds beside pairs to token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.data.answer_formats import AnswerReader
from fastdpo.training.data.answers import AnswerDataset, Ragged
from fastdpo.training.data.columns import Survey
from fastdpo.training.data.encode import PER_ANSWER, RowEncoder
from fastdpo.training.data.scores import ScoreRules
from fastdpo.training.data.source import RowSource
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.kinds import DataKind


@dataclass(frozen=True)
class AnswerOptions:
    """What the losses of a run ask of their data.

    Args:
        kind: of the data.
        list_size: how many candidates a list must have; None for any number from two.
        scores: what the losses ask of scores; None: they use none.
        has_mismatched: whether rows come with another row's answer.
    """

    kind: DataKind
    list_size: int | None = None
    scores: ScoreRules | None = field(default_factory=ScoreRules)
    has_mismatched: bool = False


def encode_answers(
    source: RowSource,
    tokenizer: Any,
    options: EncodingOptions,
    wanted: AnswerOptions,
    found: Survey | None = None,
) -> AnswerDataset:
    """Tokenise rows into an ``AnswerDataset`` whose ``report`` says what became of each.

    Args:
        found: ``survey(source)``, where it is known.

    Raises:
        ValueError: as ``encode_rows``.
    """
    encoder = RowEncoder(source, tokenizer, options, kind=wanted.kind, found=found)
    reader = AnswerReader(encoder.reader, wanted.kind, options.columns, wanted.list_size, wanted.scores)
    encoder.run(reader.render, used=reader.used(encoder.found.names))
    numbers: dict[str, Tensor | Ragged] = {
        name: Ragged.of_lists(values, torch.float32) if name in PER_ANSWER else torch.tensor(values)
        for name, values in encoder.numbers.items()
    }
    lengths = torch.tensor([len(row) for row in encoder.tokens])
    prompts, answers, pieces = zip(*encoder.sizes, strict=True)
    dataset = AnswerDataset(
        wanted.kind,
        torch.cat(encoder.tokens),
        lengths.cumsum(0) - lengths,
        torch.tensor(prompts),
        Ragged.of_lists(answers, torch.int64),
        torch.tensor(encoder.rows),
        numbers,
        encoder.report,
        pieces=Ragged.of_lists(pieces, torch.int64) if wanted.kind.has_pieces else None,
        has_mismatched=wanted.has_mismatched,
        max_length=options.max_length,
        scored=encoder.scored(),
        made_with=encoder.made_with,
    )
    found_references: AnswerDataset = encoder.with_references(dataset)
    return found_references
