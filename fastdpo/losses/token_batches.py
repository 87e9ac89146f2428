"""Batches of per-token numbers: of the losses that look into an answer, not only at its sum.

Every class is an ``inputs.Batch``. B sequences, padded ``(B, T)`` or packed ``(N_all,)`` with
``cu_seqlens`` ``(B + 1,)``; fp32 or fp64, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fastdpo.losses.aggregate import sequence_sums
from fastdpo.losses.inputs import check_values
from fastdpo.losses.ranges import PROBABILITY, Interval, check_range

if TYPE_CHECKING:
    from typing_extensions import Self

# Of two distributions, whose probabilities add up to 1 each; fp32 may round a sum of two of them upwards.
L1_DISTANCE = Interval(0.0, 2.0 + 1e-4)


class _Tokens:
    """What batches of tokens have in common: rows are sequences, and tokens are summed over them."""

    mask: Tensor
    cu_seqlens: Tensor | None

    @property
    def logps_like(self) -> Tensor:
        """A tensor with the batch's dtype and device."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.mask) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def sums(self, *factors: Tensor) -> Tensor:
        """``(B,)`` sums over each sequence's tokens, of a product where there are several factors.

        Each of them may be NaN where masked away: a product's gradient would have the other's NaN in it.
        """
        product = factors[0].where(self.mask, 0)
        for factor in factors[1:]:
            product = product * factor.where(self.mask, 0)
        return sequence_sums(product, self.mask, self.cu_seqlens)

    @property
    def counts(self) -> Tensor:
        """``(B,)`` number of tokens of each sequence."""
        return self.sums(self.mask.to(self.logps_like.dtype))

    @property
    def is_scored(self) -> Tensor:
        """``(B,)`` bool: the sequence has at least one token."""
        return self.counts > 0

    def emptied(self, keep: Tensor) -> Self:
        """The same sequences, those where ``keep`` ``(B,)`` is False without tokens."""
        if self.cu_seqlens is None:
            of_token = keep.unsqueeze(-1)
        else:
            of_token = keep.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.mask))
        return replace(self, mask=self.mask & of_token)  # type: ignore[type-var]

    def _check(self, per_token: tuple[str, ...], per_row: tuple[str, ...] = ()) -> None:
        name = type(self).__name__
        main = self.logps_like
        rank = 2 if self.cu_seqlens is None else 1
        if main.dim() != rank or not main.is_floating_point():
            wanted = "floating-point (B, T), or (N_all,) with cu_seqlens"
            raise ValueError(f"{name}: got {main.dtype} of shape {tuple(main.shape)}, wanted {wanted}")
        shapes = [(field, tuple(main.shape)) for field in ("mask", *per_token)]
        for field, shape in [*shapes, *((field, (self.num_rows,)) for field in per_row)]:
            value = getattr(self, field)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(f"{name}.{field}: got shape {tuple(value.shape)}, wanted {shape}")
            if value.device != main.device:
                raise ValueError(f"{name}.{field}: got {value.device}, wanted {main.device}")


@dataclass(frozen=True, eq=False)
class TokenLogps(_Tokens):
    """Log-probabilities per token.

    Args:
        logps: under the policy.
        mask: bool: the answers' tokens.
        cu_seqlens: ``(B + 1,)``, or None for padded.
        ref_logps: per token, under the reference.
        win_rates: ``(B,)`` in [0, 1]: the probability that the sequence is preferred to another sample.
    """

    extras: ClassVar[tuple[str, ...]] = ("win_rates",)

    logps: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None = None
    ref_logps: Tensor | None = None
    win_rates: Tensor | None = None

    @property
    def logps_like(self) -> Tensor:
        """A tensor with the batch's dtype and device."""
        return self.logps

    @property
    def has_reference(self) -> bool:
        """Whether reference log-probabilities are there."""
        return self.ref_logps is not None

    def without_reference(self) -> TokenLogps:
        """The same tokens for a loss that uses no reference."""
        return replace(self, ref_logps=None)

    def check(self) -> None:
        """Raise ValueError unless the tensors fit together; on the CPU also for a rate outside [0, 1]."""
        self._check(("ref_logps",), ("win_rates",))
        check_values(self, "win_rates", PROBABILITY)


@dataclass(frozen=True, eq=False)
class TokenDivergences(_Tokens):
    """Divergences from a teacher per token, over the whole vocabulary.

    Args:
        divergences: from the teacher at each position, differentiable; of the kind that the loss is of
            (``LossSpec.divergence``), as a rule KL(pi || teacher_t).
        mask: bool: the answers' tokens.
        cu_seqlens: ``(B + 1,)``, or None for padded.
        l1_distance: of a teacher made of two, sum_v |p_first(v) - p_second(v)| at each position, in [0, 2];
            the second is the reference, or what stands in its place. None: one teacher.
        logps, teacher_logps: of the tokens themselves, under the policy (differentiable) and the teacher.
    """

    extras: ClassVar[tuple[str, ...]] = ("logps", "teacher_logps")

    divergences: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None = None
    l1_distance: Tensor | None = None
    logps: Tensor | None = None
    teacher_logps: Tensor | None = None

    @property
    def logps_like(self) -> Tensor:
        """A tensor with the batch's dtype and device."""
        return self.divergences

    @property
    def has_reference(self) -> bool:
        """Whether the teacher is made of two, of which one is the reference."""
        return self.l1_distance is not None

    def without_reference(self) -> TokenDivergences:
        """The same divergences for a loss that knows one teacher."""
        return replace(self, l1_distance=None)

    def check(self) -> None:
        """Raise ValueError unless the tensors fit together; on the CPU also for a distance that is none."""
        self._check(("l1_distance", "logps", "teacher_logps"))
        if self.l1_distance is not None:
            check_range("TokenDivergences.l1_distance", self.l1_distance.where(self.mask, 0), L1_DISTANCE)
