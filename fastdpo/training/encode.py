"""Rows to token ids: tokenisation, truncation, and what is left out. The same for all kinds of data.

Prompt and answer are tokenised together, as a model sees them, and the answer begins where the token
sequences (prompt, prompt + each answer) part: a token that spans the end of the prompt belongs to the
answer, and the report counts the row. So it is with what answers are cut into, turns and pieces: a token that
spans an end belongs to what comes next.

Rows of the wrong shape raise. Rows nothing can be learnt from, or not what they say, are skipped and counted,
or raise, as ``on_bad_row`` says (``checks.py`` has what is checked). Where an answer is cut, pieces behind
the cut go with their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.checks import CHECKS, BadRow, Finding
from fastdpo.training.columns import Survey, check_prompt_column, survey
from fastdpo.training.data import PreferenceDataset, RowSource
from fastdpo.training.formats import render_pair
from fastdpo.training.kinds import DataKind
from fastdpo.training.report import DataReport
from fastdpo.training.row_references import RowReferences
from fastdpo.training.row_texts import RowTexts, TextReader
from fastdpo.training.row_tokens import RowTokenizer, RowTokens, common_prefix, scored_between, short_hash

BAD_ROW_POLICIES = ("skip", "error")
# Rows are tokenised in batches, which fast tokenizers spread over the cores.
BATCH_ROWS = 256
# Numbers of which a row has one for each answer or piece.
PER_ANSWER = ("scores", "advantages")


@dataclass(frozen=True)
class EncodingOptions:
    """How rows become tokens.

    Args:
        max_length: the longest prompt + answer, in tokens (at least 2); None for no limit.
        truncation_mode: ``keep_start`` cuts the end of an answer that is too long (a prompt that
            alone fills ``max_length`` is a bad row); ``keep_end`` cuts the start of the prompt, by
            the same amount for both answers, and the end of an answer only when one token of prompt
            is left; ``skip`` treats any longer row as a bad row.
        on_bad_row: ``skip`` leaves rows nothing can be learnt from out, counted; ``error`` raises.
        columns: per-pair numbers to carry along: their name in the data set -> the row's column.
        gold_column: of third, gold answers, which are bound to ``max_length`` like the others.
        assistant_only: of answers of several turns only the assistant's are scored.
        allow_bad_rows: names of checks that rows may fail and still be used.
        max_bad_rows: the largest share of rows left out; None for any.
        references: the columns of the reference's log-probabilities to read with each row, if any.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    on_bad_row: str = "skip"
    columns: Mapping[str, str] = field(default_factory=dict)
    gold_column: str | None = None
    assistant_only: bool = True
    allow_bad_rows: Sequence[str] = ()
    max_bad_rows: float | None = None
    references: Sequence[str] = ()

    def made_with(self, tokenizer: Any) -> str:
        """What beside a row's text decides on its tokens, in words: tokenizer, template, length rule."""
        template = getattr(tokenizer, "chat_template", None)
        parts = {
            "tokenizer": short_hash([sorted(tokenizer.get_vocab().items()), tokenizer("")["input_ids"]]),
            "chat_template": short_hash(template) if template else None,
            "max_length": self.max_length,
            "truncation_mode": self.truncation_mode,
            "assistant_only": self.assistant_only,
        }
        return " ".join(f"{name}={value}" for name, value in parts.items())


def encode_rows(
    source: RowSource, tokenizer: Any, options: EncodingOptions, found: Survey | None = None
) -> PreferenceDataset:
    """Tokenise pairs into a ``PreferenceDataset`` whose ``report`` says what became of each row.

    Args:
        found: ``survey(source)``, where it is known.

    Raises:
        ValueError: a row of the wrong shape, a tokenizer that lacks what the rows need, a bad row
            under ``on_bad_row="error"``, more of them than ``max_bad_rows``, or no row left.
    """
    encoder = RowEncoder(source, tokenizer, options, found=found)
    gold = [] if options.gold_column is None else [options.gold_column]
    encoder.run(
        lambda row, number: render_pair(row, number, encoder.reader, options.columns, options.gold_column),
        used=("chosen", "rejected", *gold),
    )
    sizes = torch.tensor([(prompt, *answers) for prompt, answers, _ in encoder.sizes])
    ends = sizes.flatten().cumsum(0).view(sizes.shape)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1, -1]])
    dataset = PreferenceDataset(
        torch.cat(encoder.tokens),
        torch.column_stack([starts, ends]),
        torch.tensor(encoder.rows),
        {name: torch.tensor(encoder.numbers[name]) for name in options.columns},
        encoder.report,
        scored=encoder.scored(),
        made_with=encoder.made_with,
    )
    return encoder.with_references(dataset)


