"""The tokens of a batch of pairs as its loss wants them: their weights, and sums with these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.aggregate import sequence_sums, weighted_sums
from fastdpo.training.batches import Batch, completion_mask, is_in_rows, packed_layout
from fastdpo.training.collate import TOKEN_WEIGHTS
from fastdpo.types import PackedLayout


def bounds_of(batch: Batch) -> Tensor | None:
    """The bounds of the answers among the tokens of a batch in rows; None for a padded one."""
    return batch["cu_seqlens"] if is_in_rows(batch) else None


def answer_logps(batch: Batch, logps: Tensor) -> Tensor:
    """``(2P,)``: log-probabilities per token summed over each answer, with the batch's weights if any."""
    mask, bounds = completion_mask(batch), bounds_of(batch)
    if TOKEN_WEIGHTS in batch:
        return weighted_sums(logps, batch[TOKEN_WEIGHTS], mask, bounds)
    return sequence_sums(logps, mask, bounds)


def spread_sums(sums: Tensor, weights: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Numbers per token whose weighted sums are ``sums``: each stands on its answer's first token.

    For functions that take a reference per token where tokens have weights: a precomputed reference is one
    number an answer, and a difference of sums does not say from which token it came.

    Args:
        sums: ``(2P,)``, weighted; 0 for an answer none of whose tokens counts.
        weights, mask, cu_seqlens: as of ``weighted_sums``.

    Returns:
        The shape of ``mask``, in the dtype of ``sums``.
    """
    counts = (mask & (weights > 0)).reshape(-1)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(len(mask) + 1, device=mask.device) * mask.shape[-1]
    position = torch.arange(len(counts), device=mask.device)
    sequence = torch.searchsorted(cu_seqlens.long(), position, right=True) - 1
    before = F.pad(counts.long().cumsum(0), (1, 0))
    is_first = counts & (before[:-1] == before[cu_seqlens.long()][sequence])
    values = sums[sequence] / weights.reshape(-1).where(is_first, 1.0)
    return values.where(is_first, 0.0).to(sums.dtype).view(mask.shape)


@dataclass(frozen=True, eq=False)
class LossTokens:
    """The tokens that a loss of pairs looks at, in the order of the log-probabilities it is made of.

    Args:
        mask: ``(2P, T)`` or ``(N,)`` bool, the answers' tokens.
        layout: the bounds of the answers in ``(N,)``; None for padded batches.
        weights: fp32, the shape of ``mask``: of LD-DPO.
    """

    mask: Tensor
    layout: PackedLayout | None
    weights: Tensor | None = None

    @property
    def bounds(self) -> Tensor | None:
        """``layout``'s."""
        return None if self.layout is None else self.layout.cu_seqlens

    def weighted(self, logps: Tensor) -> Tensor:
        """Log-probabilities times their weights."""
        return logps if self.weights is None else logps * self.weights

    def for_logps(self, ref_logps: Tensor | None) -> dict[str, Any]:
        """Arguments of ``dpo_loss_from_logps``; ``ref_logps`` are the answers' sums, ``(2P,)``."""
        if ref_logps is not None and self.weights is not None:
            ref_logps = spread_sums(ref_logps, self.weights, self.mask, self.bounds)
        return {"ref_logps": ref_logps, "token_weights": self.weights, "layout": self.layout}

    def for_the_head(self, ref_logps: Tensor | None) -> dict[str, Any]:
        """Arguments of ``fused_dpo_loss``, whose layout the patched model settles."""
        arguments = self.for_logps(ref_logps)
        if arguments.pop("layout") is None and ref_logps is not None and self.weights is not None:
            # The reference stands where a token is predicted, weights and labels where it is.
            arguments["ref_logps"] = arguments["ref_logps"].roll(-1, 1)
        return arguments


def loss_tokens(batch: Batch) -> LossTokens:
    """What the loss of a collated batch of pairs looks at."""
    return LossTokens(completion_mask(batch), packed_layout(batch), batch.get(TOKEN_WEIGHTS))
