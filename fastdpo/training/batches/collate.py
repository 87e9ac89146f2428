"""Which pairs make a batch, and the batch: chosen rows first, then rejected, in the order TRL has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from fastdpo.losses.aggregate import ld_weights
from fastdpo.training.data.references import REF_COLUMNS

Batch = dict[str, Any]
IGNORE_INDEX = -100
TOKEN_WEIGHTS = "token_weights"
# What an item of a PreferenceDataset holds beside its per-pair numbers.
TOKEN_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids", "gold_ids", "scored", "row")


@dataclass(frozen=True)
class PreferenceCollator:
    """Collate P pairs into a batch of 2P right-padded sequences.

    Returns a dict with ``input_ids``, ``attention_mask`` and ``labels`` ``(2P, T)`` (labels -100 on
    prompt and padding), ``rows`` ``(P,)``, every per-pair number ``(P,)`` fp32 under its name, and
    ``ref_logps`` ``(2P,)`` fp32 where the pairs carry both reference columns. ``gold`` is a dict of the first
    three, ``(P, T')``, where the pairs carry gold answers.

    Args:
        pad_token_id: fills ``input_ids``; any id will do, as padding is masked and never a label.
        pad_to_multiple_of: rounds T up.
        ld_alpha: of LD-DPO, whose ``token_weights`` ``(2P, T)`` the batch then has.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    ld_alpha: float | None = None

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> Batch:
        prompts = [pair["prompt_ids"] for pair in pairs] * 2
        answers = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
        scored = [scored_tokens(pair)[side] for side in (0, 1) for pair in pairs]
        padding = (self.pad_token_id, self.pad_to_multiple_of)
        batch = padded_batch(prompts, answers, *padding, scored)
        if len(answer_names(pairs)) > 2:
            gold = [pair["gold_ids"] for pair in pairs]
            scored = [scored_tokens(pair)[2] for pair in pairs]
            batch["gold"] = padded_batch(prompts[: len(gold)], gold, *padding, scored)
        return with_ld_weights({**batch, **pair_numbers(pairs)}, self.ld_alpha)


def answer_names(pairs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Under which names pairs carry their answers."""
    gold = ("gold_ids",) if pairs and "gold_ids" in pairs[0] else ()
    return ("chosen_ids", "rejected_ids", *gold)


def scored_tokens(item: Mapping[str, Any]) -> Sequence[Any]:
    """Of each answer of an item which tokens are scored, a bool tensor; None for an answer that is as a
    whole."""
    scored: Sequence[Any] = item.get("scored") or (None,) * max(3, len(item.get("answer_ids", ())))
    return scored


def padded_batch(
    prompts: Sequence[Any],
    answers: Sequence[Any],
    pad_token_id: int,
    multiple_of: int | None,
    scored: Sequence[Any] | None = None,
) -> Batch:
    """``input_ids``, ``attention_mask`` and ``labels`` ``(S, T)`` of S prompts, each with an answer.

    Args:
        scored: of each answer what ``scored_tokens`` has of it: the others have no label.
    """
    ends = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    step = multiple_of or 1
    shape = (len(answers), -(-max(ends) // step) * step)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        answer = torch.as_tensor(answer)
        input_ids[i, : ends[i]] = torch.cat([torch.as_tensor(prompt), answer])
        attention_mask[i, : ends[i]] = 1
        mask = None if scored is None else scored[i]
        labels[i, len(prompt) : ends[i]] = answer if mask is None else answer.where(mask, IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def with_ld_weights(batch: Mapping[str, Any], alpha: float | None) -> Batch:
    """A batch of pairs, padded or in rows, with LD-DPO's weight of each of its scored tokens.

    They depend on lengths alone, so they are made where the batch is.
    """
    if alpha is None:
        return dict(batch)
    if "labels" in batch:
        mask, bounds = batch["labels"] != IGNORE_INDEX, None
        mask[:, 0] = False  # nothing predicts the first token of a row
    else:
        mask, bounds = torch.ones_like(batch["target_ids"], dtype=torch.bool), batch["cu_seqlens"]
    weights = ld_weights(mask, alpha, bounds) if len(batch["rows"]) else mask.float()
    return {**batch, TOKEN_WEIGHTS: weights}


def pair_numbers(pairs: Sequence[Mapping[str, Any]]) -> Batch:
    """What a batch holds beside its tokens: ``rows``, per-pair numbers, ``ref_logps``."""
    batch: Batch = {"rows": torch.tensor([pair["row"] for pair in pairs], dtype=torch.int64)}
    for name in pairs[0] if pairs else ():
        if name not in TOKEN_FIELDS:
            batch[name] = torch.tensor([pair[name] for pair in pairs], dtype=torch.float32)
    if all(name in batch for name in REF_COLUMNS):
        batch["ref_logps"] = torch.cat([batch.pop(name) for name in REF_COLUMNS])
    return batch


class LikeLengthSampler(LengthGroupedSampler):
    """Random groups of pairs of like length; the order of an epoch depends on seed and epoch alone.

    Args:
        group_size: pairs of one group, sorted by length within a larger random draw.
        lengths: of every pair.
    """

    def __init__(self, group_size: int, lengths: list[int], *, seed: int) -> None:
        super().__init__(group_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch, of a resumed run too."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def pad_token_id(tokenizer: Any) -> int:
    """The padding id: the tokenizer's, else its EOS, else 0 (padding is masked, so any id will do)."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0
