"""Batches without padding: the units of some pairs in rows, and their labelled tokens by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from fastdpo.training.batches.collate import Batch, answer_names, pair_numbers, scored_tokens, with_ld_weights
from fastdpo.training.batches.plan import RowCosts, RowPlan, plan_rows
from fastdpo.training.batches.rows import Rows, Unit, build_rows
from fastdpo.training.settings.choices import ARRANGEMENTS
from fastdpo.types import TokenLayout


@dataclass(frozen=True)
class RowCollator:
    """Collate P pairs into rows: ``packed`` sequences, or prompts shared by their answers.

    Returns a dict with

    * ``rows`` ``(P,)``, every per-pair number ``(P,)`` fp32 under its name, and ``ref_logps`` ``(2P,)`` fp32
      where the pairs carry both reference columns, as `PreferenceCollator`;
    * ``calls``: the inputs of the backbone's calls (``training.rows``);
    * ``token_index``, ``target_ids``, ``sequence_ids`` ``(N,)``: the labelled tokens, chosen answers first;
      ``lengths``: how many each of the 2P sequences has; ``cu_seqlens`` ``(2P + 1,)``: their bounds;
    * ``num_tokens``: tokens of all sequences; ``backbone_tokens``: positions the backbone computes;
    * ``nll_tokens``, where an NLL term has tokens of its own (the prompts', or those of gold answers, which
      the pairs carry): their ``token_index``, ``target_ids`` ``(M,)``, and ``lengths``, one for each pair.

    No pairs make a batch of one padding token, with which a rank that has nothing to do takes part in a step.

    Args:
        pad_token_id: fills up rows; any id will do.
        layout: ``packed`` or ``shared_prompt``.
        costs: what the planner goes by.
        arrangements: what it may choose from.
        single_call: the backbone may run only once a step.
        pad_to_multiple_of: rounds rows up.
        ld_alpha: of LD-DPO, whose ``token_weights`` ``(N,)`` the batch then has.
        nll_on_prompt: the NLL term is of the prompts too.
    """

    pad_token_id: int
    layout: str
    costs: RowCosts
    arrangements: tuple[str, ...] = ARRANGEMENTS
    single_call: bool = False
    pad_to_multiple_of: int | None = None
    ld_alpha: float | None = None
    nll_on_prompt: bool = False

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> Batch:
        units = make_units(pairs, self.layout, labels_prompt=self.nll_on_prompt)
        sides = answer_names(pairs)
        has_more = self.nll_on_prompt or len(sides) > 2
        plan = self.plan([unit.length for unit in units])
        rows = build_rows(
            units,
            plan.calls,
            num_sequences=(3 if has_more else 2) * len(pairs),
            is_one_row=plan.arrangement == "one_row",
            pad_token_id=self.pad_token_id,
            multiple_of=self.pad_to_multiple_of or 1,
        )
        sequences = (len(pair["prompt_ids"]) + len(pair[side]) for pair in pairs for side in sides)
        rows, more = split_rows(rows, 2 * len(pairs)) if has_more else (rows, None)
        batch = {**pair_numbers(pairs), **row_tensors(rows), "num_tokens": torch.tensor(sum(sequences))}
        if more is not None:
            names = ("token_index", "target_ids", "lengths")
            batch["nll_tokens"] = {name: getattr(more, name) for name in names}
        return with_ld_weights(batch, self.ld_alpha)

    def plan(self, lengths: Sequence[int]) -> RowPlan:
        """How units of these lengths are arranged."""
        return plan_rows(
            lengths,
            self.costs,
            layout=self.layout,
            arrangements=self.arrangements,
            single_call=self.single_call,
            multiple_of=self.pad_to_multiple_of or 1,
        )


def make_units(pairs: Sequence[Mapping[str, Any]], layout: str, *, labels_prompt: bool = False) -> list[Unit]:
    """The units of P pairs; sequences 0..P-1 are chosen, P..2P-1 rejected.

    The third P are gold answers where the pairs have some, or the prompts', which ``labels_prompt`` asks for.
    """
    count, sides = len(pairs), answer_names(pairs)
    texts = [
        (
            torch.as_tensor(pair["prompt_ids"]),
            tuple(torch.as_tensor(pair[side]) for side in sides),
            tuple(scored_tokens(pair)[: len(sides)]),
        )
        for pair in pairs
    ]
    if layout == "shared_prompt":
        return [
            Unit(
                prompt,
                answers,
                tuple(side * count + i for side in range(len(sides))),
                2 * count + i if labels_prompt else None,
                scored,
            )
            for i, (prompt, answers, scored) in enumerate(texts)
        ]
    return [
        Unit(
            prompt,
            (answers[side],),
            (side * count + i,),
            2 * count + i if labels_prompt and side == 0 else None,
            (scored[side],),
        )
        for side in range(len(sides))
        for i, (prompt, answers, scored) in enumerate(texts)
    ]


def split_rows(rows: Rows, num_sequences: int) -> tuple[Rows, TokenLayout]:
    """The rows with the labelled tokens of their first sequences, and those of the others."""
    tokens = rows.tokens
    lengths = tokens.lengths or ()
    count = sum(lengths[:num_sequences])

    def part(place: slice, of: slice) -> TokenLayout:
        names = (tokens.token_index[place], tokens.target_ids[place], tokens.sequence_ids[place])
        return TokenLayout(*names, lengths[of])

    first = part(slice(count), slice(num_sequences))
    return Rows(rows.calls, first), part(slice(count, None), slice(num_sequences, None))


def row_tensors(rows: Rows) -> Batch:
    """The backbone's calls, and the labelled tokens, as a batch has them."""
    tokens = rows.tokens
    lengths = tokens.lengths or ()
    return {
        "calls": list(rows.calls),
        "token_index": tokens.token_index,
        "target_ids": tokens.target_ids,
        "sequence_ids": tokens.sequence_ids,
        "lengths": lengths,
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)]),
        "backbone_tokens": sum(call["input_ids"].numel() for call in rows.calls),
    }
