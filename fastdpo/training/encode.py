"""Rows to token ids: tokenisation, truncation, and what is left out.

Prompt and answer are tokenised together, as a model sees them, and the answer begins where the
three token sequences (prompt, prompt + chosen, prompt + rejected) part: a token that spans the end
of the prompt belongs to the answer, and the report counts the row.

Rows of the wrong shape raise. Rows nothing can be learnt from (an empty prompt or answer, identical
answers, a prompt that fills ``max_length``, a number that is not finite) are skipped and counted,
or raise, as ``on_bad_row`` says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.data import DataReport, PreferenceDataset, RowSource
from fastdpo.training.formats import PairTexts, render_row

TRUNCATION_MODES = ("keep_start", "keep_end", "skip")
BAD_ROW_POLICIES = ("skip", "error")
# Rows are tokenised in batches, which fast tokenizers spread over the cores.
BATCH_ROWS = 256


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
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    on_bad_row: str = "skip"
    columns: Mapping[str, str] = field(default_factory=dict)
    gold_column: str | None = None


@dataclass(frozen=True)
class _Pair:
    prompt: list[int]
    answers: list[list[int]]  # chosen, rejected and, if any, gold

    @property
    def parts(self) -> list[list[int]]:
        return [self.prompt, *self.answers]

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))


def encode_rows(source: RowSource, tokenizer: Any, options: EncodingOptions) -> PreferenceDataset:
    """Tokenise rows into a ``PreferenceDataset`` whose ``report`` says what became of each.

    Raises:
        ValueError: a row of the wrong shape, a tokenizer that lacks what the rows need, a bad row
            under ``on_bad_row="error"``, or no row left.
    """
    encoder = _Encoder(tokenizer, options)
    rows = iter(source)
    while batch := list(islice(rows, BATCH_ROWS)):
        encoder.add(
            [
                render_row(row, number, source.name, tokenizer, options.columns, options.gold_column)
                for number, row in batch
            ]
        )
    return encoder.finish(source)


class RowTokenizer:
    """Tokens of texts, and where in them an answer begins."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def tokenize(self, texts: Sequence[str], is_chat: Sequence[bool]) -> list[list[int]]:
        """Token ids of each text; the tokenizer adds its special tokens to plain texts only."""
        ids: list[list[int]] = [[] for _ in texts]
        for chat in set(is_chat):
            places = [i for i, value in enumerate(is_chat) if value == chat]
            encoded = self.tokenizer(
                [texts[i] for i in places],
                add_special_tokens=not chat,
                return_attention_mask=False,
                verbose=False,
            )
            for place, tokens in zip(places, encoded["input_ids"], strict=True):
                ids[place] = list(tokens) if chat else self._without_extra_bos(list(tokens))
        return ids

    def split(
        self, prompt_text: str, prompt: list[int], texts: Sequence[list[int]], *, is_chat: bool
    ) -> tuple[list[int], list[list[int]], bool]:
        """Prompt and answers, and whether the prompt's last tokens are others once an answer follows.

        Args:
            prompt_text, prompt: the prompt and its tokens.
            texts: tokens of the prompt with each answer.
            is_chat: texts hold their special tokens; else each answer gets an end.
        """
        if not is_chat:
            texts = [self._ended(text) for text in texts]
            # A tokenizer that ends every text ends the prompt too, which the answer follows.
            is_ended = prompt[-1:] == [self.tokenizer.eos_token_id]
            if is_ended and not prompt_text.endswith(self.tokenizer.eos_token):
                prompt = prompt[:-1]
        shared = min(common_prefix(prompt, text) for text in texts)
        return prompt[:shared], [text[shared:] for text in texts], shared < len(prompt)

    def _without_extra_bos(self, ids: list[int]) -> list[int]:
        # A text that already starts with the BOS token gets a second one from the tokenizer.
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _ended(self, ids: list[int]) -> list[int]:
        """``ids`` with exactly one EOS at the end, whatever the text and the tokenizer put there."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                "the tokenizer has no EOS token, so answers given as strings would have no end: set "
                "tokenizer.eos_token"
            )
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        return [*ids, eos]


@dataclass
class EncodedRows:
    """Tokens of the rows that are kept, and what became of all of them."""

    tokens: list[Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    skipped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    merged: list[int] = field(default_factory=list)
    truncated: int = 0

    def keep(self, row: int, parts: Iterable[Sequence[int]], whole: int, *, is_merged: bool) -> None:
        """Row ``row``, of prompt and answers that had ``whole`` tokens before they were cut."""
        tokens = torch.tensor([token for part in parts for token in part], dtype=torch.int32)
        self.tokens.append(tokens)
        self.rows.append(row)
        self.truncated += len(tokens) < whole
        if is_merged:
            self.merged.append(row)

    def report(self, source: RowSource, options: EncodingOptions, unit: str) -> DataReport:
        """What became of the rows of ``source``, ``unit`` of them.

        Raises:
            ValueError: a bad row under ``on_bad_row="error"``, or no row left.
        """
        report = DataReport(
            source=source.name,
            rows=len(source),
            kept=len(self.tokens),
            skipped=dict(self.skipped),
            merged=self.merged,
            truncated=self.truncated,
            duplicates=len(self.tokens) - len({row.numpy().tobytes() for row in self.tokens}),
            unit=unit,
        )
        if self.skipped and options.on_bad_row == "error":
            raise ValueError(f"{report} (on_bad_row='error')")
        if not self.tokens:
            raise ValueError(f"{report}: no {unit.removesuffix('s')} left")
        return report


class _Encoder:
    """Collects the pairs of one data set, batch by batch."""

    def __init__(self, tokenizer: Any, options: EncodingOptions) -> None:
        self.tokenizer, self.options = RowTokenizer(tokenizer), options
        self.encoded = EncodedRows()
        self.sizes: list[list[int]] = []
        self.columns: dict[str, list[float]] = {key: [] for key in options.columns}

    def add(self, batch: Sequence[PairTexts]) -> None:
        flat = [text for texts in batch for text in (texts.prompt, *texts.answers)]
        count = len(flat) // max(len(batch), 1)
        ids = self.tokenizer.tokenize(flat, [texts.is_chat for texts in batch for _ in range(count)])
        for i, texts in enumerate(batch):
            self._add_pair(texts, *ids[count * i : count * (i + 1)])

    def finish(self, source: RowSource) -> PreferenceDataset:
        report = self.encoded.report(source, self.options, "pairs")
        ends = torch.tensor(self.sizes).flatten().cumsum(0).view(len(self.sizes), -1)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1, -1]])
        columns = {key: torch.tensor(values) for key, values in self.columns.items()}
        return PreferenceDataset(
            torch.cat(self.encoded.tokens),
            torch.column_stack([starts, ends]),
            torch.tensor(self.encoded.rows),
            columns,
            report,
        )

    def _add_pair(self, texts: PairTexts, prompt: list[int], *with_answers: list[int]) -> None:
        prompt, answers, is_merged = self.tokenizer.split(
            texts.prompt, prompt, with_answers, is_chat=texts.is_chat
        )
        pair = _Pair(prompt, answers)
        reason = _why_bad(texts, pair)
        if reason is None:
            cut, reason = _truncate(pair, self.options)
        if reason is not None:
            self.encoded.skipped[reason].append(texts.row)
            return
        self.encoded.keep(texts.row, cut.parts, pair.size, is_merged=is_merged)
        self.sizes.append([len(part) for part in cut.parts])
        for key, value in texts.columns.items():
            self.columns[key].append(value)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common from their start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _why_bad(texts: PairTexts, pair: _Pair) -> str | None:
    if not all(math.isfinite(value) for value in texts.columns.values()):
        return "a number that is not finite"
    if not pair.prompt:
        # Its first answer token would have nothing to be predicted from.
        return "an empty prompt"
    if texts.has_empty_answer or not all(pair.answers):
        return "an empty completion"
    if pair.answers[0] == pair.answers[1]:
        return "identical answers"
    return None


def _truncate(pair: _Pair, options: EncodingOptions) -> tuple[_Pair, str | None]:
    prompt, answers, reason = truncate(pair.prompt, pair.answers, options)
    cut = _Pair(prompt, answers)
    if reason is None and cut.size < pair.size and answers[0] == answers[1]:
        reason = "answers identical once truncated"
    return cut, reason


def truncate(
    prompt: list[int], answers: Sequence[list[int]], options: EncodingOptions
) -> tuple[list[int], list[list[int]], str | None]:
    """A prompt and its answers within ``max_length``, or as they were and why they cannot be."""
    limit = options.max_length
    longest = max(map(len, answers))
    if limit is None or len(prompt) + longest <= limit:
        return prompt, list(answers), None
    if options.truncation_mode == "skip":
        return prompt, list(answers), "more tokens than max_length"
    kept = prompt
    if options.truncation_mode == "keep_end":
        kept = prompt[-max(limit - longest, 1) :]
    room = limit - len(kept)
    if room <= 0:
        return prompt, list(answers), "a prompt that fills max_length"
    return kept, [answer[:room] for answer in answers], None
