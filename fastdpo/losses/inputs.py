"""What a loss sees: the log-probabilities of a batch, one number per answer.

Legend: P pairs; u is a log-ratio to the reference, log pi(y|x) - log pi_ref(y|x), in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import Tensor

from fastdpo.losses.ranges import FINITE, NOT_NEGATIVE, PROBABILITY, Interval, check_range
from fastdpo.losses.stable import token_mean

PerPair: TypeAlias = float | Tensor  # one number for all pairs, or (P,)


class Batch(Protocol):
    """What an ``Objective`` asks of a batch, whatever the kind of its losses.

    ``extras`` names the fields that only some losses use: such a loss says so (``LossSpec.needs``).
    """

    extras: ClassVar[tuple[str, ...]]

    @property
    def logps_like(self) -> Tensor:
        """A tensor with the dtype and device of the batch's numbers."""

    @property
    def num_rows(self) -> int:
        """How many numbers a loss returns."""

    @property
    def is_scored(self) -> Tensor:
        """bool, one per row: the row counts; one that does not is padding."""

    @property
    def has_reference(self) -> bool:
        """Whether reference log-probabilities are there."""

    def without_reference(self) -> Batch:
        """The same batch for a loss that uses no reference."""

    def emptied(self, keep: Tensor) -> Batch:
        """The same batch, rows where ``keep`` ``(num_rows,)`` is False without tokens and with zeros alone.

        So that nothing of them is in the loss or its gradient, not even a NaN times 0.
        """

    def check(self) -> None:
        """Raise ValueError for shapes, dtypes or values that do not fit together."""


@dataclass(frozen=True, eq=False)
class PairLogps:
    """Log-probabilities of P chosen and P rejected answers; every tensor ``(P,)``, fp32 or fp64, in nats.

    Args:
        chosen, rejected: sums over the answer's tokens of log pi(y_t | x, y_<t); 0 for an empty answer.
        chosen_tokens, rejected_tokens: number of tokens of each answer, as floating point.
        ref_chosen, ref_rejected: the same sums under the reference, or None without one.
        nll_sum: sums of -log pi over the tokens that an NLL term trains on; None for those of chosen.
        nll_tokens: their number; None for ``chosen_tokens``.
        chosen_win_rate, rejected_win_rate: probability in [0, 1] that the answer beats another sample of
            the policy, for the soft SPPO loss; both or neither.
    """

    extras: ClassVar[tuple[str, ...]] = ()

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    nll_sum: Tensor | None = None
    nll_tokens: Tensor | None = None
    chosen_win_rate: Tensor | None = None
    rejected_win_rate: Tensor | None = None

    @property
    def chosen_logratios(self) -> Tensor:
        """u_w; without a reference the log-probability itself."""
        return self.chosen if self.ref_chosen is None else self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """u_l; without a reference the log-probability itself."""
        return self.rejected if self.ref_rejected is None else self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        """u_w - u_l, the implicit reward gap in units of beta."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def mean_delta(self) -> Tensor:
        """u_w / |y_w| - u_l / |y_l|, the gap of the per-token means; an empty answer counts as 0."""
        return token_mean(self.chosen_logratios, self.chosen_tokens) - token_mean(
            self.rejected_logratios, self.rejected_tokens
        )

    @property
    def reference_gap(self) -> Tensor:
        """D_ref, the reference's own gap of log-probabilities. Raises ValueError without a reference."""
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError("ref_logps: got no reference, wanted one")
        return self.ref_chosen - self.ref_rejected

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood summed over the tokens an NLL term trains on."""
        return -self.chosen if self.nll_sum is None else self.nll_sum

    @property
    def nll_count(self) -> Tensor:
        """Number of tokens in ``nll``."""
        return self.chosen_tokens if self.nll_tokens is None else self.nll_tokens

    @property
    def logps_like(self) -> Tensor:
        """A tensor with the batch's dtype and device."""
        return self.chosen

    @property
    def num_rows(self) -> int:
        """P."""
        return len(self.chosen)

    @property
    def has_reference(self) -> bool:
        """Whether both answers have reference log-probabilities."""
        return self.ref_chosen is not None and self.ref_rejected is not None

    def check(self) -> None:
        """Raise ValueError unless every tensor has one number per pair, the same dtype and device."""
        check_rows(self, "chosen")
        for first, second in (
            ("ref_chosen", "ref_rejected"),
            ("nll_sum", "nll_tokens"),
            ("chosen_win_rate", "rejected_win_rate"),
        ):
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise ValueError(f"{first} and {second}: got one of the two, wanted both or neither")
        for name in ("chosen_win_rate", "rejected_win_rate"):
            check_values(self, name, PROBABILITY)
        for name in ("chosen_tokens", "rejected_tokens", "nll_tokens"):
            check_values(self, name, NOT_NEGATIVE)

    @property
    def is_scored(self) -> Tensor:
        """bool: the pair has at least one token; one without any is padding and counts nowhere."""
        return self.chosen_tokens + self.rejected_tokens > 0

    def without_reference(self) -> PairLogps:
        """The same pairs for a loss that uses no reference, whatever stands beside it in a list."""
        return replace(self, ref_chosen=None, ref_rejected=None)

    def emptied(self, keep: Tensor) -> PairLogps:
        """The same pairs, those where ``keep`` ``(P,)`` is False without tokens and with zeros alone."""
        return replace(self, **emptied_fields(self, keep))


def emptied_fields(batch: Any, keep: Tensor) -> dict[str, Tensor]:
    """A batch's floating-point fields with one number per row, 0 where ``keep`` is False."""
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return {
        name: value.where(keep, 0)
        for name, value in values.items()
        if isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point()
    }


def check_rows(batch: object, main: str, *, per_row: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless the tensors among a batch's fields are ``(rows,)`` like the field ``main``.

    Floating-point fields have its dtype too.

    Args:
        per_row: the fields to look at; empty: all.
    """
    name = type(batch).__name__
    first = getattr(batch, main)
    if not isinstance(first, Tensor) or first.dim() != 1 or not first.is_floating_point():
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"{name}.{main}: got {got}, wanted a floating-point tensor, one number per row")
    # Not vars(batch), which holds what a batch has cached beside its fields.
    for field in per_row or tuple(item.name for item in fields(batch)):  # type: ignore[arg-type]
        value = getattr(batch, field)
        if not isinstance(value, Tensor):
            continue
        if value.shape != first.shape:
            raise ValueError(f"{name}.{field}: got shape {tuple(value.shape)}, wanted {tuple(first.shape)}")
        if value.device != first.device:
            raise ValueError(f"{name}.{field}: got {value.device}, wanted {first.device}")
        if value.is_floating_point() and value.dtype != first.dtype:
            raise ValueError(f"{name}.{field}: got {value.dtype}, wanted {first.dtype}")


def check_values(batch: object, name: str, legal: Interval = FINITE) -> None:
    """Raise ValueError unless a batch's numbers of that name are in a range; see ``check_range``."""
    check_range(f"{type(batch).__name__}.{name}", getattr(batch, name), legal)
