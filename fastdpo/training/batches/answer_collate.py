"""Batches of the kinds beside pairs, padded or in rows: sequences row after row, a row's answers together.

So every tensor of the first k rows is the beginning of the batch's: ``first_rows`` cuts a batch there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastdpo.training.batches.collate import Batch, padded_batch, scored_tokens
from fastdpo.training.batches.row_collate import RowCollator, row_tensors
from fastdpo.training.batches.rows import Unit, build_rows
from fastdpo.training.data.references import REF_MISMATCHED, REFERENCE
from fastdpo.training.settings.kinds import DataKind

# What a batch holds, by what it has one of for each.
_PER_ROW = ("rows", "is_desirable", "win_rates", "pair_weights", REF_MISMATCHED)
_PER_TOKEN = ("token_index", "target_ids", "sequence_ids")


@dataclass(frozen=True)
class AnswerCollator:
    """Collate R rows into S right-padded sequences.

    Returns a dict with ``input_ids``, ``attention_mask`` and ``labels`` ``(S, T)``; ``kind``;
    ``num_answers``, how many sequences each row has; ``rows`` ``(R,)``; and what the kind's losses use, under
    the names that ``fused_preference_loss`` has for it: ``is_desirable`` ``(R,)``; ``group_ids`` and
    ``scores`` of each candidate, ``num_groups``, ``max_candidates``; ``segment_ids`` ``(S, T)``,
    ``num_segments``; ``advantages`` of each segment; ``win_rates`` ``(R,)``. Further ``pair_weights``
    ``(R,)``, ``ref_logps`` of each answer, segment or answer token, and ``mismatched``, a batch of its own of
    each prompt with another row's answer.

    Args:
        kind: of the data.
        pad_token_id, pad_to_multiple_of: as of ``PreferenceCollator``.
    """

    kind: DataKind
    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        prompts = [item["prompt_ids"] for item in items for _ in item["answer_ids"]]
        answers = [answer for item in items for answer in item["answer_ids"]]
        scored = [mask for item in items for _, mask in _answers(item)]
        batch = padded_batch(prompts, answers, self.pad_token_id, self.pad_to_multiple_of, scored)
        batch |= _numbers(items, self.kind, self.pad_token_id)
        if self.kind.has_pieces:
            # Every labelled token belongs to a piece, in the order of both.
            ids = torch.full_like(batch["labels"], -1)
            batch["segment_ids"] = ids.masked_scatter(
                batch["attention_mask"].bool() & _is_labelled(batch), _segments(items)
            )
        return batch


@dataclass(frozen=True)
class AnswerRowCollator(RowCollator):
    """The same in rows without padding: ``packed`` sequences, or prompts shared by their answers.

    Tokens as ``RowCollator`` has them, numbers as ``AnswerCollator``; ``segment_ids`` is ``(N,)``.
    """

    kind: DataKind | None = None

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        assert self.kind is not None
        units = _units(items, self.layout)
        plan = self.plan([unit.length for unit in units])
        rows = build_rows(
            units,
            plan.calls,
            num_sequences=sum(len(item["answer_ids"]) for item in items),
            is_one_row=plan.arrangement == "one_row",
            pad_token_id=self.pad_token_id,
            multiple_of=self.pad_to_multiple_of or 1,
        )
        tokens = sum(len(item["prompt_ids"]) + len(answer) for item in items for answer in item["answer_ids"])
        batch = {**row_tensors(rows), "num_tokens": torch.tensor(tokens)}
        batch |= _numbers(items, self.kind, self.pad_token_id)
        if self.kind.has_pieces:
            batch["segment_ids"] = _segments(items)
        return batch


def _is_labelled(batch: Batch) -> Tensor:
    is_labelled: Tensor = batch["labels"] >= 0
    return is_labelled


def _answers(item: Mapping[str, Any]) -> list[tuple[Tensor, Tensor | None]]:
    """Each answer, and what is scored of it."""
    return list(zip(item["answer_ids"], scored_tokens(item), strict=False))


def _units(items: Sequence[Mapping[str, Any]], layout: str) -> list[Unit]:
    first = [0, *accumulate(len(item["answer_ids"]) for item in items)]
    units = []
    for start, item in zip(first, items, strict=False):
        answers, scored = zip(*_answers(item), strict=True)
        sequences = tuple(range(start, start + len(answers)))
        if layout == "shared_prompt":
            units.append(Unit(item["prompt_ids"], answers, sequences, scored=scored))
            continue
        for answer, mask, sequence in zip(answers, scored, sequences, strict=True):
            units.append(Unit(item["prompt_ids"], (answer,), (sequence,), scored=(mask,)))
    return units


def _segments(items: Sequence[Mapping[str, Any]]) -> Tensor:
    """The piece that each answer token belongs to, counted through the batch."""
    lengths = torch.tensor([length for item in items for length in item["piece_lengths"]])
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def _numbers(items: Sequence[Mapping[str, Any]], kind: DataKind, pad_token_id: int) -> Batch:
    """What a batch holds beside its tokens."""
    batch: Batch = {
        "kind": kind.name,
        "num_answers": tuple(len(item["answer_ids"]) for item in items),
        "rows": torch.tensor([item["row"] for item in items], dtype=torch.int64),
    }
    if kind.has_pieces:
        batch["num_pieces"] = tuple(len(item["piece_lengths"]) for item in items)
        batch["num_segments"] = sum(batch["num_pieces"])
    if kind.name in ("listwise", "ranking"):
        counts = batch["num_answers"] if kind.name == "listwise" else batch["num_pieces"]
        batch["group_ids"] = torch.arange(len(items)).repeat_interleave(torch.tensor(counts))
        batch["num_groups"], batch["max_candidates"] = len(items), max(counts)
    first = items[0]
    for name in ("scores", "advantages", REFERENCE):
        if name in first:
            batch[name] = torch.cat([item[name] for item in items])
    for name in ("win_rates", "pair_weights", REF_MISMATCHED):
        if name in first:
            batch[name] = torch.tensor([item[name] for item in items], dtype=torch.float32)
    if "is_desirable" in first:
        batch["is_desirable"] = torch.tensor([item["is_desirable"] > 0 for item in items])
    if "mismatched_ids" in first:
        prompts, others = zip(*((item["prompt_ids"], item["mismatched_ids"]) for item in items), strict=True)
        scored = [item.get("mismatched_scored") for item in items]
        batch["mismatched"] = padded_batch(prompts, others, pad_token_id, None, scored)
    return batch


def first_rows(batch: Batch, count: int) -> dict[str, Any]:
    """The first ``count`` rows of a batch; in rows, the backbone computes the others all the same."""
    size = len(batch["rows"])
    if count == size:
        return dict(batch)
    cut: dict[str, Any] = dict(batch)
    sequences = sum(batch["num_answers"][:count])
    pieces = sum(batch["num_pieces"][:count]) if "num_pieces" in batch else None
    for name in ("num_answers", "num_pieces", *_PER_ROW):
        if name in batch:
            cut[name] = batch[name][:count]
    if "mismatched" in batch:
        cut["mismatched"] = {name: value[:count] for name, value in batch["mismatched"].items()}
    judged = sequences if pieces is None else pieces
    for name in ("group_ids", "scores", "advantages"):
        if name in batch:
            cut[name] = batch[name][:judged]
    if "num_groups" in batch:
        cut["num_groups"] = count
    if pieces is not None:
        cut["num_segments"] = pieces
    if "calls" in batch:
        cut["lengths"] = batch["lengths"][:sequences]
        cut["cu_seqlens"] = batch["cu_seqlens"][: sequences + 1]
        tokens = sum(cut["lengths"])
        for name in (*_PER_TOKEN, "segment_ids"):
            if name in batch:
                cut[name] = batch[name][:tokens]
    else:
        for name in ("input_ids", "attention_mask", "labels", "segment_ids"):
            if name in batch:
                cut[name] = batch[name][:sequences]
        tokens = int((cut["labels"] >= 0).sum()) if batch["kind"] == "samples" and REFERENCE in batch else 0
    if REFERENCE in batch:
        cut[REFERENCE] = batch[REFERENCE][: tokens if batch["kind"] == "samples" else judged]
    return cut


def by_row(values: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """``(R, width)`` out of ``counts[i]`` numbers for row i; NaN behind the last of each."""
    dense = pad_sequence(list(values.split(list(counts))), batch_first=True, padding_value=torch.nan)
    return torch.nn.functional.pad(dense, (0, width - dense.shape[1]), value=torch.nan)
