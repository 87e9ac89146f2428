"""Losses with columns and meanings of their own in the loop, at the start: policy and reference are one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]


def first_loss(args: PreferenceConfig, rows: Any, tokenizer: Any) -> float:
    """Of an evaluation before any step."""
    trainer = PreferenceTrainer(tiny_llama(1), args, eval_dataset=rows, processing_class=tokenizer)
    return float(trainer.evaluate()["eval_loss"])


def test_a_gap_of_rewards_comes_from_its_column(make_args: MakeArgs, tokenizer: Any) -> None:
    gaps = [0.5, -1.0, 2.0, 0.25, 3.0]
    rows = [{**row, "gap": gap} for row, gap in zip(make_rows(5), gaps, strict=True)]
    args = make_args(loss_type="rebel", reward_gap_column="gap", per_device_eval_batch_size=2)
    squares = sum(gap**2 for gap in gaps) / 5
    assert first_loss(args, rows, tokenizer) == pytest.approx(squares, rel=1e-6)
    with pytest.raises(ValueError, match=r"missing or not finite \(row 2: column 'gap'\)"):
        first_loss(args, [rows[0], {**rows[1], "gap": None}], tokenizer)


def test_answers_to_forget(make_args: MakeArgs, tokenizer: Any) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": False} for row in make_rows(4)]
    forgetting = first_loss(make_args(loss_type="npo"), rows, tokenizer)
    assert forgetting == pytest.approx(2 / 0.1 * math.log(2), rel=1e-6)
    assert math.isfinite(first_loss(make_args(loss_type="simnpo"), rows, tokenizer))
