"""Which other row's answer a prompt is mismatched with, for KTO's reference point."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.training.data.chunks import Chunks
from fastdpo.training.data.row import Answer, Row
from fastdpo.training.data.row_numbers import row_of

# Rows of a stream that wait for another prompt, at most.
_MOST_WAITING = 1000


def mismatched_rows(tokens: Chunks, starts: Tensor, prompt_lengths: Tensor) -> Tensor:
    """``(R,)``: for each row the last one before it, round the end, with another prompt.

    As the data have it, not as a batch has it: the same however rows are cut into batches. TRL turns the
    answers of each batch by one, which is this where all rows are one batch and no prompt comes twice.
    """
    prompts = [
        hashlib.blake2b(tokens[start : start + size].numpy().tobytes(), digest_size=16).digest()
        for start, size in zip(starts.tolist(), prompt_lengths.tolist(), strict=True)
    ]
    count = len(prompts)
    found = [(i - 1) % count for i in range(count)]  # where all prompts are the same
    other = -1
    for i in range(2 * count):  # twice round, so that the first rows find the last ones
        here, before = i % count, (i - 1) % count
        other = before if prompts[before] != prompts[here] else other
        if other >= 0:
            found[here] = other
    return torch.tensor(found)


def with_mismatched(rows: Iterable[Row], max_length: int | None, source: str) -> Iterator[Row]:
    """Rows of a pass of a stream, each with the answer of the last row before it with another prompt.

    A stream has no end to look round. Its first rows wait for the first one with another prompt, and take
    that one's answer. Where all prompts are the same, each row has the answer of the one before.

    Args:
        max_length: where the answers are cut, behind the prompt.

    Raises:
        ValueError: a single row, or no other prompt for so long that rows that wait would fill the memory.
    """
    waiting: list[Row] = []
    before: Row | None = None
    other: Answer | None = None
    for row in rows:
        if before is not None and not torch.equal(before.prompt, row.prompt):
            other = before.answers[0]
            yield from (_mismatched(early, row.answers[0], max_length) for early in waiting)
            waiting = []
        before = row
        if other is not None:
            yield _mismatched(row, other, max_length)
            continue
        waiting.append(row)
        if len(waiting) > _MOST_WAITING:
            raise ValueError(
                f"kto: got {_MOST_WAITING} rows of one prompt up to {row_of(source, row.number)}, wanted "
                "another prompt among them: its reference point comes from other prompts' answers"
            )
    if len(waiting) == 1:
        raise ValueError(
            "kto: got one row, wanted at least two: its reference point comes from other rows' answers"
        )
    for place, row in enumerate(waiting):
        yield _mismatched(row, waiting[place - 1].answers[0], max_length)


def _mismatched(row: Row, other: Answer, max_length: int | None) -> Row:
    size = len(other.ids) if max_length is None else max(max_length - len(row.prompt), 1)
    scored = None if other.scored is None else other.scored[:size]
    return replace(row, mismatched=Answer(other.ids[:size], scored))
