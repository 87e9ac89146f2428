"""What the loop asks of a batch, padded ``(2P, T)`` (`PreferenceCollator`) or in rows (`RowCollator`).

Batches of other kinds than pairs have S sequences in place of the 2P (`AnswerCollator`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdpo.losses.aggregate import sequence_sums, weighted_sums
from fastdpo.training.batches import answer_collate
from fastdpo.training.batches.collate import IGNORE_INDEX, TOKEN_WEIGHTS
from fastdpo.types import PackedLayout, TokenLayout

Batch = Mapping[str, Any]
_PER_TOKEN = ("token_index", "target_ids", "sequence_ids", "token_weights")


def is_in_rows(batch: Batch) -> bool:
    """Whether `RowCollator` made the batch."""
    return "calls" in batch


def is_filler(batch: Batch) -> bool:
    """Whether a batch only keeps a rank in step, and counts for nothing."""
    return "is_filler" in batch


def is_pairs(batch: Batch) -> bool:
    """Whether a batch is of pairs: those of other kinds say which (``answer_collate.py``)."""
    return "kind" not in batch


def num_rows(batch: Batch) -> int:
    """P of a batch of pairs, or the rows of another kind's."""
    return num_pairs(batch) if is_pairs(batch) else len(batch["rows"])


def num_pairs(batch: Batch) -> int:
    """P of a collated batch."""
    return len(batch["lengths"] if is_in_rows(batch) else batch["input_ids"]) // 2


def completion_mask(batch: Batch) -> Tensor:
    """``(2P, T)`` bool, or ``(N,)`` in rows: the tokens that are scored; the first position never is."""
    if is_in_rows(batch):
        return torch.ones_like(batch["target_ids"], dtype=torch.bool)
    mask: Tensor = batch["labels"] != IGNORE_INDEX
    mask[:, 0] = False
    return mask


def packed_layout(batch: Batch) -> PackedLayout | None:
    """The bounds of the answers among the ``(N,)`` labelled tokens; None for a padded batch."""
    return PackedLayout(batch["cu_seqlens"], batch["lengths"]) if is_in_rows(batch) else None


def token_layout(batch: Batch) -> TokenLayout:
    """The labelled tokens of a batch in rows."""
    return TokenLayout(batch["token_index"], batch["target_ids"], batch["sequence_ids"], batch["lengths"])


def bounds_of(batch: Batch) -> Tensor | None:
    """The bounds of the answers among the tokens of a batch in rows; None for a padded one."""
    return batch["cu_seqlens"] if is_in_rows(batch) else None


def answer_logps(batch: Batch, logps: Tensor) -> Tensor:
    """``(2P,)``: log-probabilities per token summed over each answer, with the batch's weights if any."""
    mask, bounds = completion_mask(batch), bounds_of(batch)
    if TOKEN_WEIGHTS in batch:
        return weighted_sums(logps, batch[TOKEN_WEIGHTS], mask, bounds)
    return sequence_sums(logps, mask, bounds)


def answer_tokens(batch: Batch) -> tuple[Tensor | int, Tensor | int]:
    """Scored tokens of all chosen answers, and of all rejected ones."""
    size = num_pairs(batch)
    if is_in_rows(batch):
        return sum(batch["lengths"][:size]), sum(batch["lengths"][size:])
    chosen, rejected = completion_mask(batch).sum(1).view(2, size).sum(1)
    return chosen, rejected


def nll_tokens(batch: Batch, *, on_prompt: bool) -> Tensor | int:
    """Tokens that the NLL term of a batch of pairs is a mean over.

    Of gold answers, where the batch has some; else of the chosen ones, and ``on_prompt`` of their prompts.
    """
    if is_in_rows(batch):
        chosen = sum(batch["lengths"][: num_pairs(batch)])
        if "nll_tokens" not in batch:
            return chosen
        return sum(batch["nll_tokens"]["lengths"]) + (chosen if on_prompt else 0)
    if "gold" in batch:
        return completion_mask(batch["gold"]).sum()
    if on_prompt:
        tokens: Tensor = batch["attention_mask"][: num_pairs(batch), 1:].sum()
        return tokens
    return answer_tokens(batch)[0]


def num_labelled(batch: Batch) -> Tensor | int:
    """Scored tokens of all answers."""
    return sum(batch["lengths"]) if is_in_rows(batch) else completion_mask(batch).sum()


def sequence_tokens(batch: Batch) -> Tensor:
    """Tokens of all sequences, prompts counted for each, padding not: the same in every layout."""
    if is_in_rows(batch):
        tokens: Tensor = batch["num_tokens"]
        return tokens
    parts = [batch, *([batch["gold"]] if "gold" in batch else [])]
    return torch.stack([part["attention_mask"].sum() for part in parts]).sum()


def backbone_calls(batch: Batch) -> list[Mapping[str, Tensor]]:
    """The inputs that hold every position that the backbone computes of a batch."""
    if is_in_rows(batch):
        calls: list[Mapping[str, Tensor]] = batch["calls"]
        return calls
    return [batch, *([batch["gold"]] if "gold" in batch else [])]


def first_rows(batch: Batch, count: int) -> dict[str, Any]:
    """The first ``count`` pairs of a batch, or rows of another kind's."""
    return first_pairs(batch, count) if is_pairs(batch) else answer_collate.first_rows(dict(batch), count)


def first_pairs(batch: Batch, count: int) -> dict[str, Any]:
    """The first ``count`` pairs of a batch; in rows, the backbone computes the others all the same."""
    size = num_pairs(batch)
    if count == size:
        return dict(batch)
    if is_in_rows(batch):
        return _first_pairs_in_rows(batch, size, count)
    rows = torch.cat([torch.arange(count), torch.arange(size, size + count)])
    first: dict[str, Any] = {
        name: value[rows.to(value.device)] if len(value) == 2 * size else value[:count]
        for name, value in batch.items()
        if name != "gold"
    }
    if "gold" in batch:
        first["gold"] = {name: value[:count] for name, value in batch["gold"].items()}
    return first


def _first_pairs_in_rows(batch: Batch, size: int, count: int) -> dict[str, Any]:
    kept = [*range(count), *range(size, size + count)]
    lengths = tuple(batch["lengths"][i] for i in kept)
    # Tokens stand sequence after sequence: those kept are a run of chosen and one of rejected answers.
    start, chosen = sum(batch["lengths"][:size]), sum(lengths[:count])
    end = start + sum(lengths[count:])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(batch["cu_seqlens"].device)
    first: dict[str, Any] = {**batch, "lengths": lengths, "cu_seqlens": bounds}
    for name in (name for name in _PER_TOKEN if name in batch):
        first[name] = torch.cat([batch[name][:chosen], batch[name][start:end]])
    first["sequence_ids"] = torch.repeat_interleave(
        torch.arange(2 * count, device=bounds.device), bounds.diff(), output_size=len(first["target_ids"])
    )
    for name, value in batch.items():
        if name == "ref_logps":
            first[name] = torch.cat([value[:count], value[size : size + count]])
        elif isinstance(value, Tensor) and name not in (*_PER_TOKEN, "cu_seqlens") and value.dim() == 1:
            first[name] = value[:count]
    if "nll_tokens" in batch:
        more = batch["nll_tokens"]
        end = sum(more["lengths"][:count])
        tokens = {name: more[name][:end] for name in ("token_index", "target_ids")}
        first["nll_tokens"] = {**tokens, "lengths": more["lengths"][:count]}
    return first


def to_device(value: Any, device: torch.device) -> Any:
    """A batch, or a part of one, on ``device``."""
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
