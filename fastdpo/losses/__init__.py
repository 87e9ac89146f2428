"""Preference losses: pure maths on small tensors, one registry for all of them."""

from __future__ import annotations

from fastdpo.losses import pairwise as _pairwise  # noqa: F401  (registers its losses)
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.objective import Objective, build_objective
from fastdpo.losses.registry import (
    LOSSES,
    Example,
    Interval,
    LossOption,
    LossSpec,
    find_loss,
    loss_options,
    losses_table,
    preference_loss,
)

__all__ = [
    "LOSSES",
    "Example",
    "Interval",
    "LossOption",
    "LossSpec",
    "Objective",
    "PairLogps",
    "build_objective",
    "find_loss",
    "loss_options",
    "losses_table",
    "preference_loss",
]
