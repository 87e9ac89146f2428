"""Tokenised data of every kind but pairs: prompts, each with one or more answers, and numbers beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.data.references import REF_MISMATCHED, REF_MISMATCHED_OF, REF_OF, REFERENCE
from fastdpo.training.data.report import DataReport
from fastdpo.training.data.tokens import token_digest
from fastdpo.training.settings.kinds import DataKind


@dataclass(frozen=True, eq=False)
class Ragged:
    """Several numbers for each of R rows: ``values`` ``(N,)``, those of row i at ``offsets[i:i + 2]``."""

    values: Tensor
    offsets: Tensor

    @classmethod
    def of_counts(cls, values: Tensor, counts: Tensor) -> Ragged:
        """Rows of ``counts`` ``(R,)`` numbers each, one row after the other."""
        return cls(values, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Ragged:
        """Rows as lists of numbers."""
        counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return cls.of_counts(torch.tensor([x for row in rows for x in row], dtype=dtype), counts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def counts(self) -> Tensor:
        """``(R,)`` numbers of each row."""
        return self.offsets.diff()

    def places(self, rows: Tensor) -> Tensor:
        """Where the numbers of ``rows`` stand, row after row."""
        counts = self.counts[rows]
        starts = counts.cumsum(0) - counts
        return torch.arange(int(counts.sum())) + (self.offsets[rows] - starts).repeat_interleave(counts)

    def subset(self, rows: Tensor) -> Ragged:
        """The rows named, in that order."""
        return Ragged.of_counts(self.values[self.places(rows)], self.counts[rows])

    def sums(self) -> Tensor:
        """``(R,)``."""
        total = torch.cat([self.values.new_zeros(1), self.values.cumsum(0)])
        return total[self.offsets].diff()

    def largest(self) -> Tensor:
        """``(R,)``; 0 for a row without numbers."""
        rows = torch.arange(len(self)).repeat_interleave(self.counts)
        return self.values.new_zeros(len(self)).scatter_reduce(0, rows, self.values, "amax")


class AnswerDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """R tokenised rows, each a prompt with its answers.

    Args:
        kind: of the data.
        tokens: all token ids, int32, row after row: prompt, then its answers.
        starts, prompt_lengths: ``(R,)`` int64, where a row begins in ``tokens``, and its prompt's length.
        answers: the answers' lengths.
        rows: ``(R,)`` int64, the row of the data set that each came from.
        numbers: per row, ``(R,)``, or several a row: what the kind's losses use, under the names that
            ``fused_preference_loss`` has for them; ``pair_weights``; ``ref_logps``.
        report: what became of the rows.
        pieces: the lengths of the answer's pieces, for a kind that has them; they add up to the answer's.
        has_mismatched: whether items carry another row's answer too, for KTO's reference point.
        max_length: where a mismatched answer is cut.
        scored: bool, as ``tokens``: which of the answers' tokens are scored; None for all of them.
        made_with: what beside the rows' texts decided on the tokens, in words.

    Raises:
        ValueError: an empty prompt or answer, or mismatched answers asked of a single row.
    """

    def __init__(
        self,
        kind: DataKind,
        tokens: Tensor,
        starts: Tensor,
        prompt_lengths: Tensor,
        answers: Ragged,
        rows: Tensor,
        numbers: Mapping[str, Tensor | Ragged],
        report: DataReport,
        *,
        pieces: Ragged | None = None,
        has_mismatched: bool = False,
        max_length: int | None = None,
        scored: Tensor | None = None,
        made_with: str = "",
    ) -> None:
        if (
            bool((prompt_lengths < 1).any())
            or bool((answers.values < 1).any())
            or bool((answers.counts < 1).any())
        ):
            raise ValueError(
                "AnswerDataset: got a row without a prompt or an answer, wanted both in every row"
            )
        if (pieces is None) == kind.has_pieces:
            raise ValueError(
                f"pieces: got {'none' if pieces is None else 'some'}, wanted the opposite for {kind.name}"
            )
        if has_mismatched and len(rows) < 2:
            raise ValueError(
                "kto: got one row, wanted at least two: its reference point comes from other rows' answers"
            )
        self.kind, self.tokens, self.starts, self.prompt_lengths = kind, tokens, starts, prompt_lengths
        self.answers, self.rows, self.numbers, self.report = answers, rows, dict(numbers), report
        self.pieces, self.has_mismatched, self.max_length = pieces, has_mismatched, max_length
        self.scored, self.made_with = scored, made_with

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        prompt, *answers = self._parts(self.tokens, index)
        item: dict[str, Any] = {
            "prompt_ids": prompt,
            "answer_ids": tuple(answers),
            "row": int(self.rows[index]),
        }
        if self.pieces is not None:
            item["piece_lengths"] = self.pieces[index].tolist()
        if self.scored is not None:
            item["scored"] = tuple(self._parts(self.scored, index)[1:])
        if self.has_mismatched:
            place = self._mismatched_place(index)
            item["mismatched_ids"] = self.tokens[place]
            if self.scored is not None:
                item["mismatched_scored"] = self.scored[place]
        for name, values in self.numbers.items():
            item[name] = values[index] if isinstance(values, Ragged) else values[index].item()
        return item

    def _parts(self, values: Tensor, index: int) -> list[Tensor]:
        """Of numbers per token those of a row's prompt and answers."""
        start, sizes = (
            int(self.starts[index]),
            [int(self.prompt_lengths[index]), *self.answers[index].tolist()],
        )
        return list(values[start : start + sum(sizes)].split(sizes))

    def _mismatched_place(self, index: int) -> slice:
        """Where the tokens of another row's answer stand, as far as they fit behind the prompt."""
        other = int(self.mismatched[index])
        start = int(self.starts[other] + self.prompt_lengths[other])
        return slice(start, start + int(self.mismatched_lengths[index]))

    @cached_property
    def mismatched_lengths(self) -> Tensor:
        """``(R,)``: tokens of the answer that each prompt is mismatched with."""
        lengths = self.answers.values[self.answers.offsets[self.mismatched]]
        if self.max_length is not None:
            lengths = lengths.minimum(self.max_length - self.prompt_lengths).clamp(min=1)
        return lengths

    @cached_property
    def mismatched(self) -> Tensor:
        """``(R,)``: the row whose answer each prompt is mismatched with: the last one with another.

        As the data have it, not as a batch has it: the same however rows are cut into batches. TRL turns the
        answers of each batch by one, which is this where all rows are one batch and no prompt comes twice.
        """
        prompts = [
            self.tokens[start : start + size].numpy().tobytes()
            for start, size in zip(self.starts.tolist(), self.prompt_lengths.tolist(), strict=True)
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

    def mismatched_digests(self) -> list[str]:
        """Of each row a short hash of the answer that its prompt is mismatched with."""
        answers = (self.tokens[self._mismatched_place(index)] for index in range(len(self)))
        return [hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).hexdigest() for ids in answers]

    def row_digests(self) -> list[str]:
        """Of each row a short hash of the tokens that its log-probabilities are of."""
        found = []
        for index in range(len(self)):
            prompt, *answers = self._parts(self.tokens, index)
            sizes = [len(prompt), *map(len, answers)]
            pieces = [] if self.pieces is None else self.pieces[index].tolist()
            scored = None if self.scored is None else torch.cat(self._parts(self.scored, index)[1:])
            found.append(token_digest(torch.cat([prompt, *answers]), [*sizes, *pieces], scored))
        return found

    @property
    def lengths(self) -> Tensor:
        """``(R,)``: tokens of the row's longest sequence, prompt included."""
        return self.prompt_lengths + self.answers.largest()

    @property
    def num_sequences(self) -> Tensor:
        """``(R,)``: sequences that a row makes in a batch, mismatched ones left out."""
        return self.answers.counts

    @property
    def num_answer_tokens(self) -> int:
        """Labelled tokens of all answers."""
        return int(self.num_labelled.sum())

    @property
    def num_labelled(self) -> Tensor:
        """``(R,)``: tokens of each row's answers that are scored."""
        if self.scored is None:
            return self.answers.sums()
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), self.scored.cumsum(0)])
        bounds = self.row_bounds
        return counts[bounds[:, 1]] - counts[bounds[:, 0]]

    @property
    def row_bounds(self) -> Tensor:
        """``(R, 2)``: where each row begins and ends in ``tokens``."""
        return torch.stack([self.starts, self.starts + self.prompt_lengths + self.answers.sums()], 1)

    @property
    def num_loss_rows(self) -> int:
        """What the loss is a mean over: rows, or steps."""
        return len(self.pieces.values) if self.kind.name == "steps" and self.pieces is not None else len(self)

    @property
    def width(self) -> int:
        """Rewards of a row, at most."""
        per_row = self.pieces if self.kind.name == "ranking" and self.pieces is not None else self.answers
        return int(per_row.counts.max())

    def sizes(self, rows: Tensor) -> list[list[int]]:
        """Of each row named, tokens of the prompt and of every answer."""
        return [[int(self.prompt_lengths[i]), *self.answers[i].tolist()] for i in rows.tolist()]

    def batch_tokens(self, layout: str) -> Tensor:
        """``(R,)``: tokens that a row adds to a batch; those of its longest sequence where it is padded."""
        if layout == "padded":
            return self.lengths
        prompts = self.prompt_lengths * (self.answers.counts if layout == "packed" else 1)
        return prompts + self.answers.sums()

    def subset(self, indices: Sequence[int] | Tensor) -> AnswerDataset:
        """The rows at ``indices``, sharing the token storage; mismatched answers come from among them."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        numbers: dict[str, Tensor | Ragged] = {
            name: values.subset(index) if isinstance(values, Ragged) else values[index]
            for name, values in self.numbers.items()
            if name != REF_MISMATCHED
        }
        pieces = None if self.pieces is None else self.pieces.subset(index)
        return self._with(
            numbers,
            self.starts[index],
            self.prompt_lengths[index],
            self.answers.subset(index),
            self.rows[index],
            pieces,
        )

    def _with(
        self,
        numbers: Mapping[str, Tensor | Ragged],
        starts: Tensor,
        prompt_lengths: Tensor,
        answers: Ragged,
        rows: Tensor,
        pieces: Ragged | None,
    ) -> AnswerDataset:
        return AnswerDataset(
            self.kind, self.tokens, starts, prompt_lengths, answers, rows, numbers, self.report,
            pieces=pieces, has_mismatched=self.has_mismatched, max_length=self.max_length,
            scored=self.scored, made_with=self.made_with,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Hash of token ids, boundaries, what is scored, and kind: equal exactly when these are."""
        digest = hashlib.blake2b(
            f"{self.kind.name} {self.has_mismatched} {self.max_length}".encode(), digest_size=16
        )
        lengths = [self.prompt_lengths, self.answers.offsets, self.answers.values]
        for part in lengths if self.pieces is None else [*lengths, self.pieces.offsets, self.pieces.values]:
            digest.update(part.contiguous().numpy().tobytes())
        for start, end in self.row_bounds.tolist():
            digest.update(self.tokens[start:end].numpy().tobytes())
            if self.scored is not None:
                digest.update(self.scored[start:end].numpy().tobytes())
        return digest.hexdigest()

    # Reference log-probabilities: one for each answer, piece or token, then the mismatched answers' sums

    @property
    def _reference_rows(self) -> Ragged:
        """How many numbers of the reference each row has; the values are of no interest."""
        counts = self.answers.counts
        if self.pieces is not None:
            counts = self.pieces.counts
        elif self.kind.reference_per == "token":
            counts = self.num_labelled
        return Ragged.of_counts(torch.zeros(int(counts.sum())), counts)

    @property
    def has_reference(self) -> bool:
        """Whether the rows carry reference log-probabilities."""
        return REFERENCE in self.numbers and (not self.has_mismatched or REF_MISMATCHED in self.numbers)

    @property
    def score_shape(self) -> tuple[int, ...]:
        """Of what ``with_reference`` takes."""
        return (len(self._reference_rows.values) + (len(self) if self.has_mismatched else 0),)

    def put_scores(self, scores: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write the scores of a batch of ``rows`` where they belong."""
        places = self._reference_rows
        index = places.places(rows)
        if self.has_mismatched:
            index = torch.cat([index, len(places.values) + rows])
        scores[index] = values

    def with_reference(self, scores: Tensor) -> AnswerDataset:
        """The same rows with reference log-probabilities, in the shape ``score_shape``."""
        rows = self._reference_rows
        count = len(rows.values)
        numbers = {**self.numbers, REFERENCE: Ragged(scores[:count], rows.offsets)}
        if self.has_mismatched:
            numbers[REF_MISMATCHED] = scores[count:]
        return self._with(numbers, self.starts, self.prompt_lengths, self.answers, self.rows, self.pieces)

    def scores_by_row(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each row, and the columns of its reference log-probabilities (``row_references.py``): lists."""
        scores = self.numbers[REFERENCE]
        assert isinstance(scores, Ragged)
        mismatched: Any = self.numbers.get(REF_MISMATCHED)
        digests = self.mismatched_digests() if self.has_mismatched else []
        of = self.row_digests()
        for place, row in enumerate(self.rows.tolist()):
            columns: dict[str, Any] = {
                REFERENCE: scores[place].tolist(),
                REF_OF: [f"{of[place]} {self.made_with}".strip()],
            }
            if self.has_mismatched:
                columns[REF_MISMATCHED] = [mismatched[place].item()]
                columns[REF_MISMATCHED_OF] = [digests[place]]
            yield row, columns

    def rows_not_finite(self, scores: Tensor) -> list[int]:
        """Rows with a score that is NaN or infinite."""
        rows = self._reference_rows
        is_bad = ~torch.isfinite(scores)
        bad = Ragged(is_bad[: len(rows.values)].long(), rows.offsets).sums() > 0
        if self.has_mismatched:
            bad |= is_bad[len(rows.values) :]
        found: list[int] = self.rows[bad].tolist()
        return found