class RowEncoder:
    """Collects the rows of one data set, batch by batch.

    Args:
        source, tokenizer, options: what is encoded, and how.
        kind: of the data; None for pairs.
        has_mismatched: whether the reference's numbers are of mismatched answers, too.
        found: ``survey(source)``.
    """

    def __init__(
        self,
        source: RowSource,
        tokenizer: Any,
        options: EncodingOptions,
        *,
        kind: DataKind | None = None,
        found: Survey | None = None,
    ) -> None:
        self.source, self.options, self.kind = source, options, kind
        self.found = survey(source) if found is None else found
        may_be_shared = {"chosen", "rejected"} <= set(self.found.names)
        check_prompt_column(self.found, source.name, may_be_shared=may_be_shared)
        self.reader = TextReader(
            source.name,
            tokenizer,
            options.assistant_only,
            # Where no row has one it is what two answers share, or misses.
            has_prompts="prompt" in self.found.filled or not may_be_shared,
            cuts_echoes=self.found.prompts_repeated,
        )
        self.tokenizer, self.made_with = RowTokenizer(tokenizer), options.made_with(tokenizer)
        self.references = RowReferences(source.name, options.references) if options.references else None
        self.tokens: list[Tensor] = []
        self.rows: list[int] = []
        self.sizes: list[tuple[int, list[int], tuple[int, ...]]] = []  # prompt, answers, pieces
        self.numbers: dict[str, list[Any]] = defaultdict(list)
        self.report = DataReport(source.name, len(source), 0, unit="pairs" if kind is None else "rows")
        self._masks: dict[int, Tensor] = {}
        self._skipped: dict[str, list[int]] = defaultdict(list)
        self._noted: dict[str, list[int]] = defaultdict(list)
        self._details: dict[str, str] = {}
        self._truncated = self._unscored = 0

    def run(
        self,
        render: Callable[[Mapping[str, Any], int], Iterable[RowTexts | BadRow]],
        *,
        used: Sequence[str],
    ) -> None:
        """Encode all rows, rendered by ``render``, which reads the columns ``used`` beside those of all
        kinds.

        Raises:
            ValueError: as ``encode_rows``.
        """
        rows = iter(self.source)
        while batch := list(islice(rows, BATCH_ROWS)):
            texts = []
            for number, row in batch:
                if self.references is not None:
                    self.references.expect(number, row)
                for rendered in _attempts(render, row, number):
                    if isinstance(rendered, BadRow):
                        self._leave_out(number, rendered.finding)
                    else:
                        texts.append(rendered)
            self._add(texts)
        common = ("prompt", "tools", "chat_template_kwargs")
        used = (*common, *used, *self.options.columns.values(), *self.options.references)
        self.report = self._finished(self.found.unused(used))

    def _add(self, batch: Sequence[RowTexts]) -> None:
        flat = [text for texts in batch for text in texts.texts]
        is_chat = [texts.is_chat for texts in batch for _ in texts.texts]
        ids = iter(self.tokenizer.tokenize(flat, is_chat))
        for texts in batch:
            prompt, *others = islice(ids, len(texts.texts))
            answers = others[: len(texts.answers)]
            rest = iter(others[len(answers) :])
            cuts = [list(islice(rest, len(part))) for part in texts.cuts]
            try:
                self._add_row(texts, prompt, answers, cuts)
            except BadRow as bad:
                self._leave_out(texts.row, bad.finding)

    def _add_row(
        self, texts: RowTexts, prompt: list[int], whole: list[list[int]], cuts: list[list[list[int]]]
    ) -> None:
        """Keep a row. Raises BadRow for one that nothing can be learnt from."""
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
        kept = self._within_max_length(row)
        if self.references is not None:
            self.references.check(texts.row, sum(kept.num_scored))
            per = "answer" if self.kind is None else self.kind.reference_per
            counts = {"answer": len(answers), "piece": len(kept.pieces), "token": kept.num_scored[0]}
            self.references.take(texts.row, counts[per])
        self._note(texts.row, [*texts.findings, *self._named(kept, is_merged)])
        self._keep(texts, kept, is_cut=kept.size < row.size)

    def _cut_into(self, row: RowTokens, ends: list[list[int]]) -> RowTokens:
        """The row with its pieces, or with what is scored of its answers."""
        if self.kind is not None and self.kind.has_pieces:
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

    def _within_max_length(self, row: RowTokens) -> RowTokens:
        if self._are_equal(row.answers):
            raise BadRow("identical")
        kept, fault = row.truncated(self.options.max_length, self.options.truncation_mode)
        if fault is not None:
            raise BadRow(fault)
        if self._are_equal(kept.answers):
            raise BadRow("identical_cut")
        if self.kind is not None and self.kind.name == "ranking" and len(kept.pieces) < 2:
            raise BadRow("one_candidate_cut")
        if not all(kept.num_scored):
            raise BadRow("nothing_scored")
        return kept

    def _are_equal(self, answers: Sequence[list[int]]) -> bool:
        if self.kind is None:
            return answers[0] == answers[1]
        return self.kind.name == "listwise" and all(answer == answers[0] for answer in answers)

    def _named(self, row: RowTokens, is_merged: bool) -> list[Finding]:
        unknown = self.tokenizer.unknown
        has_unknown = unknown is not None and any(unknown in part for part in (row.prompt, *row.answers))
        return [Finding("merged")] * is_merged + [Finding("unknown_tokens")] * has_unknown

    def _keep(self, texts: RowTexts, row: RowTokens, *, is_cut: bool) -> None:
        if row.scored is not None:
            self._masks[len(self.rows)] = row.flat_scored()
            self._unscored += sum(map(len, row.answers)) - sum(row.num_scored)
        self._truncated += is_cut
        self.tokens.append(row.flat())
        self.rows.append(texts.row)
        self.sizes.append((len(row.prompt), list(map(len, row.answers)), row.pieces))
        for name, value in texts.numbers.items():
            if row.pieces and name in PER_ANSWER:
                value = value[: len(row.pieces)]  # type: ignore[index]
            self.numbers[name].append(value)

    def _leave_out(self, row: int, finding: Finding) -> None:
        self._count(self._skipped[finding.message], row, finding)

    def _note(self, row: int, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._count(self._noted[finding.check], row, finding)

    def _count(self, rows: list[int], row: int, finding: Finding) -> None:
        if rows[-1:] != [row]:  # a pair taken apart may fail a check twice
            rows.append(row)
        if finding.detail:
            self._details.setdefault(finding.message, finding.detail)

    def _finished(self, unused: Sequence[str]) -> DataReport:
        """What became of the rows. Raises ValueError where too little is left, or nothing may be left out."""
        report = replace(
            self.report,
            kept=len(set(self.rows)),
            skipped=dict(self._skipped),
            found=dict(self._noted),
            details=self._details,
            duplicates=len(self.tokens) - len({row.numpy().tobytes() for row in self.tokens}),
            parts=len(self.rows),
            unused=unused,
            truncated=self._truncated,
            unscored=self._unscored,
        )
        limit = self.options.max_bad_rows
        if report.skipped and self.options.on_bad_row == "error":
            raise ValueError(f"{report} (on_bad_row='error')")
        if not self.tokens:
            raise ValueError(f"{report}: no {report.unit.removesuffix('s')} left")
        if limit is not None and report.share_skipped > limit:
            raise ValueError(
                f"{report}: {report.share_skipped:.0%} of the rows left out, wanted {limit:.0%} at most: "
                "see to the reasons, or allow more with max_bad_rows"
            )
        return report

    def scored(self) -> Tensor | None:
        """Of all tokens, which are scored; None where all of the answers' are."""
        if not self._masks:
            return None
        masks = []
        for place, tokens in enumerate(self.tokens):
            whole = torch.ones(len(tokens), dtype=torch.bool)
            whole[: self.sizes[place][0]] = False
            masks.append(self._masks.get(place, whole))
        return torch.cat(masks)

    def with_references(self, dataset: Any) -> Any:
        """The rows kept with the reference's log-probabilities that came with them."""
        return dataset if self.references is None else self.references.added_to(dataset)


def _attempts(
    render: Callable[[Mapping[str, Any], int], Iterable[RowTexts | BadRow]],
    row: Mapping[str, Any],
    number: int,
) -> Iterable[RowTexts | BadRow]:
    try:
        yield from render(row, number)
    except BadRow as bad:
        yield bad
