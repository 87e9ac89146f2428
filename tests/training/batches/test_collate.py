"""One padded batch: chosen rows first, labels on the answers only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdpo.training.batches.collate import PreferenceCollator, pad_token_id

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "row": 7},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11], "row": 9},
]


def test_layout():
    batch = PreferenceCollator(0)(PAIRS)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, 0, 0],
        [1, 2, 3, 6, 0],
        [7, 8, 10, 11, 0],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 4, 5],
        [-100, -100, 9, -100, -100],
        [-100, -100, -100, 6, -100],
        [-100, -100, 10, 11, -100],
    ]
    assert batch["rows"].tolist() == [7, 9]
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "attention_mask", "rows"))


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (5, 5), (64, 64)])
def test_padding_to_a_multiple(multiple: int, width: int):
    batch = PreferenceCollator(0, multiple)(PAIRS)
    assert batch["input_ids"].shape == (4, width)
    assert (batch["labels"][:, 5:] == -100).all()


def test_numbers_of_the_pairs():
    extra = {"margin": 0.5, "ref_chosen_logps": -1.25, "ref_rejected_logps": -2.0}
    batch = PreferenceCollator(0)([{**pair, **extra} for pair in PAIRS])
    assert batch["margin"].tolist() == [0.5, 0.5]
    assert batch["ref_logps"].tolist() == [-1.25, -1.25, -2.0, -2.0]
    assert "ref_chosen_logps" not in batch


@pytest.mark.parametrize(("pad", "eos", "wanted"), [(5, 6, 5), (None, 6, 6), (None, None, 0), (0, 6, 0)])
def test_the_padding_token(pad: int | None, eos: int | None, wanted: int):
    assert pad_token_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == wanted
