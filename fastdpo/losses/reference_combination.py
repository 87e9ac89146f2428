"""How K references become the one that a loss of pairs knows: the composers of ``reference_logps`` by name.

| name | what it makes | options |
|---|---|---|
| ``harmonic`` | 1 / p~ = sum_k a_k / p_k | ``weights`` |
| ``geometric`` | p~ = prod_k p_k^a_k | ``weights`` |
| ``mrpo`` | clipped around the first, weighed pair by pair, harmonic | ``weights``, ``eta``, ``clip`` |
| ``max_margin`` | the source whose mean is farthest from the pivot's, clipped by the pivot | ``clip`` |
| ``mean`` | the mean of the sources' means, clipped by the pivot | ``weights``, ``clip`` |

The first reference is the policy's own initial model: what MRPO clips to, and InfiFPO's pivot, which is a
source like the others (a weight of 0 leaves it out of ``mean``; ``max_margin`` never needs it). There is no
default: which of these is meant, no shape can tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastdpo.losses.reference_logps import Fusion, fused_reference, geometric, harmonic, mrpo_reference
from fastdpo.losses.stable import token_mean

COMBINATIONS = ("harmonic", "geometric", "mrpo", "max_margin", "mean")
# Which of the names take an option; one that a name does not take is refused.
_TAKES = {
    "weights": ("harmonic", "geometric", "mrpo", "mean"),
    "eta": ("mrpo",),
    "clip": ("mrpo", "max_margin", "mean"),
}
DEFAULT_ETA = 0.1  # of MRPO's paper


@dataclass(frozen=True, eq=False)
class ReferenceCombination:
    """Names a way to make one reference of K, with its options; None is each way's own default.

    Args:
        name: one of ``COMBINATIONS``.
        weights: of the references, at least 0 and adding up to 1: K numbers, or a tensor ``(K,)`` or
            ``(K, P)``. None: 1 / K each; for ``mrpo`` |D_k| / sum_j |D_j| pair by pair, D_k = the reference's
            own gap (``reference_logps.discriminative_weights``).
        eta: width of MRPO's clipping, a share in [0, 1] of the first reference's log-probability. None: 0.1.
        clip: whether to clip. None: yes.

    Raises:
        ValueError: an unknown name, an option that it does not have, or a value out of range. Weights in a
            tensor are looked at when they are used, and read on the CPU only.

    Source: arXiv:2405.16388 (MRPO: ``harmonic``, ``mrpo``), arXiv:2505.13878 eq. 9-13 (InfiFPO:
    ``max_margin``, ``mean``).
    """

    name: str
    weights: Sequence[float] | Tensor | None = None
    eta: float | None = None
    clip: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in COMBINATIONS:
            raise ValueError(f"ref_combination: got {self.name!r}, wanted one of {', '.join(COMBINATIONS)}")
        for option, names in _TAKES.items():
            if getattr(self, option) is not None and self.name not in names:
                wanted = f"None: of the combinations only {', '.join(names)} has it"
                raise ValueError(f"ref_combination.{option}: got a value with {self.name!r}, wanted {wanted}")
        if self.clip is not None and not isinstance(self.clip, bool):
            raise ValueError(f"ref_combination.clip: got {self.clip!r}, wanted True, False or None")
        if self.eta is not None:
            if not _is_number(self.eta) or not 0 <= self.eta <= 1:
                raise ValueError(f"ref_combination.eta: got {self.eta!r}, wanted a number in [0, 1]")
            if self.clip is False:
                raise ValueError("ref_combination.eta: got a value with clip=False, wanted one of the two")
        if self.weights is not None and not isinstance(self.weights, Tensor):
            _check_numbers(self.weights)

    @torch.no_grad()
    def combine(self, sums: Tensor, lengths: Tensor) -> Tensor:
        """The reference's log-probabilities ``(2, P)``, in fp64.

        Args:
            sums: ``(K, 2, P)`` of each reference, chosen answers first.
            lengths: ``(2, P)`` numbers of tokens: ``max_margin`` and ``mean`` work on per-token means, and
                what comes of them is multiplied by the lengths again.

        Raises:
            ValueError: weights that are not one per reference, are negative or do not add up to 1 (of a
                tensor on the CPU), or are on another device.
        """
        # fp64: K equal references are that reference to the last bit of fp32.
        chosen, rejected = sums.double().unbind(1)  # (K, P) each
        weights = self._weights(chosen)
        if self.name in ("harmonic", "geometric"):
            mix = harmonic if self.name == "harmonic" else geometric
            return torch.stack([mix(answers, weights) for answers in (chosen, rejected)])
        if self.name == "mrpo":
            eta = DEFAULT_ETA if self.eta is None else self.eta
            width = None if self.clip is False else eta
            return torch.stack(mrpo_reference(chosen, rejected, weights=weights, eta=width))
        counts = lengths.double()
        chosen, rejected = map(token_mean, (chosen, rejected), counts)
        pivots = [means.select(0, 0) for means in (chosen, rejected)]
        clip, fusion = self.clip is not False, cast(Fusion, self.name)
        fused = fused_reference(chosen, rejected, *pivots, fusion=fusion, clip=clip, weights=weights)
        return torch.stack(fused) * counts.clamp(min=1)

    def _weights(self, like: Tensor) -> Tensor | None:
        """``(K,)`` or ``(K, P)`` on the device of ``like`` ``(K, P)``."""
        if self.weights is None:
            return None
        if not isinstance(self.weights, Tensor):
            # Filled there: a copy from the host would wait for the device.
            weights = torch.stack([like.new_full((), weight) for weight in self.weights])
        elif self.weights.device != like.device:
            wanted = f"{like.device}, the device of the batch"
            raise ValueError(f"ref_combination.weights: got {self.weights.device}, wanted {wanted}")
        else:
            weights = self.weights.detach()
        if weights.shape not in (like.shape, like.shape[:1]):
            wanted = f"{tuple(like.shape[:1])} or {tuple(like.shape)}: K references, P pairs"
            raise ValueError(f"ref_combination.weights: got shape {tuple(weights.shape)}, wanted {wanted}")
        return weights


def as_combination(value: object) -> ReferenceCombination | None:
    """A name, or a combination with its options, as the latter; None stays None.

    Raises:
        ValueError: an unknown name.
        TypeError: anything else.
    """
    if value is None or isinstance(value, ReferenceCombination):
        return value
    if isinstance(value, str):
        return ReferenceCombination(value)
    wanted = "a name, a ReferenceCombination or None"
    raise TypeError(f"ref_combination: got {type(value).__name__}, wanted {wanted}")


def _check_numbers(weights: Any) -> None:
    wanted = "numbers of at least 0 that add up to 1, one per reference"
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ValueError(f"ref_combination.weights: got {weights!r}, wanted {wanted}")
    is_good = all(_is_number(weight) and 0 <= weight < math.inf for weight in weights)
    if not is_good or not math.isclose(math.fsum(weights), 1.0, abs_tol=1e-5):
        raise ValueError(f"ref_combination.weights: got {list(weights)!r}, wanted {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
