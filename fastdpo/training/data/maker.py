"""Rows to token ids, each by itself: rendered, tokenised, split, cut.

Nothing is counted or kept here, so it may run in other processes (``processes.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

from fastdpo.training.data.images import told_images
from fastdpo.training.data.seen import ImageReader, told_refs
from fastdpo.training.data.texts import RowTexts
from fastdpo.training.data.tokens import RowTokenizer, RowTokens, common_prefix, scored_between
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.kinds import DataKind
from fastdpo.training.settings.row_checks import CHECKS, BadRow, Finding

# Numbers of which a row has one for each answer or piece.
PER_ANSWER = ("scores", "advantages")
Render: TypeAlias = Callable[[Mapping[str, Any], int], Iterable[RowTexts | BadRow]]


class MadeRow(NamedTuple):
    """A row to keep.

    Args:
        number: of the row it is from.
        tokens: within ``max_length``.
        numbers: what the losses use.
        findings: of checks that the row stays in spite of, or that mended it.
        is_cut: whether ``max_length`` took something off it.
        images: what ``told_images`` says of its images.
    """

    number: int
    tokens: RowTokens
    numbers: Mapping[str, float | tuple[float, ...]]
    findings: tuple[Finding, ...]
    is_cut: bool
    images: str = ""


class LeftOut(NamedTuple):
    """A row that nothing can be learnt from, and why."""

    number: int
    finding: Finding


@dataclass(frozen=True)
class RowMaker:
    """Makes token ids of rows.

    Args:
        render: a row's texts; a row may be several.
        kind: of the data.
        images: reads them; None where rows have none.
    """

    render: Render
    tokenizer: RowTokenizer
    options: EncodingOptions
    kind: DataKind
    images: ImageReader | None = None

    def made(self, batch: Sequence[tuple[int, Mapping[str, Any]]]) -> list[list[MadeRow | LeftOut]]:
        """What becomes of each row, by its number; fast tokenizers spread a batch over the cores.

        Raises:
            ValueError: a row of the wrong shape, or a tokenizer that lacks what the rows need.
        """
        rendered = [(number, list(self._attempts(row, number))) for number, row in batch]
        texts = [item for _, parts in rendered for item in parts if isinstance(item, RowTexts)]
        flat = [text for item in texts for text in item.texts]
        is_chat = [item.is_chat for item in texts for _ in item.texts]
        ids = iter(self.tokenizer.tokenize(flat, is_chat))
        return [[self._one(number, item, ids) for item in parts] for number, parts in rendered]

    def _attempts(self, row: Mapping[str, Any], number: int) -> Iterable[RowTexts | BadRow]:
        try:
            for item in self.render(row, number):
                yield self._with_images(item)
        except BadRow as bad:
            yield bad

    def _with_images(self, item: RowTexts | BadRow) -> RowTexts | BadRow:
        if self.images is None or isinstance(item, BadRow):
            return item
        try:
            return self.images.read(item)
        except BadRow as bad:
            return bad

    def _one(self, number: int, item: RowTexts | BadRow, ids: Iterator[list[int]]) -> MadeRow | LeftOut:
        if isinstance(item, BadRow):
            return LeftOut(number, item.finding)
        prompt, *others = islice(ids, len(item.texts))
        answers = others[: len(item.answers)]
        rest = iter(others[len(answers) :])
        cuts = [list(islice(rest, len(part))) for part in item.cuts]
        try:
            return self._tokenised(item, prompt, answers, cuts)
        except BadRow as bad:
            return LeftOut(item.row, bad.finding)

    def _tokenised(
        self, texts: RowTexts, prompt: list[int], whole: list[list[int]], cuts: list[list[list[int]]]
    ) -> MadeRow:
        """Raises BadRow for a row that nothing can be learnt from."""
        for finding in texts.findings:
            if CHECKS[finding.check].may_stay and finding.check not in self.options.allow_bad_rows:
                raise BadRow(*finding)
        prompt, answers, is_merged = self.tokenizer.split(texts.prompt, prompt, whole, is_chat=texts.is_chat)
        if not prompt:
            # Its first answer token would have nothing to be predicted from.
            raise BadRow("empty_prompt")
        if not all(answers):
            raise BadRow("empty_completion")
        ends = [
            [common_prefix(full, cut) - len(prompt) for cut in part]
            for full, part in zip(whole, cuts, strict=False)
        ]
        row = self._cut_into(RowTokens(prompt, answers), ends)
        kept = self._within_max_length(row, texts)
        findings = (*texts.findings, *self._named(kept, is_merged))
        numbers: Any = texts.numbers
        if kept.pieces:
            count = len(kept.pieces)
            numbers = {
                name: value[:count] if name in PER_ANSWER else value for name, value in numbers.items()
            }
        images = told_images(told_refs(texts))
        return MadeRow(texts.row, kept, numbers, findings, kept.size < row.size, images)

    def _cut_into(self, row: RowTokens, ends: list[list[int]]) -> RowTokens:
        """The row with its pieces, or with what is scored of its answers."""
        if self.kind.has_pieces:
            bounds = [0, *ends[0], len(row.answers[0])]
            sizes = tuple(after - before for before, after in zip(bounds, bounds[1:], strict=False))
            if min(sizes) <= 0:
                raise BadRow("piece_tokens")
            return replace(row, pieces=sizes)
        if not any(ends):
            return row
        scored = [
            scored_between(part, len(answer)) if part else [True] * len(answer)
            for answer, part in zip(row.answers, ends, strict=True)
        ]
        return replace(row, scored=scored)

    def _within_max_length(self, row: RowTokens, texts: RowTexts) -> RowTokens:
        # What differs in its images is no repeat.
        is_one_view = len(set(texts.digests)) <= 1
        if is_one_view and self._are_equal(row.answers):
            raise BadRow("identical")
        self._check_images(row, texts, "image_tokens")
        kept, fault = row.truncated(self.options.max_length, self.options.truncation_mode)
        if fault is not None:
            raise BadRow(fault)
        if is_one_view and self._are_equal(kept.answers):
            raise BadRow("identical_cut")
        self._check_images(kept, texts, "image_cut")
        if self.kind.name == "ranking" and len(kept.pieces) < 2:
            raise BadRow("one_candidate_cut")
        if not all(kept.num_scored):
            raise BadRow("nothing_scored")
        return kept

    def _check_images(self, row: RowTokens, texts: RowTexts, check: str) -> None:
        """Raise BadRow where a sequence has other than its images' tokens."""
        if self.images is None:
            return
        in_prompt = self.images.tokens.count(row.prompt)
        wanted = texts.image_tokens or (0,) * len(row.answers)
        for answer, count in zip(row.answers, wanted, strict=True):
            found = in_prompt + self.images.tokens.count(answer)
            if found != count:
                raise BadRow(check, f"{found} tokens of images, wanted {count}")

    def _are_equal(self, answers: Sequence[list[int]]) -> bool:
        if self.kind.is_paired:
            return answers[0] == answers[1]
        return self.kind.name == "listwise" and all(answer == answers[0] for answer in answers)

    def _named(self, row: RowTokens, is_merged: bool) -> list[Finding]:
        unknown = self.tokenizer.unknown
        has_unknown = unknown is not None and any(unknown in part for part in (row.prompt, *row.answers))
        return [Finding("merged")] * is_merged + [Finding("unknown_tokens")] * has_unknown
