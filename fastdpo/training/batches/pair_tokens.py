"""The tokens of a batch of pairs as its loss wants them: weighted, and with those of NLL terms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.training.batches.batch import (
    IGNORE_INDEX,
    Batch,
    Padded,
    PaddedBatch,
    RowBatch,
    bounds_of,
)
from fastdpo.training.batches.forward import Scorable, token_logps
from fastdpo.types import LinearLogprobOutput, PackedLayout, TokenLayout


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
        scored: what the model is to score: the batch, or it with more tokens.
        mask: bool, ``(2P, T)`` padded, or with a ``layout`` ``(N,)``: the answers' tokens.
        layout: the bounds of the answers in ``(N,)``; None for padded batches.
        weights: fp32, the shape of ``mask``: of LD-DPO.
        nll_mask: bool, likewise: the tokens of an NLL term, those of chosen sequences; None for the answers'.
        nll_labels: what ``fused_dpo_loss`` wants to know of these; None where it cannot be told.
    """

    scored: Scorable
    mask: Tensor
    layout: PackedLayout | None
    weights: Tensor | None = None
    nll_mask: Tensor | None = None
    nll_labels: Tensor | None = None

    @property
    def bounds(self) -> Tensor | None:
        """``layout``'s."""
        return None if self.layout is None else self.layout.cu_seqlens

    @property
    def fit_the_head(self) -> bool:
        """Whether the loss can be made inside the model's forward."""
        return self.nll_mask is None or self.nll_labels is not None

    def weighted(self, logps: Tensor) -> Tensor:
        """Log-probabilities times their weights."""
        return logps if self.weights is None else logps * self.weights

    def score(self, model: nn.Module, statistics: tuple[str, ...]) -> LinearLogprobOutput:
        """The tokens' log-probabilities and statistics, in the shape of ``mask``."""
        token = token_logps(model, self.scored, statistics=statistics)
        if token.logps.shape == self.mask.shape:
            return token
        order = _gold_behind_chosen(token.logps)
        picked = {
            name: value.reshape(-1)[order] for name, value in token._asdict().items() if value is not None
        }
        return LinearLogprobOutput(**picked)

    def for_logps(self, ref_logps: Tensor | None) -> dict[str, Any]:
        """Arguments of ``dpo_loss_from_logps``; ``ref_logps`` are the answers' sums, ``(2P,)``."""
        if ref_logps is not None and self.weights is not None:
            ref_logps = spread_sums(ref_logps, self.weights, self.mask, self.bounds)
        given = {"ref_logps": ref_logps, "token_weights": self.weights, "nll_mask": self.nll_mask}
        return {**given, "layout": self.layout}

    def for_the_head(self, ref_logps: Tensor | None) -> dict[str, Any]:
        """Arguments of ``fused_dpo_loss``, whose layout the patched model settles."""
        given = self.for_logps(ref_logps)
        if self.layout is None and ref_logps is not None and self.weights is not None:
            # The reference stands where a token is predicted, weights and labels where it is.
            given["ref_logps"] = given["ref_logps"].roll(-1, 1)
        del given["layout"], given["nll_mask"]
        return {**given, "nll_labels": self.nll_labels}


def loss_tokens(batch: Batch, *, nll_on_prompt: bool) -> LossTokens:
    """What the loss of a batch of pairs looks at."""
    if isinstance(batch, RowBatch) and batch.more is not None:
        return _with_more_in_rows(batch, batch.more, nll_on_prompt=nll_on_prompt)
    if isinstance(batch, PaddedBatch) and batch.gold is not None:
        return _with_gold(batch, batch.gold)
    if isinstance(batch, PaddedBatch) and nll_on_prompt:
        sequences, mask = batch.sequences, batch.mask
        is_chosen = torch.arange(len(mask), device=mask.device)[:, None] < batch.num_rows
        whole = is_chosen & (sequences.attention_mask != 0)
        labels = sequences.labels.where(~whole, sequences.input_ids)
        nll_mask = whole.index_fill(1, torch.zeros(1, dtype=torch.int64, device=mask.device), False)
        scored = replace(sequences, labels=labels)
        return LossTokens(scored, mask, None, batch.token_weights, nll_mask, labels)
    return LossTokens(batch, batch.mask, batch.layout, batch.token_weights)


def _with_more_in_rows(batch: RowBatch, more: TokenLayout, *, nll_on_prompt: bool) -> LossTokens:
    """Each chosen answer's tokens, then those that the NLL term has beside or in place of them."""
    tokens, weights, added = batch.tokens, batch.token_weights, more.lengths or ()
    device, size, count = tokens.target_ids.device, batch.num_rows, len(tokens.target_ids)
    sizes = torch.tensor(added, dtype=torch.int64, device=device)
    owner = torch.repeat_interleave(torch.arange(size, device=device), sizes, output_size=sum(added))
    sequence_ids = torch.cat([tokens.sequence_ids, owner])
    order = sequence_ids.argsort(stable=True)
    lengths = (*(a + b for a, b in zip(batch.lengths, added, strict=False)), *batch.lengths[size:])
    joined = TokenLayout(
        torch.cat([tokens.token_index, more.token_index])[order],
        torch.cat([tokens.target_ids, more.target_ids])[order],
        sequence_ids[order],
        lengths,
    )
    mask = order < count
    if weights is not None:
        weights = torch.cat([weights, weights.new_zeros(len(owner))])[order]
    layout = PackedLayout(bounds_of(lengths).to(device), lengths)
    nll_mask = torch.ones_like(mask) if nll_on_prompt else ~mask
    return LossTokens(replace(batch, tokens=joined), mask, layout, weights, nll_mask)


def _with_gold(batch: PaddedBatch, gold: Padded) -> LossTokens:
    """Gold answers in P more padded rows of one call; each then counts as a part of its chosen sequence."""
    judged, mask, weights = batch.sequences, batch.mask, batch.token_weights
    width = max(mask.shape[1], gold.labels.shape[1])

    def together(first: Tensor, second: Tensor, fill: int) -> Tensor:
        rows = (F.pad(rows, (0, width - rows.shape[1]), value=fill) for rows in (first, second))
        return torch.cat(list(rows))

    scored = Padded(
        together(judged.input_ids, gold.input_ids, 0),
        together(judged.attention_mask, gold.attention_mask, 0),
        together(judged.labels, gold.labels, IGNORE_INDEX),
        None if judged.media is None or gold.media is None else judged.media.joined(gold.media, width),
    )
    nothing = torch.zeros_like(gold.labels, dtype=torch.bool)
    order = _gold_behind_chosen(scored.labels)
    size = len(nothing)
    lengths = (*[2 * width] * size, *[width] * size)
    layout = PackedLayout(bounds_of(lengths).to(mask.device), lengths)
    if weights is not None:
        weights = together(weights, nothing.to(weights.dtype), 0).reshape(-1)[order]
    return LossTokens(
        scored,
        together(mask, nothing, False).reshape(-1)[order],
        layout,
        weights,
        together(torch.zeros_like(mask), gold.mask, False).reshape(-1)[order],
    )


def _gold_behind_chosen(rows: Tensor) -> Tensor:
    """``(3P T,)``: of rows ``(3P, T)``, chosen, rejected and gold, places in an order of pairs' sequences."""
    size, width = len(rows) // 3, rows.shape[1]
    places = torch.arange(len(rows) * width, device=rows.device).view(3, size, width)
    return torch.cat([places[::2].transpose(0, 1).reshape(-1), places[1].reshape(-1)])
