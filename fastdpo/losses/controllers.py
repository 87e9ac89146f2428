"""State that a loss carries from batch to batch: running means, dynamic beta, weights of references.

Plain objects, fed with detached numbers gathered from all ranks, once per optimizer step: then every
rank holds the same state. ``state_dict`` and ``load_state_dict`` go into a checkpoint; the same numbers
in the same order give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _check_momentum(momentum: float) -> float:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: got {momentum!r}, wanted a number in [0, 1)")
    return momentum


class RunningMean:
    """The mean of all numbers seen, or an exponential one: BCO's reward shift delta.

    Args:
        momentum: None: every number counts alike (BCO); else value = momentum * value + (1 - momentum) *
            batch mean, starting from the first batch.

    Nothing is read back from a device.
    """

    def __init__(self, momentum: float | None = None) -> None:
        self.momentum = None if momentum is None else _check_momentum(momentum)
        self._mean: Tensor | None = None  # (), fp64
        self._count = 0

    @property
    def value(self) -> Tensor:
        """``()`` fp32; 0 before the first update."""
        return torch.zeros(()) if self._mean is None else self._mean.float()

    def update(self, values: Tensor) -> Tensor:
        """Take the numbers of one optimizer step, any shape, of all ranks; return the new value.

        No numbers change nothing.
        """
        count = values.numel()
        if count == 0:
            return self.value
        mean = values.detach().double().mean()
        if self._mean is None:
            self._mean = mean
        elif self.momentum is None:
            self._mean = self._mean + (mean - self._mean) * (count / (self._count + count))
        else:
            self._mean = self.momentum * self._mean + (1 - self.momentum) * mean
        self._count += count
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; reads the mean back from its device."""
        return {"mean": None if self._mean is None else self._mean.item(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """Go on from a checkpoint; the mean is put on ``device``. Raises KeyError for a state without it."""
        mean, count = state["mean"], state["count"]
        self._mean = None if mean is None else torch.tensor(mean, dtype=torch.float64, device=device)
        self._count = int(count)


class KLEstimate:
    """KTO's reference point z0: max(0, mean log-ratio of mismatched completions).

    Args:
        momentum: 0 takes each batch for itself (KTO, TRL); else an exponential mean, clamped when read.
    """

    def __init__(self, momentum: float = 0.0) -> None:
        self._mean = RunningMean(momentum)

    @property
    def value(self) -> Tensor:
        """z0, ``()`` fp32, at least 0: ``UnpairedLogps.kl``."""
        return self._mean.value.clamp(min=0)

    def update(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """Take ``(B,)`` sums of mismatched completions of all ranks; return the new z0."""
        if logps.shape != ref_logps.shape:
            raise ValueError(f"ref_logps: got shape {tuple(ref_logps.shape)}, wanted {tuple(logps.shape)}")
        self._mean.update(logps.detach() - ref_logps.detach())
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return self._mean.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """Go on from a checkpoint."""
        self._mean.load_state_dict(state, device)


class BetaStep(NamedTuple):
    """What beta-DPO trains one step with: arguments of ``build_objective``."""

    beta: Tensor  # ()
    pair_weights: Tensor  # (n,): 1 for a pair that is kept, else 0
    num_pairs: int  # how many are kept


class BetaController:
    """beta-DPO: a beta per batch from how far apart its pairs are, and pairs far off left out.

    With the gaps M_i = D_i (log-ratio gaps, without beta), exponential means M0 and S0 of their batch mean
    and standard deviation, updated before use: pairs are drawn without replacement in proportion to
    exp(-((M_i - M0) / S0)^2 / 2), floor((1 - rho) n) of them; beta = beta0 (1 + alpha (mean kept M - M0)).

    Args:
        beta: beta0, positive.
        alpha: strength; 0 leaves beta alone.
        rho: the share of pairs left out, in [0, 1); 0 keeps all.
        momentum: of the exponential means.
        min_beta: the least beta.
        warm_start: whether the first batch sets the means, so that a batch of equal gaps gives beta0; the
            authors' code starts from 0 instead.
        seed: of the draws; the same on every rank.

    One read from the device per step, for the draw.

    Source: arXiv:2407.08639 and the authors' code.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        alpha: float = 0.6,
        rho: float = 0.2,
        momentum: float = 0.9,
        min_beta: float = 1e-3,
        warm_start: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value in (("beta", beta), ("min_beta", min_beta)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value!r}, wanted a number in (0, inf)")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha: got {alpha!r}, wanted a finite number")
        if not 0 <= rho < 1:
            raise ValueError(f"rho: got {rho!r}, wanted a number in [0, 1)")
        self.beta, self.alpha, self.rho, self.min_beta = beta, alpha, rho, min_beta
        self.momentum, self.warm_start = _check_momentum(momentum), warm_start
        self._mean = self._std = 0.0
        self._steps = 0
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, gaps: Tensor) -> BetaStep:
        """The beta and the pairs of one optimizer step.

        Args:
            gaps: ``(n,)`` log-ratio gaps D of the step's pairs, of all ranks in the same order everywhere.

        Raises:
            ValueError: no pairs, or a gap that is not finite (which would stay in the means for good).
        """
        seen = gaps.detach().double().cpu()
        if seen.dim() != 1 or len(seen) == 0 or not bool(seen.isfinite().all()):
            raise ValueError(
                f"gaps: got {seen.numel()} of shape {tuple(seen.shape)}, wanted (n,) finite ones"
            )
        std = float(seen.std()) if len(seen) > 1 else 0.0
        momentum = 0.0 if self.warm_start and self._steps == 0 else self.momentum
        self._mean = momentum * self._mean + (1 - momentum) * float(seen.mean())
        self._std = momentum * self._std + (1 - momentum) * std
        self._steps += 1

        kept = max(1, math.floor((1 - self.rho) * len(seen)))
        weights = torch.ones(len(seen), dtype=torch.float64)
        if kept < len(seen):
            spread = self._std if self._std > 0 else math.inf  # all alike: each as likely as the other
            # Not below 1e-30: as many as are to be drawn must have a chance.
            odds = torch.exp(-0.5 * ((seen - self._mean) / spread) ** 2).clamp(min=1e-30)
            drawn = torch.multinomial(odds, kept, generator=self._generator)
            weights = torch.zeros_like(weights).index_fill(0, drawn, 1.0)
        mean_kept = float((weights * seen).sum()) / kept
        beta = max(self.min_beta, self.beta * (1 + self.alpha * (mean_kept - self._mean)))
        device, dtype = gaps.device, gaps.dtype
        return BetaStep(torch.tensor(beta, device=device, dtype=dtype), weights.to(device, dtype), kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold, the draws' generator included."""
        return {
            "mean": self._mean,
            "std": self._std,
            "steps": self._steps,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._mean, self._std = float(state["mean"]), float(state["std"])
        self._steps = int(state["steps"])
        self._generator.set_state(state["generator"].cpu())


class ReferenceWeights:
    """Weights of K references from how well each tells chosen from rejected, over all pairs seen.

    For ``reference_logps.harmonic`` or ``geometric``. ``accuracy``: the share of pairs with D_k > 0;
    ``confidence``: the mean |D_k|; both in proportion, adding up to 1. The papers' own normalisations could
    not be checked, so these go by no paper's name (arXiv:2512.10040 has weights of these kinds).
    """

    def __init__(self, num_references: int) -> None:
        if num_references < 1:
            raise ValueError(f"num_references: got {num_references!r}, wanted at least 1")
        self._correct = torch.zeros(num_references, dtype=torch.float64)
        self._gap = torch.zeros(num_references, dtype=torch.float64)
        self._count = 0

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Take ``(K, P)`` sums of both answers under the references, of all ranks."""
        for name, value in (("chosen", chosen), ("rejected", rejected)):
            if value.dim() != 2 or len(value) != len(self._gap) or value.shape != chosen.shape:
                wanted = f"({len(self._gap)}, P), the same for both"
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {wanted}")
        gaps = (chosen - rejected).detach().double()
        self._correct = self._correct.to(gaps.device) + (gaps > 0).sum(1)
        self._gap = self._gap.to(gaps.device) + gaps.abs().sum(1)
        self._count += gaps.shape[1]

    @property
    def accuracy(self) -> Tensor:
        """``(K,)`` fp64: each reference's share of pairs ranked right; 0 before any pair."""
        return self._correct / max(self._count, 1)

    @property
    def confidence(self) -> Tensor:
        """``(K,)`` fp64, nats: each reference's mean |D_k|; 0 before any pair."""
        return self._gap / max(self._count, 1)

    def weights(self, kind: str = "accuracy") -> Tensor:
        """``(K,)`` fp64, adding up to 1; 1 / K while there is nothing to go by.

        Args:
            kind: ``accuracy`` or ``confidence``.
        """
        if kind not in ("accuracy", "confidence"):
            raise ValueError(f"kind: got {kind!r}, wanted 'accuracy' or 'confidence'")
        values = self.accuracy if kind == "accuracy" else self.confidence
        total = values.sum()
        return torch.where(total > 0, values / total.where(total > 0, 1), 1 / len(values))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"correct": self._correct.tolist(), "gap": self._gap.tolist(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises ValueError for another number of references."""
        if len(state["gap"]) != len(self._gap):
            raise ValueError(f"state: got {len(state['gap'])} references, wanted {len(self._gap)}")
        self._correct = torch.tensor(state["correct"], dtype=torch.float64)
        self._gap = torch.tensor(state["gap"], dtype=torch.float64)
        self._count = int(state["count"])
