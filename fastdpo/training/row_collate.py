"""Batches without padding: the units of some pairs in rows, and their labelled tokens by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from fastdpo.training.collate import Batch, pair_numbers, with_ld_weights
from fastdpo.training.row_plan import ARRANGEMENTS, RowCosts, RowPlan, plan_rows
from fastdpo.training.rows import Rows, Unit, build_rows


@dataclass(frozen=True)
class RowCollator:
    """Collate P pairs into rows: ``packed`` sequences, or prompts shared by their answers.

    Returns a dict with

    * ``rows`` ``(P,)``, every per-pair number ``(P,)`` fp32 under its name, and ``ref_logps`` ``(2P,)`` fp32
      where the pairs carry both reference columns, as `PreferenceCollator`;
    * ``calls``: the inputs of the backbone's calls (``training.rows``);
    * ``token_index``, ``target_ids``, ``sequence_ids`` ``(N,)``: the labelled tokens, chosen answers first;
      ``lengths``: how many each of the 2P sequences has; ``cu_seqlens`` ``(2P + 1,)``: their bounds;
    * ``num_tokens``: tokens of the 2P sequences; ``backbone_tokens``: positions the backbone computes.

    No pairs make a batch of one padding token, with which a rank that has nothing to do takes part in a step.

    Args:
        pad_token_id: fills up rows; any id will do.
        layout: ``packed`` or ``shared_prompt``.
        costs: what the planner goes by.
        arrangements: what it may choose from.
        single_call: the backbone may run only once a step.
        pad_to_multiple_of: rounds rows up.
        ld_alpha: of LD-DPO, whose ``token_weights`` ``(N,)`` the batch then has.
    """

    pad_token_id: int
    layout: str
    costs: RowCosts
    arrangements: tuple[str, ...] = ARRANGEMENTS
    single_call: bool = False
    pad_to_multiple_of: int | None = None
    ld_alpha: float | None = None

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> Batch:
        units = make_units(pairs, self.layout)
        plan = self.plan([unit.length for unit in units])
        rows = build_rows(
            units,
            plan.calls,
            num_sequences=2 * len(pairs),
            is_one_row=plan.arrangement == "one_row",
            pad_token_id=self.pad_token_id,
            multiple_of=self.pad_to_multiple_of or 1,
        )
        sequences = (len(p["prompt_ids"]) * 2 + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
        batch = {**pair_numbers(pairs), **row_tensors(rows), "num_tokens": torch.tensor(sum(sequences))}
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


def make_units(pairs: Sequence[Mapping[str, Any]], layout: str) -> list[Unit]:
    """The units of P pairs; sequences 0..P-1 are chosen, P..2P-1 rejected."""
    count, sides = len(pairs), ("chosen_ids", "rejected_ids")
    texts = [
        (torch.as_tensor(pair["prompt_ids"]), tuple(torch.as_tensor(pair[side]) for side in sides))
        for pair in pairs
    ]
    if layout == "shared_prompt":
        return [Unit(prompt, answers, (i, count + i)) for i, (prompt, answers) in enumerate(texts)]
    return [
        Unit(prompt, (answers[side],), (side * count + i,))
        for side in range(len(sides))
        for i, (prompt, answers) in enumerate(texts)
    ]


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
