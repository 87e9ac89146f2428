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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.data.columns import Survey, check_prompt_column, survey
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encoded import EncodedRows, encoded_rows
from fastdpo.training.data.formats import RowReader, Wanted
from fastdpo.training.data.maker import PER_ANSWER, RowMaker
from fastdpo.training.data.processes import made_in_order
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.references import RowReferences
from fastdpo.training.data.report import DataReport
from fastdpo.training.data.source import RowSource
from fastdpo.training.data.texts import TextReader
from fastdpo.training.data.tokens import RowTokenizer, short_hash
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.row_checks import BadRow, Finding


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
    """Makes one data set and its report. Arguments as of ``encode_rows``."""

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
        self.tokenizer, self.made_with = tokenizer, made_with(options, tokenizer)
        self.references = RowReferences(source.name, options.references) if options.references else None
        self._skipped: dict[str, list[int]] = defaultdict(list)
        self._noted: dict[str, list[int]] = defaultdict(list)
        self._details: dict[str, str] = {}

    def run(self) -> RowDataset:
        """Encode all rows. Raises ValueError, as ``encode_rows``."""
        options, source = self.options, self.source
        maker = RowMaker(self.reader.render, RowTokenizer(self.tokenizer), options, self.kind)
        rows = encoded_rows(
            lambda: made_in_order(maker, source, options.processes, show=options.show_progress), self._told()
        )
        for number, finding in rows.left_out:
            self._count(self._skipped[finding.message], number, finding)
        places = torch.arange(len(rows.numbers))
        if self.references is not None:
            places = self._with_reference(self.references, rows)
        report = self._report(rows, places)
        dataset = self._dataset(rows, report)
        if len(places) < len(dataset):
            dataset = dataset.subset(places)
        return dataset if self.references is None else self.references.added_to(dataset)

    def _told(self) -> str | None:
        """All that decides on the rows' tokens and numbers, in words; None where not all of it has a name."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self.source.fingerprint is None or backend is None:
            return None
        options = replace(
            self.options, processes=None, show_progress=False, references=(), on_bad_row="", max_bad_rows=None
        )
        texts = self.reader.texts
        words = (
            self.source.fingerprint, self.source.name, options, self.wanted, texts.has_prompts,
            texts.cuts_echoes, self.made_with, type(self.tokenizer).__name__,
            self.tokenizer.special_tokens_map, backend.to_str(),
        )  # fmt: skip
        return "\n".join(map(str, words))

    def _dataset(self, rows: EncodedRows, report: DataReport) -> RowDataset:
        return RowDataset(
            self.kind,
            rows.tokens,
            rows.starts,
            rows.prompts,
            rows.answers,
            rows.numbers,
            {
                name: Ragged.of_lists(values, torch.float32) if name in PER_ANSWER else torch.tensor(values)
                for name, values in rows.values.items()
            },
            report,
            pieces=rows.pieces if self.kind.has_pieces else None,
            has_mismatched=self.wanted.has_mismatched,
            max_length=self.options.max_length,
            scored=rows.scored if rows.num_unscored.any() else None,
            made_with=self.made_with,
        )

    def _with_reference(self, references: RowReferences, rows: EncodedRows) -> Tensor:
        """Places of the rows whose reference can be used, and is taken; the others are left out."""
        for number, row in self.source:
            references.expect(number, row)
        scored = rows.answers.sums() - rows.num_unscored
        counts = {"answer": rows.answers.counts, "piece": rows.pieces.counts, "token": scored}
        kept = []
        for place, (number, num_scored, count) in enumerate(
            zip(rows.numbers.tolist(), scored.tolist(), counts[self.kind.reference_per].tolist(), strict=True)
        ):
            try:
                references.check(number, num_scored)
            except BadRow as bad:
                self._count(self._skipped[bad.finding.message], number, bad.finding)
                continue
            references.take(number, count)
            kept.append(place)
        return torch.tensor(kept, dtype=torch.int64)

    def _count(self, rows: list[int], row: int, finding: Finding) -> None:
        if rows[-1:] != [row]:  # a pair taken apart may fail a check twice
            rows.append(row)
        if finding.detail:
            self._details.setdefault(finding.message, finding.detail)

    def _report(self, rows: EncodedRows, places: Tensor) -> DataReport:
        """What became of the rows. Raises ValueError where too little is left, or nothing may be left out."""
        kept = set(rows.numbers[places].tolist())
        for number, finding in rows.found:
            if number in kept:
                self._count(self._noted[finding.check], number, finding)
        used = ("prompt", "tools", "chat_template_kwargs", *self.reader.used(self.found.names))
        used = (*used, *self.options.columns.values(), *self.options.references)
        report = DataReport(
            self.source.name,
            len(self.source),
            len(kept),
            skipped=dict(self._skipped),
            found=dict(self._noted),
            details=self._details,
            truncated=int(rows.is_cut[places].sum()),
            duplicates=len(places) - len(rows.digests[places].unique()),
            unit=self.kind.unit,
            parts=len(places),
            unscored=int(rows.num_unscored[places].sum()),
            unused=self.found.unused(used),
        )
        limit = self.options.max_bad_rows
        if report.skipped and self.options.on_bad_row == "error":
            raise ValueError(f"{report} (on_bad_row='error')")
        if not kept:
            raise ValueError(f"{report}: no {report.unit.removesuffix('s')} left")
        if limit is not None and report.share_skipped > limit:
            raise ValueError(
                f"{report}: {report.share_skipped:.0%} of the rows left out, wanted {limit:.0%} at most: "
                "see to the reasons, or allow more with max_bad_rows"
            )
        return report


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
