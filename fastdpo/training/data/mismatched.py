"""Which other row's answer a prompt is mismatched with, for KTO's reference point."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastdpo.training.data.chunks import Chunks


def mismatched_rows(tokens: Chunks, starts: Tensor, prompt_lengths: Tensor) -> Tensor:
    """``(R,)``: for each row the last one before it, round the end, with another prompt.

    As the data have it, not as a batch has it: the same however rows are cut into batches. TRL turns the
    answers of each batch by one, which is this where all rows are one batch and no prompt comes twice.
    """
    prompts = [
        hashlib.blake2b(tokens[start : start + size].numpy().tobytes(), digest_size=16).digest()
        for start, size in zip(starts.tolist(), prompt_lengths.tolist(), strict=True)
    ]
    count = len(prompts)
    found = [(i - 1) % count for i in range(count)]  # where all prompts are the same
    other = -1
    for i in range(2 * count):  # twice round, so that the first rows find the last ones
        here, before = i % count, (i - 1) % count
        other = before if prompts[before] != prompts[here] else other
        if other >= 0:
            found[here] = other
    return torch.tensor(found)
