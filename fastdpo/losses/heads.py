"""The generic heads: a handful of functions that most preference losses are choices of.

``margin_loss`` covers the pairwise ones: with m = beta * (u_w - u_l) - psi and q the probability
that the chosen answer is the better one,

    L = q phi(m) + (1 - q) phi(-m),        dL/dm = sigmoid(m) - q  for the logistic phi.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.inputs import PerPair


def logistic(m: Tensor) -> Tensor:
    """-log sigmoid(m); linear for very negative m, never infinite. ln 2 at 0."""
    return -F.logsigmoid(m)


def hinge(m: Tensor) -> Tensor:
    """relu(1 - m)."""
    return F.relu(1 - m)


def scaled_margin(gap: Tensor, beta: PerPair, margin: PerPair | None) -> Tensor:
    """m = beta * gap - psi, ``(P,)``."""
    return beta * gap if margin is None else beta * gap - margin


def preferred_probability(label_smoothing: float, soft_labels: PerPair | None) -> PerPair:
    """q: ``soft_labels`` where given, else 1 - ``label_smoothing``.

    Raises:
        ValueError: both are given; they say the same thing in two ways.
    """
    if soft_labels is None:
        return 1.0 - label_smoothing
    if label_smoothing != 0:
        raise ValueError(
            f"label_smoothing: got {label_smoothing} together with soft_labels, wanted one of the two"
        )
    return soft_labels


def margin_loss(m: Tensor, phi: Callable[[Tensor], Tensor], preferred: PerPair = 1.0) -> Tensor:
    """q phi(m) + (1 - q) phi(-m), ``(P,)``.

    Args:
        m: ``(P,)`` margins.
        phi: the penalty of a margin, elementwise.
        preferred: q, a number or ``(P,)`` in [0, 1]; 1.0 for hard labels.
    """
    if isinstance(preferred, float) and preferred == 1.0:
        return phi(m)
    return preferred * phi(m) + (1 - preferred) * phi(-m)
