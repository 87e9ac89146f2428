"""Batches of the kinds beside pairs: lists of candidates, single answers, steps.

Every class is an ``inputs.Batch``: an ``Objective`` takes it like a ``PairLogps``. Tensors are fp32 or
fp64, log-probabilities are sums over an answer's tokens, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastdpo.losses.inputs import PairLogps, check_rows, check_values, emptied_fields
from fastdpo.losses.ranges import NOT_NEGATIVE
from fastdpo.losses.stable import token_mean

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class ListLogps:
    """M candidates in G groups, a group being the answers to one prompt; tensors ``(M,)``.

    Args:
        logps: log-probabilities under the policy.
        tokens: number of tokens of each candidate, as floating point.
        group_ids: int64, from 0 to G - 1, in any order; a group's candidates keep the order they have here.
        scores: rewards, ranks' values or relevances, higher is better; None where the loss uses none.
        ref_logps: the same sums under the reference (or another anchor), or None without one.
        num_groups, max_candidates: G and the size of the largest group; None: they are read off
            ``group_ids``, for which a device has to be waited for once.
    """

    extras: ClassVar[tuple[str, ...]] = ("scores",)

    logps: Tensor
    tokens: Tensor
    group_ids: Tensor
    scores: Tensor | None = None
    ref_logps: Tensor | None = None
    num_groups: int | None = None
    max_candidates: int | None = None

    @cached_property
    def index(self) -> Tensor:
        """``(G, K)``: the candidates of each group, -1 behind the last."""
        ids = self.group_ids
        groups = self.num_groups
        if groups is None:
            groups = int(ids.max()) + 1 if len(ids) else 0
        order = torch.argsort(ids, stable=True)
        bounds = torch.searchsorted(ids[order], torch.arange(groups + 1, device=ids.device))
        largest = self.max_candidates
        if largest is None:
            largest = int(bounds.diff().max()) if groups else 0
        rank = torch.arange(len(ids), device=ids.device) - bounds[ids[order]]
        index = torch.full((groups, largest), -1, device=ids.device)
        index[ids[order], rank] = order
        return index

    @property
    def mask(self) -> Tensor:
        """``(G, K)`` bool: the candidates there are."""
        return self.index >= 0

    def dense(self, values: Tensor) -> Tensor:
        """``(M,)`` -> ``(G, K)``, 0 where there is no candidate."""
        if len(values) == 0:
            return values.new_zeros(self.index.shape)
        return values[self.index.clamp(min=0)].where(self.mask, 0)

    @property
    def logratios(self) -> Tensor:
        """``(G, K)`` u; without a reference the log-probability itself."""
        return self.dense(self.logps if self.ref_logps is None else self.logps - self.ref_logps)

    def per_token(self, values: Tensor) -> Tensor:
        """``(G, K)`` sums -> means over each candidate's tokens."""
        return token_mean(values, self.dense(self.tokens))

    @property
    def dense_scores(self) -> Tensor:
        """``(G, K)`` scores. Raises ValueError without them."""
        if self.scores is None:
            raise ValueError("scores: got None, wanted a score per candidate")
        return self.dense(self.scores.detach())

    @property
    def logps_like(self) -> Tensor:
        """A tensor with the batch's dtype and device."""
        return self.logps

    @property
    def num_rows(self) -> int:
        """G."""
        return len(self.index)

    @property
    def is_scored(self) -> Tensor:
        """``(G,)`` bool: the group has at least one token."""
        return self.dense(self.tokens).sum(-1) > 0

    @property
    def has_reference(self) -> bool:
        """Whether reference log-probabilities are there."""
        return self.ref_logps is not None

    def without_reference(self) -> ListLogps:
        """The same lists for a loss that uses no reference."""
        return replace(self, ref_logps=None)

    def emptied(self, keep: Tensor) -> ListLogps:
        """The same lists, those where ``keep`` ``(G,)`` is False without tokens and with zeros alone."""
        values: dict[str, Any] = emptied_fields(self, keep[self.group_ids])
        values |= {"num_groups": len(self.index), "max_candidates": self.index.shape[1]}  # read off once
        return replace(self, **values)

    def check(self) -> None:
        """Raise ValueError unless the tensors fit together; on the CPU also for a bad id or score."""
        check_rows(self, "logps")
        if self.group_ids.dtype != torch.int64:
            raise ValueError(f"ListLogps.group_ids: got {self.group_ids.dtype}, wanted torch.int64")
        if self.group_ids.device.type != "cpu":
            return
        if len(self.group_ids):
            low, high = int(self.group_ids.min()), int(self.group_ids.max())
            if low < 0 or (self.num_groups is not None and high >= self.num_groups):
                bound = "G" if self.num_groups is None else self.num_groups
                raise ValueError(f"ListLogps.group_ids: got {low} to {high}, wanted 0 to {bound} - 1")
            largest = int(self.group_ids.bincount().max())
            if self.max_candidates is not None and largest > self.max_candidates:
                raise ValueError(f"ListLogps.max_candidates: got {self.max_candidates}, wanted {largest}")
        check_values(self, "tokens", NOT_NEGATIVE)
        check_values(self, "scores")


