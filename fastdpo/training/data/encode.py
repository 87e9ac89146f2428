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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdpo.integrations.processor import ImageTokens, tokenizer_of
from fastdpo.training.data.columns import Survey, check_prompt_column, survey
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encoded import EncodedRows, encoded_rows
from fastdpo.training.data.formats import RowReader, Wanted
from fastdpo.training.data.images import IMAGE_COLUMNS, IMAGES_REJECTED, ImageFolders, RowImages
from fastdpo.training.data.maker import PER_ANSWER, RowMaker
from fastdpo.training.data.processes import made_in_order
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.references import RowReferences
from fastdpo.training.data.report import DataReport
from fastdpo.training.data.seen import ImageReader
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
    wanted = wanted or Wanted()
    return RowEncoder(source.name, tokenizer, options, wanted, found or survey(source)).whole(source)


@dataclass(frozen=True)
class RowEncoder:
    """Tokenises rows in one way: all of a source, or one part of a stream after the other.

    Args:
        name: of the place that the rows come from.
        tokenizer: or a processor, which sees images.
        found: which columns they have.
    """

    name: str
    tokenizer: Any
    options: EncodingOptions
    wanted: Wanted
    found: Survey

    @cached_property
    def maker(self) -> RowMaker:
        """Makes token ids of rows."""
        tokenizer = RowTokenizer(self.texts_tokenizer)
        return RowMaker(self.reader.render, tokenizer, self.options, self.wanted.kind, self.images)

    @cached_property
    def texts_tokenizer(self) -> Any:
        """The tokenizer itself."""
        return tokenizer_of(self.tokenizer)

    @cached_property
    def images(self) -> ImageReader | None:
        """Reads images; None of a tokenizer. Raises ValueError for images that nothing looks at."""
        columns = [name for name in IMAGE_COLUMNS if name in self.found.filled]
        found = ImageTokens.of(self.tokenizer, must_see=bool(columns))
        if found is None and columns:
            raise ValueError(
                f"{self.name}: the rows have images (column {columns[0]!r}), but a "
                f"{type(self.tokenizer).__name__} sees none: wanted a model of images and text with its "
                f"processor, or --ignore_columns {' '.join(columns)}"
            )
        return None if found is None else ImageReader(found, self.folders)

    @property
    def folders(self) -> ImageFolders:
        """What paths of images are relative to."""
        return ImageFolders(self.name, self.options.image_folder)

    @cached_property
    def reader(self) -> RowReader:
        """Reads their texts. Raises ValueError where there is no prompt, but a column that sounds like it."""
        may_be_shared = {"chosen", "rejected"} <= set(self.found.names)
        check_prompt_column(self.found, self.name, may_be_shared=may_be_shared)
        texts = TextReader(
            self.name,
            self.texts_tokenizer,
            self.options.assistant_only,
            # Where no row has one it is what two answers share, or misses.
            has_prompts="prompt" in self.found.filled or not may_be_shared,
            cuts_echoes=self.found.prompts_repeated,
            placeholder=None if self.images is None else self.images.tokens.placeholder,
        )
        self._check_two_views()
        return RowReader(texts, self.wanted, self.options.columns, self.options.image_conditional_pairs)

    def _check_two_views(self) -> None:
        if not self.options.image_conditional_pairs:
            return
        if self.images is None or IMAGES_REJECTED not in self.found.filled:
            raise ValueError(
                f"image_conditional_pairs: got True with {self.name}, which has the columns "
                f"{', '.join(self.found.names)}, wanted {IMAGES_REJECTED} and a model that sees images"
            )
        if self.options.references:
            raise ValueError(
                "image_conditional_pairs: got True with rows that have reference log-probabilities, which "
                "are of one pair a row; wanted --ignore_columns " + " ".join(self.options.references)
            )

    @cached_property
    def made_with(self) -> str:
        """What beside the rows' texts decides on the tokens, in words."""
        told = made_with(self.options, self.texts_tokenizer)
        return told if self.images is None else f"{told} images={short_hash(self.images.tokens.told())}"

    def whole(self, source: RowSource) -> RowDataset:
        """All rows of a source. Raises ValueError, as ``encode_rows``."""
        dataset, report = self.part(source)
        if dataset is None:
            raise ValueError(f"{report}: no {report.unit.removesuffix('s')} left")
        check_share(report, report.share_skipped, self.options.max_bad_rows)
        return dataset

    def part(self, source: RowSource) -> tuple[RowDataset | None, DataReport]:
        """Some rows, or None where nothing is left of them, and what became of them.

        Raises:
            ValueError: as ``encode_rows``, but for too few rows that are left.
        """
        return _Encoding(self, source).run()

    def told(self, source: RowSource) -> str | None:
        """All that decides on the rows' tokens and numbers, in words; None where not all of it has a name."""
        tokenizer = self.texts_tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if source.fingerprint is None or backend is None:
            return None
        options = replace(
            self.options, processes=None, show_progress=False, references=(), on_bad_row="", max_bad_rows=None
        )
        texts = self.reader.texts
        words = (
            source.fingerprint, source.name, options, self.wanted, texts.has_prompts,
            texts.cuts_echoes, self.made_with, type(tokenizer).__name__,
            tokenizer.special_tokens_map, tokenizer.chat_template, backend.to_str(),
            # An image that was not there may be there now.
            "" if self.images is None else self.folders.state(source),
        )  # fmt: skip
        return "\n".join(map(str, words))


