"""Per token -> per segment -> what the losses see, of a whole batch and of a group of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional.kinds import divergence_outputs, needs_token_logps
from fastdpo.functional.tokens import RowTokens
from fastdpo.losses.batches import DivergencePairLogps, ListLogps, StepLogps, UnpairedLogps
from fastdpo.losses.inputs import Batch, PairLogps
from fastdpo.losses.objective import Objective
from fastdpo.losses.token_batches import TokenDivergences, TokenLogps
from fastdpo.plan.schedule import RowGroup


@dataclass(frozen=True, eq=False)
class Rows:
    """All of a batch but its log-probabilities, in the order of its tokens and segments.

    Args:
        tokens: N of them, in S segments.
        token_weights: ``(N,)``, 0 for tokens that do not count; weigh the log-probabilities of both models.
        ref_logps: ``(N,)`` of the reference, or None.
        ref_sums: ``(S,)`` of the reference where nobody knows more, or None.
        extras: what a kind is told beside (``kinds.EXTRAS``): ``(S,)`` tensors, ``()`` ones, integers.
        divergences: ``(N,)`` each, by name.
    """

    tokens: RowTokens
    token_weights: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_sums: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    divergences: Mapping[str, Tensor] = field(default_factory=dict)

    def weighted(self, values: Tensor) -> Tensor:
        """``(N,)``, times the weights where there are any."""
        weights = self.token_weights
        return values if weights is None else values * weights.to(values.dtype)

    def sums(self, values: Tensor) -> Tensor:
        """``(S,)``, over the tokens that count."""
        return self.tokens.sums(values, self.tokens.in_answer)

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """``(S,)``, the number of tokens that count."""
        return self.tokens.lengths(self.tokens.in_answer, dtype)

    def reference(self, dtype: torch.dtype) -> Tensor | None:
        """``(S,)`` sums of the reference, without a gradient; None without one."""
        if self.ref_sums is not None:
            return self.ref_sums.to(dtype)
        return None if self.ref_logps is None else self.sums(self.weighted(self.ref_logps.to(dtype)))

    def of_group(self, group: RowGroup, first: int, last: int, ref_logps: Tensor | None) -> Rows:
        """Neighbouring rows, whose segments are ``[first, last)``; divergences have no groups.

        Args:
            ref_logps: of the group's tokens, where these are made on the way.
        """
        tokens = slice(group.start, group.stop)
        weights, sums = self.token_weights, self.ref_sums
        if self.ref_logps is not None:
            ref_logps = self.ref_logps[tokens]
        extras = {
            name: value[first:last] if isinstance(value, Tensor) and value.dim() else value
            for name, value in self.extras.items()
        }
        if "group_ids" in extras:
            extras["group_ids"] = extras["group_ids"] - group.first_row
            extras["num_groups"] = group.last_row - group.first_row
        return Rows(
            self.tokens.of_group(group, first, last),
            None if weights is None else weights[tokens],
            ref_logps,
            None if sums is None else sums[first:last],
            extras,
        )

    def batch(self, objective: Objective, logps: Tensor) -> Batch:
        """What losses see.

        Args:
            objective: of one kind of losses, which says what that is.
            logps: ``(N,)`` under the policy.
        """
        kind, dtype = objective.inputs, logps.dtype
        if kind in (TokenLogps, TokenDivergences):
            return self._of_tokens(objective, logps)
        sums, lengths, reference = self.sums(self.weighted(logps)), self.lengths(dtype), self.reference(dtype)
        if kind in (UnpairedLogps, StepLogps, ListLogps):
            return kind(logps=sums, tokens=lengths, ref_logps=reference, **self._extras(dtype))
        pair = (PairLogps if kind is PairLogps else DivergencePairLogps)(*_both(sums), *_both(lengths))
        if reference is not None:
            ref_chosen, ref_rejected = _both(reference)
            pair = replace(pair, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
        if kind is DivergencePairLogps:
            chosen_kl, rejected_kl = _both(self.sums(self.divergences["forward_kl"].to(dtype)))
            return replace(pair, chosen_kl=chosen_kl, rejected_kl=rejected_kl)  # type: ignore[call-arg]
        tokens = self.tokens
        if objective.uses_nll and not (tokens.in_nll is None and self.token_weights is None):
            where = tokens.in_answer if tokens.in_nll is None else tokens.in_nll
            log_likelihood, _ = _both(tokens.sums(logps, where))
            nll_tokens, _ = _both(tokens.lengths(where, dtype))
            pair = replace(pair, nll_sum=-log_likelihood, nll_tokens=nll_tokens)
        return pair

    def _of_tokens(self, objective: Objective, logps: Tensor) -> Batch:
        """Of losses that look into an answer."""
        tokens, dtype = self.tokens, logps.dtype
        mask = torch.ones_like(logps, dtype=torch.bool) if tokens.in_answer is None else tokens.in_answer
        reference = None if self.ref_logps is None else self.ref_logps.to(dtype)
        if objective.inputs is TokenLogps:
            if reference is not None:
                reference = self.weighted(reference)
            return TokenLogps(self.weighted(logps), mask, tokens.offsets, reference, **self._extras(dtype))
        own = {"logps": logps, "teacher_logps": reference} if needs_token_logps(objective) else {}
        name, *_ = divergence_outputs(objective)
        of_two = self.divergences.get("l1_distance")
        return TokenDivergences(self.divergences[name], mask, tokens.offsets, of_two, **own)

    def _extras(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.extras.items()
        }


def _both(values: Tensor) -> Tensor:
    """``(2P,)`` pair by pair as ``(2, P)``, chosen first."""
    return values.view(-1, 2).t()
