"""What a loss sees: the log-probabilities of a batch, one number per answer.

Legend: P pairs; u is a log-ratio to the reference, log pi(y|x) - log pi_ref(y|x), in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from fastdpo.losses.stable import token_mean

PerPair: TypeAlias = float | Tensor  # one number for all pairs, or (P,)


@dataclass(frozen=True, eq=False)
class PairLogps:
    """Log-probabilities of P chosen and P rejected answers; every tensor ``(P,)``, fp32 or fp64, in nats.

    Args:
        chosen, rejected: sums over the answer's tokens of log pi(y_t | x, y_<t); 0 for an empty answer.
        chosen_tokens, rejected_tokens: number of tokens of each answer, as floating point.
        ref_chosen, ref_rejected: the same sums under the reference, or None without one.
        nll_sum: sums of -log pi over the tokens that an NLL term trains on; None for those of chosen.
        nll_tokens: their number; None for ``chosen_tokens``.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    nll_sum: Tensor | None = None
    nll_tokens: Tensor | None = None

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
    def nll(self) -> Tensor:
        """Negative log-likelihood summed over the tokens an NLL term trains on."""
        return -self.chosen if self.nll_sum is None else self.nll_sum

    @property
    def nll_count(self) -> Tensor:
        """Number of tokens in ``nll``."""
        return self.chosen_tokens if self.nll_tokens is None else self.nll_tokens

    @property
    def is_scored(self) -> Tensor:
        """bool: the pair has at least one token; one without any is padding and counts nowhere."""
        return self.chosen_tokens + self.rejected_tokens > 0

    def without_reference(self) -> PairLogps:
        """The same pairs for a loss that uses no reference, whatever stands beside it in a list."""
        return replace(self, ref_chosen=None, ref_rejected=None)
