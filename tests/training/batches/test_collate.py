"""One padded batch: chosen rows first, labels on the answers only."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastdpo.training.batches.collate import PaddedCollator, pad_token_id
from fastdpo.training.data.row import Answer, Row


def pair(number: int, prompt: list[int], *answers: list[int]) -> Row:
    return Row(number, torch.tensor(prompt), tuple(Answer(torch.tensor(ids)) for ids in answers))


PAIRS = [pair(7, [1, 2, 3], [4, 5], [6]), pair(9, [7, 8], [9], [10, 11])]


def test_layout():
    batch = PaddedCollator(0)(PAIRS)
    assert batch.sequences.input_ids.tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, 0, 0],
        [1, 2, 3, 6, 0],
        [7, 8, 10, 11, 0],
    ]
    assert batch.sequences.attention_mask.tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]
    assert batch.sequences.labels.tolist() == [
        [-100, -100, -100, 4, 5],
        [-100, -100, 9, -100, -100],
        [-100, -100, -100, 6, -100],
        [-100, -100, 10, 11, -100],
    ]
    assert batch.rows.tolist() == [7, 9]
    assert {
        x.dtype for x in (*batch.sequences.model_inputs().values(), batch.sequences.labels, batch.rows)
    } == {torch.int64}


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (5, 5), (64, 64)])
def test_padding_to_a_multiple(multiple: int, width: int):
    batch = PaddedCollator(0, multiple)(PAIRS)
    assert batch.sequences.input_ids.shape == (4, width)
    assert (batch.sequences.labels[:, 5:] == -100).all()


def test_numbers_of_the_pairs():
    numbers = {"margin": 0.5, "ref_logps": torch.tensor([-1.25, -2.0])}
    batch = PaddedCollator(0)([replace(pair, numbers=numbers) for pair in PAIRS])
    assert {name: values.tolist() for name, values in batch.numbers.items()} == {"margin": [0.5, 0.5]}
    assert batch.ref_logps.tolist() == [-1.25, -1.25, -2.0, -2.0]


@pytest.mark.parametrize(("pad", "eos", "wanted"), [(5, 6, 5), (None, 6, 6), (None, None, 0), (0, 6, 0)])
def test_the_padding_token(pad: int | None, eos: int | None, wanted: int):
    assert pad_token_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == wanted
