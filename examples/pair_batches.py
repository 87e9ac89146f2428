"""Padded batches of preference pairs, for the loops beside this file: nothing of fastdpo in here."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of tokens that are not scored: prompt and padding


def read_pairs(path: str | Path, tokenizer: Any) -> list[tuple[list[int], list[int], list[int]]]:
    """Token ids of (prompt, chosen, rejected), from a JSONL file with these three strings a line."""
    pairs = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answers = [
            tokenizer(row[name], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for name in ("chosen", "rejected")
        ]
        pairs.append((prompt, *answers))
    return pairs


def make_batch(pairs: list[tuple[list[int], list[int], list[int]]]) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` ``(2P, T)``: chosen rows first, then rejected ones."""
    rows = [(prompt, answer) for which in (1, 2) for prompt, answer in ((p[0], p[which]) for p in pairs)]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.int64),
        "labels": torch.full((len(rows), width), IGNORED),
    }
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        batch["input_ids"][i, :end] = torch.tensor(prompt + answer)
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, len(prompt) : end] = torch.tensor(answer)
    return batch


def batches(pairs: list[Any], size: int, *, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """One epoch, shuffled."""
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    for start in range(0, len(order), size):
        yield make_batch([pairs[i] for i in order[start : start + size]])
