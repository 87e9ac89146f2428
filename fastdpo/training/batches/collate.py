"""Rows of a data set to a batch: padded, or in rows without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdpo.integrations.forest.plant import SHORTEST_SHARED, Tree, plant
from fastdpo.integrations.forest.rows import Text, lay_out
from fastdpo.integrations.processor import ImageTokens
from fastdpo.losses.aggregate import ld_weights
from fastdpo.training.batches.batch import (
    IGNORE_INDEX,
    Batch,
    Padded,
    PaddedBatch,
    RowBatch,
    bounds_of,
)
from fastdpo.training.batches.plan import RowCosts, RowPlan, TreeSize, plan_rows
from fastdpo.training.batches.seen_rows import SeenRows, plant_seen
from fastdpo.training.data.row import LD_COLUMN, REF_MISMATCHED, REFERENCE, Answer, Row
from fastdpo.training.settings.choices import ARRANGEMENTS
from fastdpo.training.settings.kinds import PAIRS, DataKind
from fastdpo.types import CarriedContext, TokenLayout

AnyBatch = TypeVar("AnyBatch", bound=Batch)


@dataclass(frozen=True)
class PaddedCollator:
    """Collate R rows into right-padded sequences.

    Args:
        pad_token_id: fills ``input_ids``; any id will do, as padding is masked and never a label.
        pad_to_multiple_of: rounds T up.
        ld_alpha: of LD-DPO, whose ``token_weights`` ``(2P, T)`` the batch then has.
        kind: of the data.
        images: the processor of rows with images.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    ld_alpha: float | None = None
    kind: DataKind = PAIRS
    images: ImageTokens | None = None

    def __call__(self, rows: Sequence[Row]) -> PaddedBatch:
        seen = SeenRows(self.images)

        def padded(places: Sequence[tuple[int, int]]) -> Padded:
            texts = [(rows[i].prompt, rows[i].answers[k]) for i, k in places]
            made = pad_sequences(texts, self.pad_token_id, self.pad_to_multiple_of)
            return seen.beside(made, [(rows[i], k) for i, k in places])

        judged, gold = answer_places(rows, self.kind)
        sequences = padded(judged)
        batch = PaddedBatch(
            sequences=sequences,
            gold=padded(gold) if gold else None,
            **numbers_of(rows, self.kind, self.pad_token_id, seen),
        )
        if self.kind.has_pieces:
            # Every labelled token belongs to a piece, in the order of both.
            ids = torch.full(sequences.labels.shape, -1)
            is_labelled = sequences.labels != IGNORE_INDEX
            batch = replace(batch, segment_ids=ids.masked_scatter(is_labelled, segments(rows)))
        return with_ld_weights(batch, self.ld_alpha)


