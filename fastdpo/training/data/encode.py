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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.data.columns import Survey, check_prompt_column, survey
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.formats import RowReader, Wanted
from fastdpo.training.data.maker import LeftOut, MadeRow, RowMaker
from fastdpo.training.data.processes import made_in_order
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.references import RowReferences
from fastdpo.training.data.report import DataReport
from fastdpo.training.data.source import RowSource
from fastdpo.training.data.texts import TextReader
from fastdpo.training.data.tokens import RowTokenizer, short_hash
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.row_checks import BadRow, Finding

# Numbers of which a row has one for each answer or piece.
PER_ANSWER = ("scores", "advantages")


def encode_rows(
    source: RowSource,
    tokenizer: Any,
    options: EncodingOptions,
    wanted: Wanted | None = None,
    found: Survey | None = None,
) -> RowDataset:
    """Tokenise rows into a data set whose ``report`` says what became of each.

    Args:
        wanted: what the losses ask of the data; by default pairs.
        found: ``survey(source)``, where it is known.

    Raises:
        ValueError: a row of the wrong shape, a tokenizer that lacks what the rows need, a bad row
            under ``on_bad_row="error"``, more of them than ``max_bad_rows``, or no row left.
    """
    return _RowEncoder(source, tokenizer, options, wanted or Wanted(), found).run()


class _RowEncoder:
    """Collects the rows of one data set, batch by batch. Arguments as of ``encode_rows``."""

    def __init__(
        self,
        source: RowSource,
        tokenizer: Any,
        options: EncodingOptions,
        wanted: Wanted,
        found: Survey | None,
    ) -> None:
        self.source, self.options, self.wanted, self.kind = source, options, wanted, wanted.kind
        self.found = survey(source) if found is None else found
        may_be_shared = {"chosen", "rejected"} <= set(self.found.names)
        check_prompt_column(self.found, source.name, may_be_shared=may_be_shared)
        texts = TextReader(
            source.name,
            tokenizer,
            options.assistant_only,
            # Where no row has one it is what two answers share, or misses.
            has_prompts="prompt" in self.found.filled or not may_be_shared,
            cuts_echoes=self.found.prompts_repeated,
        )
        self.reader = RowReader(texts, wanted, options.columns)
        self.tokenizer, self.made_with = RowTokenizer(tokenizer), made_with(options, tokenizer)
        self.references = RowReferences(source.name, options.references) if options.references else None
        self.tokens: list[Tensor] = []
        self.rows: list[int] = []
        self.sizes: list[tuple[int, list[int], tuple[int, ...]]] = []  # prompt, answers, pieces
        self.numbers: dict[str, list[Any]] = defaultdict(list)
        self.report = DataReport(source.name, len(source), 0, unit=self.kind.unit)
        self._masks: dict[int, Tensor] = {}
        self._skipped: dict[str, list[int]] = defaultdict(list)
        self._noted: dict[str, list[int]] = defaultdict(list)
        self._details: dict[str, str] = {}
        self._truncated = self._unscored = 0

    def run(self) -> RowDataset:
        """Encode all rows. Raises ValueError, as ``encode_rows``."""
        maker = RowMaker(self.reader.render, self.tokenizer, self.options, self.kind)
        made = made_in_order(maker, self.source, self.options.processes, show=self.options.show_progress)
        # Rows are gone through once more only where something is read of them here.
        rows = None if self.references is None else iter(self.source)
        for parts in made:
            if self.references is not None and rows is not None:
                self.references.expect(*next(rows))
            for part in parts:
                self._take(part)
        used = ("prompt", "tools", "chat_template_kwargs", *self.reader.used(self.found.names))
        used = (*used, *self.options.columns.values(), *self.options.references)
        self.report = self._finished(self.found.unused(used))
        dataset = self._dataset()
        return dataset if self.references is None else self.references.added_to(dataset)

    def _dataset(self) -> RowDataset:
        lengths = torch.tensor([len(row) for row in self.tokens])
        prompts, answers, pieces = zip(*self.sizes, strict=True)
        return RowDataset(
            self.kind,
            torch.cat(self.tokens),
            lengths.cumsum(0) - lengths,
            torch.tensor(prompts),
            Ragged.of_lists(answers, torch.int64),
            torch.tensor(self.rows),
            {
                name: Ragged.of_lists(values, torch.float32) if name in PER_ANSWER else torch.tensor(values)
                for name, values in self.numbers.items()
            },
            self.report,
            pieces=Ragged.of_lists(pieces, torch.int64) if self.kind.has_pieces else None,
            has_mismatched=self.wanted.has_mismatched,
            max_length=self.options.max_length,
            scored=self._scored(),
            made_with=self.made_with,
        )

    def _take(self, made: MadeRow | LeftOut) -> None:
        """Keep a row, or count it as left out."""
        if isinstance(made, LeftOut):
            self._leave_out(*made)
            return
        if self.references is not None:
            tokens = made.tokens
            counts = {
                "answer": len(tokens.answers),
                "piece": len(tokens.pieces),
                "token": tokens.num_scored[0],
            }
            try:
                self.references.check(made.number, sum(tokens.num_scored))
            except BadRow as bad:
                self._leave_out(made.number, bad.finding)
                return
            self.references.take(made.number, counts[self.kind.reference_per])
        self._note(made.number, made.findings)
        self._keep(made)

    def _keep(self, made: MadeRow) -> None:
        row = made.tokens
        if row.scored is not None:
            self._masks[len(self.rows)] = row.flat_scored()
            self._unscored += sum(map(len, row.answers)) - sum(row.num_scored)
        self._truncated += made.is_cut
        self.tokens.append(row.flat())
        self.rows.append(made.number)
        self.sizes.append((len(row.prompt), list(map(len, row.answers)), row.pieces))
        for name, value in made.numbers.items():
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

    def _scored(self) -> Tensor | None:
        """Of all tokens, which are scored; None where all of the answers' are."""
        if not self._masks:
            return None
        masks = []
        for place, tokens in enumerate(self.tokens):
            whole = torch.ones(len(tokens), dtype=torch.bool)
            whole[: self.sizes[place][0]] = False
            masks.append(self._masks.get(place, whole))
        return torch.cat(masks)


def made_with(options: EncodingOptions, tokenizer: Any) -> str:
    """What beside a row's text decides on its tokens, in words: tokenizer, template, length rule."""
    template = getattr(tokenizer, "chat_template", None)
    parts = {
        "tokenizer": short_hash([sorted(tokenizer.get_vocab().items()), tokenizer("")["input_ids"]]),
        "chat_template": short_hash(template) if template else None,
        "max_length": options.max_length,
        "truncation_mode": options.truncation_mode,
        "assistant_only": options.assistant_only,
    }
    return " ".join(f"{name}={value}" for name, value in parts.items())