class _Rows:
    """What batches have in common in which every row is one sequence, or a piece of one."""

    logps: Tensor
    tokens: Tensor
    ref_logps: Tensor | None

    @property
    def logratios(self) -> Tensor:
        """u; without a reference the log-probability itself."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps

    @property
    def logps_like(self) -> Tensor:
        """A tensor with the batch's dtype and device."""
        return self.logps

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.logps)

    @property
    def is_scored(self) -> Tensor:
        """``(rows,)`` bool: the row has at least one token."""
        return self.tokens > 0

    @property
    def has_reference(self) -> bool:
        """Whether reference log-probabilities are there."""
        return self.ref_logps is not None

    def without_reference(self) -> Self:
        """The same rows for a loss that uses no reference."""
        return replace(self, ref_logps=None)  # type: ignore[type-var]

    def emptied(self, keep: Tensor) -> Self:
        """The same rows, those where ``keep`` is False without tokens and with zeros alone."""
        return replace(self, **emptied_fields(self, keep))  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class UnpairedLogps(_Rows):
    """B answers, each desirable or not; tensors ``(B,)``.

    Args:
        logps: log-probabilities under the policy.
        is_desirable: bool.
        tokens: number of tokens of each answer, as floating point; an answer without any counts nowhere.
        ref_logps: the same sums under the reference.
        kl: KTO's reference point z0, ``()``, in nats, at least 0: ``controllers.KLEstimate``, or ``kto_kl``.
        reward_shift: BCO's running mean of the rewards, ``()``: ``controllers.RunningMean``.
    """

    extras: ClassVar[tuple[str, ...]] = ("kl", "reward_shift")

    logps: Tensor
    is_desirable: Tensor
    tokens: Tensor
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    reward_shift: Tensor | None = None

    @classmethod
    def from_pairs(cls, pair: PairLogps) -> UnpairedLogps:
        """2P answers: the chosen ones, desirable, then the rejected ones."""
        has_reference = pair.ref_chosen is not None and pair.ref_rejected is not None
        return cls(
            torch.cat([pair.chosen, pair.rejected]),
            torch.arange(2 * len(pair.chosen), device=pair.chosen.device) < len(pair.chosen),
            torch.cat([pair.chosen_tokens, pair.rejected_tokens]),
            torch.cat([pair.ref_chosen, pair.ref_rejected]) if has_reference else None,  # type: ignore[list-item]
        )

    def check(self) -> None:
        """Raise ValueError unless the tensors fit together."""
        check_rows(self, "logps", per_row=("is_desirable", "tokens", "ref_logps"))
        if self.is_desirable.dtype != torch.bool:
            raise ValueError(f"UnpairedLogps.is_desirable: got {self.is_desirable.dtype}, wanted torch.bool")
        for name in self.extras:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Tensor) or value.dim() != 0):
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"UnpairedLogps.{name}: got {got}, wanted a 0-d tensor")
        check_values(self, "tokens", NOT_NEGATIVE)
        check_values(self, "kl", NOT_NEGATIVE)
        check_values(self, "reward_shift")


@dataclass(frozen=True, eq=False)
class DivergencePairLogps(PairLogps):
    """Pairs with a divergence of policy and reference over the whole vocabulary, summed over each answer.

    Args:
        chosen_kl, rejected_kl: ``(P,)``, sums over the answer's tokens of KL(pi_ref || pi), in nats.
    """

    extras: ClassVar[tuple[str, ...]] = ("chosen_kl", "rejected_kl")

    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StepLogps(_Rows):
    """S steps, a step being some consecutive tokens of an answer; tensors ``(S,)``.

    Args:
        logps: sums over the step's tokens under the policy (``aggregate.segment_sums``).
        advantages: of each step, from a critic or a search.
        tokens: number of tokens of each step, as floating point.
        ref_logps: the same sums under the reference.
    """

    extras: ClassVar[tuple[str, ...]] = ()

    logps: Tensor
    advantages: Tensor
    tokens: Tensor
    ref_logps: Tensor | None = None

    def check(self) -> None:
        """Raise ValueError unless the tensors fit together; on the CPU also for an advantage that is NaN."""
        check_rows(self, "logps")
        check_values(self, "tokens", NOT_NEGATIVE)
        check_values(self, "advantages")