@dataclass(frozen=True)
class RowCollator:
    """Collate R rows without padding: ``packed`` sequences, or ones that share what they begin with.

    Args:
        pad_token_id: fills up what is left; any id will do.
        layout: ``packed`` or ``shared_prompt``.
        costs: what the planner goes by.
        arrangements: what it may choose from.
        single_call: the backbone may run only once a step.
        pad_to_multiple_of: rounds rows up.
        ld_alpha: of LD-DPO, whose ``token_weights`` ``(N,)`` the batch then has.
        nll_on_prompt: the NLL term is of the prompts too.
        kind: of the data.
        shortest_shared: tokens that a common beginning has at least.
        context: how the backbone is carried over rows; None for all of a row at once.
        images: the processor of rows with images.
    """

    pad_token_id: int
    layout: str
    costs: RowCosts
    arrangements: tuple[str, ...] = ARRANGEMENTS
    single_call: bool = False
    pad_to_multiple_of: int | None = None
    ld_alpha: float | None = None
    nll_on_prompt: bool = False
    kind: DataKind = PAIRS
    shortest_shared: int = SHORTEST_SHARED
    context: CarriedContext | None = None
    images: ImageTokens | None = None

    def __call__(self, rows: Sequence[Row]) -> RowBatch:
        judged, gold = answer_places(rows, self.kind)
        has_more = bool(gold) or self.nll_on_prompt
        texts, seen = make_texts(rows, self.kind, labels_prompt=self.nll_on_prompt), SeenRows(self.images)
        trees = self._trees(texts, rows)
        plan = self._plan(trees)
        made = lay_out(
            texts,
            trees,
            plan.calls,
            in_one_row=plan.arrangement != "bucketed",
            pad_token_id=self.pad_token_id,
            multiple_of=self.pad_to_multiple_of or 1,
        )
        tokens, more = split_tokens(made.tokens, len(judged)) if has_more else (made.tokens, None)
        count = sum(len(rows[i].prompt) + len(rows[i].answers[k].ids) for i, k in (*judged, *gold))
        trees_of_calls = [[trees[number] for number in call] for call in plan.calls]
        calls = seen.in_rows(made.calls, trees_of_calls, [(rows[i], k) for i, k in (*judged, *gold)])
        batch = RowBatch(
            rows_of_calls=self._carried(calls),
            tokens=tokens,
            cu_seqlens=bounds_of(tokens.lengths or ()),
            num_tokens=torch.tensor(count),
            more=more,
            segment_ids=segments(rows) if self.kind.has_pieces else None,
            **numbers_of(rows, self.kind, self.pad_token_id, seen),
        )
        return with_ld_weights(batch, self.ld_alpha)

    def _carried(self, calls: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return calls if self.context is None else tuple({**call, "context": self.context} for call in calls)

    def plan(self, rows: Sequence[Row]) -> RowPlan:
        """How a batch of these rows is arranged."""
        texts = make_texts(rows, self.kind, labels_prompt=self.nll_on_prompt)
        return self._plan(self._trees(texts, rows))

    def _trees(self, texts: Sequence[Text], rows: Sequence[Row]) -> list[Tree]:
        numbered = [(number, text.ids) for number, text in enumerate(texts)]
        if self.layout == "shared_prompt" and self.images is not None:
            places = (place for part in answer_places(rows, self.kind) for place in part)
            salted = [rows[i].salted(text.ids, k) for (i, k), text in zip(places, texts, strict=False)]
            of_prompts = numbered[len(salted) :]
            numbered = [*enumerate(salted), *of_prompts]
            return plant_seen(numbered, self.images.ids, shortest=self.shortest_shared)
        if self.layout == "shared_prompt":
            return plant(numbered, shortest=self.shortest_shared)
        # A prompt that is scored too is the beginning of a sequence that is there.
        by_ids: dict[int, list[tuple[int, Tensor]]] = {}
        for number, ids in numbered:
            by_ids.setdefault(id(ids), []).append((number, ids))
        return [tree for group in by_ids.values() for tree in plant(group)]

    def _plan(self, trees: Sequence[Tree]) -> RowPlan:
        return plan_rows(
            [TreeSize(tree.num_tokens, tree.forest.num_pairs, len(tree.segments)) for tree in trees],
            self.costs,
            layout=self.layout,
            arrangements=self.arrangements,
            single_call=self.single_call,
            multiple_of=self.pad_to_multiple_of or 1,
        )


def answer_places(rows: Sequence[Row], kind: DataKind) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, answer) of each sequence that is judged, in the batch's order, and of gold answers."""
    if not kind.is_paired:
        return [(i, k) for i, row in enumerate(rows) for k in range(len(row.answers))], []
    judged = [(i, k) for k in (0, 1) for i in range(len(rows))]
    return judged, [(i, 2) for i, row in enumerate(rows) if len(row.answers) > 2]


def make_texts(rows: Sequence[Row], kind: DataKind = PAIRS, *, labels_prompt: bool = False) -> list[Text]:
    """The sequences of R rows, in the batch's order.

    Of pairs the third P are gold answers where there are some, or chosen sequences again, with all tokens
    that are not scored as answers: those of the prompts, which ``labels_prompt`` asks for.
    """
    texts = []
    for i, k in (place for part in answer_places(rows, kind) for place in part):
        ids, is_scored = rows[i].answers[k]
        prompt = torch.as_tensor(rows[i].prompt)
        scored = torch.ones(len(ids), dtype=torch.bool) if is_scored is None else is_scored
        places = len(prompt) + scored.nonzero()[:, 0]
        # Without a prompt nothing predicts an answer's first token.
        texts.append(Text(torch.cat([prompt, torch.as_tensor(ids)]), places[places > 0]))
    if labels_prompt:
        for text in texts[: len(rows)]:
            is_other = torch.ones(len(text.ids), dtype=torch.bool)
            is_other[:1] = False
            is_other[text.scored] = False
            texts.append(Text(text.ids, is_other.nonzero()[:, 0]))
    return texts


