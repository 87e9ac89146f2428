"""That a step over 7 rows is the same however it is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import read_metrics
from tests.training.loop.test_trainer import KeepGradients

# All at once; 4 and 3; one row at a time, which may lack a side of its loss.
CUTS = ((8, 1, "padded"), (4, 2, "padded"), (1, 8, "packed"))


def assert_accumulation_changes_nothing(
    make_args: Callable[..., PreferenceConfig],
    make_trainer: Callable[[PreferenceConfig, KeepGradients], PreferenceTrainer],
    folder: Path,
    **settings: Any,
) -> dict[str, Any]:
    """Gradients and metrics of the step; what the whole one logged."""
    results = []
    for batch, accumulate, layout in CUTS:
        kept = KeepGradients()
        args = make_args(
            output_dir=str(folder / f"{batch}"),
            batch_layout=layout,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            max_grad_norm=0.0,
            **settings,
        )
        make_trainer(args, kept).train()
        results.append((kept.steps[0], read_metrics(folder / f"{batch}")[0]))
    (whole, whole_log), *others = results
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    for gradients, log in others:
        for parameter, gradient in whole.items():
            # As in test_trainer, but gradients here are of any size: 2e-6 of the largest.
            torch.testing.assert_close(gradients[parameter], gradient, rtol=0, atol=2e-6 * max(largest, 1.0))
        assert log.keys() == whole_log.keys()
        for metric in log:
            assert log[metric] == pytest.approx(whole_log[metric], rel=2e-5, abs=2e-6), metric
    return whole_log
