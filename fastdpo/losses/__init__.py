"""Preference losses: pure maths on small tensors, one registry for all of them."""

from __future__ import annotations

# Each registers its losses.
from fastdpo.losses import distillation as _distillation  # noqa: F401
from fastdpo.losses import listwise as _listwise  # noqa: F401
from fastdpo.losses import pairwise as _pairwise  # noqa: F401
from fastdpo.losses import pairwise_anchored as _anchored  # noqa: F401
from fastdpo.losses import pairwise_batch as _batch  # noqa: F401
from fastdpo.losses import pairwise_exploration as _exploration  # noqa: F401
from fastdpo.losses import pairwise_free as _free  # noqa: F401
from fastdpo.losses import pairwise_margins as _margins  # noqa: F401
from fastdpo.losses import pairwise_rewards as _rewards  # noqa: F401
from fastdpo.losses import ranking as _ranking  # noqa: F401
from fastdpo.losses import token_level as _token_level  # noqa: F401
from fastdpo.losses import unpaired as _unpaired  # noqa: F401
from fastdpo.losses.batches import DivergencePairLogps, ListLogps, StepLogps, UnpairedLogps
from fastdpo.losses.build import build_objective
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.objective import Objective
from fastdpo.losses.ranges import Interval
from fastdpo.losses.reference_combination import ReferenceCombination
from fastdpo.losses.registry import (
    LOSSES,
    BatchExample,
    Example,
    LossOption,
    LossSpec,
    find_loss,
    loss_options,
    losses_table,
    preference_loss,
)
from fastdpo.losses.token_batches import TokenDivergences, TokenLogps

__all__ = [
    "LOSSES",
    "BatchExample",
    "DivergencePairLogps",
    "Example",
    "Interval",
    "ListLogps",
    "LossOption",
    "LossSpec",
    "Objective",
    "PairLogps",
    "ReferenceCombination",
    "StepLogps",
    "TokenDivergences",
    "TokenLogps",
    "UnpairedLogps",
    "build_objective",
    "find_loss",
    "loss_options",
    "losses_table",
    "preference_loss",
]