def split_tokens(tokens: TokenLayout, num_sequences: int) -> tuple[TokenLayout, TokenLayout]:
    """The labelled tokens of the first sequences, and those of the others."""
    lengths = tokens.lengths or ()
    count = sum(lengths[:num_sequences])

    def part(place: slice, of: slice) -> TokenLayout:
        names = (tokens.token_index[place], tokens.target_ids[place], tokens.sequence_ids[place])
        return TokenLayout(*names, lengths[of])

    return part(slice(count), slice(num_sequences)), part(slice(count, None), slice(num_sequences, None))


def segments(rows: Sequence[Row]) -> Tensor:
    """The piece that each answer token belongs to, counted through the batch."""
    lengths = torch.tensor([length for row in rows for length in row.pieces])
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def pad_sequences(
    texts: Sequence[tuple[Tensor, Answer]], pad_token_id: int, multiple_of: int | None = None
) -> Padded:
    """Prompts, each with an answer, whose tokens are labels where they are scored."""
    ends = [len(prompt) + len(answer.ids) for prompt, answer in texts]
    step = multiple_of or 1
    shape = (len(texts), -(-max(ends) // step) * step)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for i, (prompt, (ids, scored)) in enumerate(texts):
        ids = torch.as_tensor(ids)
        input_ids[i, : ends[i]] = torch.cat([torch.as_tensor(prompt), ids])
        attention_mask[i, : ends[i]] = 1
        labels[i, len(prompt) : ends[i]] = ids if scored is None else ids.where(scored, IGNORE_INDEX)
    return Padded(input_ids, attention_mask, labels)


def numbers_of(rows: Sequence[Row], kind: DataKind, pad_token_id: int, seen: SeenRows) -> dict[str, Any]:
    """What a batch holds beside its tokens: fields of ``Batch``."""
    named = {name: [row.numbers[name] for row in rows] for name in rows[0].numbers}
    given: dict[str, Any] = {
        "kind": kind,
        "rows": torch.tensor([row.number for row in rows], dtype=torch.int64),
        "num_answers": tuple(2 if kind.is_paired else len(row.answers) for row in rows),
        "num_pieces": tuple(len(row.pieces) for row in rows) if kind.has_pieces else (),
    }
    if REFERENCE in named:
        per_row: list[Any] = named.pop(REFERENCE)
        given["ref_logps"] = torch.stack(per_row, 1).flatten() if kind.is_paired else torch.cat(per_row)
    if REF_MISMATCHED in named:
        given["ref_mismatched_logps"] = torch.tensor(named.pop(REF_MISMATCHED), dtype=torch.float32)
    named.pop(LD_COLUMN, None)
    given["numbers"] = {name: _joined(name, values) for name, values in named.items()}
    given["numbers"] |= _groups(rows, kind, given["num_pieces"] or given["num_answers"])
    if rows[0].mismatched is not None:
        others = [(row.prompt, row.mismatched) for row in rows if row.mismatched is not None]
        made = pad_sequences(others, pad_token_id)
        given["mismatched"] = seen.beside(made, [(row, 0) for row in rows if row.mismatched is not None])
    return given


def _joined(name: str, values: list[Any]) -> Tensor:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if name == "is_desirable":
        return torch.tensor([value > 0 for value in values])
    return torch.tensor(values, dtype=torch.float32)


def _groups(rows: Sequence[Row], kind: DataKind, counts: tuple[int, ...]) -> dict[str, Any]:
    """Which list each candidate is of, and how many pieces there are."""
    found: dict[str, Any] = {"num_segments": sum(counts)} if kind.has_pieces else {}
    if kind.name in ("listwise", "ranking"):
        ids = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        found |= {"group_ids": ids, "num_groups": len(rows), "max_candidates": max(counts)}
    return found


def with_ld_weights(batch: AnyBatch, alpha: float | None) -> AnyBatch:
    """A batch of pairs with LD-DPO's weight of each of its scored tokens.

    They depend on lengths alone, so they are made where the batch is.
    """
    return (
        batch if alpha is None else replace(batch, token_weights=ld_weights(batch.mask, alpha, batch.bounds))
    )


def pad_token_id(tokenizer: Any) -> int:
    """The padding id: the tokenizer's, else its EOS, else 0 (padding is masked, so any id will do)."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0
