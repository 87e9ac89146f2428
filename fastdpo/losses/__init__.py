"""Preference losses: pure maths on small tensors, one registry for all of them."""

from __future__ import annotations

# Each registers its losses, in this order.
from fastdpo.losses import pairwise as _pairwise  # noqa: F401
from fastdpo.losses import pairwise_anchored as _anchored  # noqa: F401
from fastdpo.losses import pairwise_batch as _batch  # noqa: F401
from fastdpo.losses import pairwise_free as _free  # noqa: F401
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.objective import Objective, build_objective
from fastdpo.losses.registry import (
    LOSSES,
    BatchExample,
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
    "BatchExample",
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