class _Encoding:
    """Makes one data set and its report."""

    def __init__(self, encoder: RowEncoder, source: RowSource) -> None:
        self.encoder, self.source = encoder, source
        self.options, self.kind, self.reader = encoder.options, encoder.wanted.kind, encoder.reader
        columns = self.options.references
        self.references = RowReferences(source.name, columns) if columns else None
        self._skipped: dict[str, list[int]] = defaultdict(list)
        self._noted: dict[str, list[int]] = defaultdict(list)
        self._details: dict[str, str] = {}

    def run(self) -> tuple[RowDataset | None, DataReport]:
        """Encode all rows. Raises ValueError, as ``RowEncoder.part``."""
        options, source, maker = self.options, self.source, self.encoder.maker
        rows = encoded_rows(
            lambda: made_in_order(maker, source, options.processes, show=options.show_progress),
            self.encoder.told(source),
        )
        for number, finding in rows.left_out:
            self._count(self._skipped[finding.message], number, finding)
        places = torch.arange(len(rows.numbers))
        if self.references is not None:
            places = self._with_reference(self.references, rows)
        report = self._report(rows, places)
        if report.skipped and options.on_bad_row == "error":
            raise ValueError(f"{report} (on_bad_row='error')")
        if not len(places):
            return None, report
        dataset = self._dataset(rows, report)
        if len(places) < len(dataset):
            dataset = dataset.subset(places)
        return (dataset if self.references is None else self.references.added_to(dataset)), report

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
            has_mismatched=self.encoder.wanted.has_mismatched,
            max_length=self.options.max_length,
            scored=rows.scored if rows.num_unscored.any() else None,
            made_with=self.encoder.made_with,
            images=self._images(rows),
        )

    def _images(self, rows: EncodedRows) -> RowImages | None:
        if self.encoder.images is None or rows.images.nbytes <= 4 * (
            len(rows.images) + len(rows.images.chunks)
        ):
            return None  # no more than the offsets of empty texts
        return RowImages(self.source, self.encoder.folders, rows.images, rows.entries, rows.places)

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
        found = self.encoder.found
        kept = set(rows.numbers[places].tolist())
        for number, finding in rows.found:
            if number in kept:
                self._count(self._noted[finding.check], number, finding)
        used = ("prompt", "tools", "chat_template_kwargs", *self.reader.used(found.names))
        used = (*used, *([] if self.encoder.images is None else IMAGE_COLUMNS))
        used = (*used, *self.options.columns.values(), *self.options.references)
        return DataReport(
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
            unused=found.unused(used),
        )


def check_share(report: Any, share: float, limit: float | None) -> None:
    """Raise ValueError where more rows than ``limit``, a share of them, are left out."""
    if limit is not None and share > limit:
        raise ValueError(
            f"{report}: {share:.0%} of the rows left out, wanted {limit:.0%} at most: "
            "see to the reasons, or allow more with max_bad_rows"
        )


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
