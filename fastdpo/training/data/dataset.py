"""Tokenised data of every kind: rows of a prompt, its answers, and numbers beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.data.chunks import Chunks
from fastdpo.training.data.images import RowImages
from fastdpo.training.data.mismatched import mismatched_rows
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.report import DataReport
from fastdpo.training.data.row import REF_MISMATCHED, REFERENCE, Answer, Row
from fastdpo.training.data.tokens import token_digest
from fastdpo.training.settings.kinds import PAIRS, DataKind

_FIELDS = (
    "kind", "tokens", "starts", "prompt_lengths", "answers", "rows", "report", "pieces", "has_mismatched",
    "max_length", "scored", "made_with", "images",
)  # fmt: skip


class RowDataset(torch.utils.data.Dataset[Row]):
    """R tokenised rows, each a prompt with its answers: of pairs chosen, rejected and, of all or none, gold.

    Args:
        kind: of the data.
        tokens: all token ids, int32, row after row: prompt, then its answers; in chunks where they are
            memory-mapped.
        starts, prompt_lengths: ``(R,)`` int64, where a row begins in ``tokens``, and its prompt's length.
        answers: the answers' lengths.
        rows: ``(R,)`` int64, the row of the file that each came from.
        numbers: per row, ``(R,)``, or several a row: what the losses use, under the names that
            ``fused_dpo_loss`` and ``fused_preference_loss`` have for them; ``pair_weights``; ``ref_logps``.
        report: what became of the rows.
        pieces: the lengths of the answer's pieces, for a kind that has them; they add up to the answer's.
        has_mismatched: whether rows come with another's answer too, for KTO's reference point.
        max_length: where a mismatched answer is cut.
        scored: bool, as ``tokens``: which of the answers' tokens are scored; None for all of them.
        made_with: what beside the rows' texts decided on the tokens, in words.
        images: of the rows; None where none has any.

    Raises:
        ValueError: pieces where the kind has none, or none where it has; an empty prompt or answer, but in
            pairs; or mismatched answers asked of a single row.
    """

    def __init__(
        self,
        kind: DataKind,
        tokens: Tensor | Chunks,
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
        scored: Tensor | Chunks | None = None,
        made_with: str = "",
        images: RowImages | None = None,
    ) -> None:
        counts = (prompt_lengths, answers.values, answers.counts)
        if not kind.is_paired and any(bool((count < 1).any()) for count in counts):
            raise ValueError("RowDataset: got a row without a prompt or an answer, wanted both in every row")
        if (pieces is None) == kind.has_pieces:
            raise ValueError(
                f"pieces: got {'none' if pieces is None else 'some'}, wanted the opposite for {kind.name}"
            )
        if has_mismatched and len(rows) < 2:
            raise ValueError(
                "kto: got one row, wanted at least two: its reference point comes from other rows' answers"
            )
        self.kind, self.starts, self.prompt_lengths = kind, starts, prompt_lengths
        self.tokens = tokens if isinstance(tokens, Chunks) else Chunks([tokens])
        self.scored = Chunks([scored]) if isinstance(scored, Tensor) else scored
        self.answers, self.rows, self.numbers, self.report = answers, rows, dict(numbers), report
        self.pieces, self.has_mismatched, self.max_length = pieces, has_mismatched, max_length
        self.made_with, self.images = made_with, images

    @classmethod
    def of_pairs(
        cls,
        tokens: Tensor,
        bounds: Tensor,
        rows: Tensor,
        numbers: Mapping[str, Tensor | Ragged],
        report: DataReport,
        **more: Any,
    ) -> RowDataset:
        """P pairs: ``bounds`` ``(P, 4)`` or ``(P, 5)`` are start, end of prompt, chosen, rejected, gold."""
        sizes = bounds.diff(dim=1)
        lengths = Ragged.of_counts(sizes[:, 1:].flatten(), torch.full((len(rows),), sizes.shape[1] - 1))
        return cls(PAIRS, tokens, bounds[:, 0], sizes[:, 0], lengths, rows, numbers, report, **more)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        index = int(index)
        prompt, *answers = self._parts(self.tokens, index)
        masks: Sequence[Tensor | None] = [None] * len(answers)
        if self.scored is not None:
            masks = self._parts(self.scored, index)[1:]
        return Row(
            int(self.rows[index]),
            prompt,
            tuple(map(Answer, answers, masks)),
            {
                name: values[index] if isinstance(values, Ragged) else values[index].item()
                for name, values in self.numbers.items()
            },
            () if self.pieces is None else tuple(self.pieces[index].tolist()),
            self._mismatched(index) if self.has_mismatched else None,
            () if self.images is None else self.images[index],
            self.report.source,
        )

    def _parts(self, values: Chunks, index: int) -> list[Tensor]:
        """Of numbers per token those of a row's prompt and answers."""
        start = int(self.starts[index])
        sizes = [int(self.prompt_lengths[index]), *self.answers[index].tolist()]
        return list(values[start : start + sum(sizes)].split(sizes))

    # Sizes

    @property
    def lengths(self) -> Tensor:
        """``(R,)``: tokens of the row's longest sequence, prompt included."""
        return self.prompt_lengths + self.answers.largest()

    @property
    def num_sequences(self) -> Tensor:
        """``(R,)``: sequences that a row makes in a batch, mismatched ones left out."""
        return self.answers.counts

    @property
    def row_bounds(self) -> Tensor:
        """``(R, 2)``: where each row begins and ends in ``tokens``."""
        return torch.stack([self.starts, self.starts + self.prompt_lengths + self.answers.sums()], 1)

    @cached_property
    def scored_lengths(self) -> Ragged:
        """Of each answer, tokens that are scored."""
        if self.scored is None:
            return self.answers
        before = self.answers.values.cumsum(0) - self.answers.values
        in_row = before - before[self.answers.offsets[:-1]].repeat_interleave(self.answers.counts)
        starts = (self.starts + self.prompt_lengths).repeat_interleave(self.answers.counts) + in_row
        return Ragged(self.scored.sums(starts, self.answers.values), self.answers.offsets)

    @property
    def num_labelled(self) -> Tensor:
        """``(R,)``: tokens of each row's answers that are scored."""
        return self.scored_lengths.sums()

    @property
    def num_loss_rows(self) -> int:
        """What the loss is a mean over: rows, or steps."""
        return len(self.pieces.values) if self.kind.name == "steps" and self.pieces is not None else len(self)

    def num_nll_tokens(self, *, on_prompt: bool) -> int:
        """What the second count of a loss is: of pairs, tokens of an NLL term; of others, of all answers.

        An NLL term's are those of gold answers, else of chosen ones, with or without their prompts.
        """
        if not self.kind.is_paired:
            return int(self.num_labelled.sum())
        first = self.answers.offsets[:-1]
        if self.has_gold:
            return int(self.scored_lengths.values[first + 2].sum())
        if not on_prompt:
            return int(self.scored_lengths.values[first].sum())
        # Nothing predicts a sequence's first token.
        return int((self.prompt_lengths + self.answers.values[first] - 1).clamp(min=0).sum())

    @property
    def has_gold(self) -> bool:
        """Whether each pair has a third, gold answer."""
        return self.kind.is_paired and len(self.answers.values) == 3 * len(self) > 0

    @property
    def width(self) -> int:
        """Rewards of a row, at most."""
        if self.kind.is_paired:
            return 2
        per_row = self.pieces if self.kind.name == "ranking" and self.pieces is not None else self.answers
        return int(per_row.counts.max())

    def sizes(self, rows: Tensor) -> list[list[int]]:
        """Of each row named, tokens of the prompt and of every answer."""
        return [[int(self.prompt_lengths[i]), *self.answers[i].tolist()] for i in rows.tolist()]

    def batch_tokens(self, layout: str) -> Tensor:
        """``(R,)``: tokens that a row adds to a batch; those of its longest sequence where it is padded.

        What rows of one batch have in common with each other is not known here: under ``shared_prompt`` it
        counts for each.
        """
        if layout == "padded":
            return self.lengths
        if layout == "shared_prompt":
            return self._distinct_tokens
        return self.prompt_lengths * self.answers.counts + self.answers.sums()

    @cached_property
    def _distinct_tokens(self) -> Tensor:
        """``(R,)``: tokens of a row's sequences, what several begin with once."""
        found = self.prompt_lengths + self.answers.sums()
        for index in (self.answers.counts > 1).nonzero()[:, 0].tolist():
            found[index] = self[index].distinct_tokens
        return found

    # Mismatched answers

    @cached_property
    def mismatched(self) -> Tensor:
        """``(R,)``: the row whose answer each prompt is mismatched with (``mismatched.py``)."""
        return mismatched_rows(self.tokens, self.starts, self.prompt_lengths)

    @cached_property
    def mismatched_lengths(self) -> Tensor:
        """``(R,)``: tokens of the answer that each prompt is mismatched with."""
        lengths = self.answers.values[self.answers.offsets[self.mismatched]]
        if self.max_length is not None:
            lengths = lengths.minimum(self.max_length - self.prompt_lengths).clamp(min=1)
        return lengths

    def _mismatched(self, index: int) -> Answer:
        """Another row's answer, as far as it fits behind the prompt."""
        other = int(self.mismatched[index])
        start = int(self.starts[other] + self.prompt_lengths[other])
        place = slice(start, start + int(self.mismatched_lengths[index]))
        return Answer(self.tokens[place], None if self.scored is None else self.scored[place])

    # Parts, hashes

    def subset(self, indices: Sequence[int] | Tensor) -> RowDataset:
        """The rows at ``indices``, sharing the token storage; mismatched answers come from among them."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        numbers: dict[str, Tensor | Ragged] = {
            name: values.subset(index) if isinstance(values, Ragged) else values[index]
            for name, values in self.numbers.items()
            if name != REF_MISMATCHED
        }
        return self._with(
            numbers,
            starts=self.starts[index],
            prompt_lengths=self.prompt_lengths[index],
            answers=self.answers.subset(index),
            rows=self.rows[index],
            pieces=None if self.pieces is None else self.pieces.subset(index),
            images=None if self.images is None else self.images.subset(index),
        )

    def with_numbers(self, **numbers: Tensor | Ragged) -> RowDataset:
        """The same rows with further, or replaced, numbers."""
        return self._with({**self.numbers, **numbers})

    def _with(self, numbers: Mapping[str, Tensor | Ragged], **changed: Any) -> RowDataset:
        same = {name: getattr(self, name) for name in _FIELDS}
        return RowDataset(**{**same, "numbers": numbers, **changed})

    def fingerprint(self) -> str:
        """Hash of token ids, boundaries, what is scored, and kind: equal exactly when these are."""
        settings = (
            f"{self.kind.name} {self.has_mismatched} {self.max_length if self.has_mismatched else None}"
        )
        digest = hashlib.blake2b(settings.encode(), digest_size=16)
        lengths = [self.prompt_lengths, self.answers.offsets, self.answers.values]
        for part in lengths if self.pieces is None else [*lengths, self.pieces.offsets, self.pieces.values]:
            digest.update(part.contiguous().numpy().tobytes())
        if self.images is not None:
            for index in range(len(self)):
                digest.update(self.images.digests(index).encode())
        for start, end in self.row_bounds.tolist():
            digest.update(self.tokens[start:end].numpy().tobytes())
            if self.scored is not None:
                digest.update(self.scored[start:end].numpy().tobytes())
        return digest.hexdigest()

    def row_digests(self) -> list[str]:
        """Of each row a short hash of the tokens that its reference is of; of a gold answer there is none."""
        found = []
        for index in range(len(self)):
            prompt, *answers = self._judged(self.tokens, index)
            sizes = [len(prompt), *map(len, answers)]
            pieces = [] if self.pieces is None else self.pieces[index].tolist()
            scored = None if self.scored is None else torch.cat(self._judged(self.scored, index)[1:])
            ends = [*sizes, *pieces, *([] if self.images is None else [self.images.digests(index)])]
            found.append(token_digest(torch.cat([prompt, *answers]), ends, scored))
        return found

    def _judged(self, values: Chunks, index: int) -> list[Tensor]:
        parts = self._parts(values, index)
        return parts[:3] if self.kind.is_paired else parts

    # Reference log-probabilities: one for each answer, piece or token, then the mismatched answers' sums

    @cached_property
    def reference_rows(self) -> Ragged:
        """How many numbers of the reference each row has; the values are of no interest."""
        counts = self.answers.counts.clamp(max=2) if self.kind.is_paired else self.answers.counts
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
        return (len(self.reference_rows.values) + (len(self) if self.has_mismatched else 0),)

    def put_scores(self, scores: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write the scores of a batch of ``rows``, row after row, where they belong."""
        places = self.reference_rows
        index = places.places(rows)
        if self.has_mismatched:
            index = torch.cat([index, len(places.values) + rows])
        scores[index] = values

    def with_reference(self, scores: Tensor) -> RowDataset:
        """The same rows with reference log-probabilities, in the shape ``score_shape``."""
        rows = self.reference_rows
        count = len(rows.values)
        found: dict[str, Tensor | Ragged] = {REFERENCE: Ragged(scores[:count], rows.offsets)}
        if self.has_mismatched:
            found[REF_MISMATCHED] = scores[count:]
        return self.with_numbers(**found)

    def rows_not_finite(self, scores: Tensor) -> list[int]:
        """Rows with a score that is NaN or infinite."""
        rows = self.reference_rows
        is_bad = ~torch.isfinite(scores)
        bad = Ragged(is_bad[: len(rows.values)].long(), rows.offsets).sums() > 0
        if self.has_mismatched:
            bad |= is_bad[len(rows.values) :]
        found: list[int] = self.rows[bad].tolist()
        return found


def split_rows(dataset: RowDataset, held_out: float, *, seed: int) -> tuple[RowDataset, RowDataset]:
    """Split into (training, held-out) rows, the same way for the same seed.

    Args:
        held_out: a fraction in (0, 1), or a whole number of rows from 1.

    Raises:
        ValueError: a split that leaves either side empty.
    """
    count = round(held_out * len(dataset)) if held_out < 1 else int(held_out)
    if not 0 < count < len(dataset) or (held_out >= 1 and count != held_out):
        raise ValueError(
            f"held_out: got {held_out} of {len(dataset)} {dataset.kind.unit}, wanted a fraction in (0, 1) or "
            f"a whole number that leaves {dataset.kind.unit} on both sides"
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset.subset(order[count:].sort().values), dataset.subset(order[:count].sort().values)
