"""The k largest probabilities of every row: their sum and their entropy, in plain torch for every backend.

For the k largest p_i of a token, in nats and not renormalised,

    mass = sum of p_i        entropy = -sum of p_i log p_i

A logit's transform is monotone, so ``torch.topk`` looks at the raw products (those with a bias after it is
added) and only k values a row are transformed. As in ``slab.py`` a row keeps its maximum and sums relative
to it, not the k values; the logsumexp, which the row kernel makes, comes last. A chunk has to be looked at
before the row kernel, which may overwrite it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import LogitTransform

# exp of anything lower is 0 in the dtype; a finite number instead of -inf keeps 0 * log p at 0.
_LOWEST_LOG = {torch.float32: -200.0, torch.float64: -1000.0}
# Into how many tiles of rows, or of columns, a chunk is cut: what is made of a tile, copy, values and
# indices, takes 3 to 5 times its memory at most.
_TILES = 16


class TopSums(NamedTuple):
    """What is kept of a row's k largest logits z; each ``(C,)`` in the accumulation dtype."""

    maximum: Tensor  # of z
    exp: Tensor  # sum of e = exp(z - maximum)
    exp_log: Tensor  # sum of e log e


def chunk_top_sums(
    logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    k: int,
    *,
    target_logits: Tensor | None = None,
) -> TopSums:
    """The sums of a chunk of raw products, a tile of rows at a time.

    Args:
        logits: ``(C, V)``, not written to.
        labels: ``(C,)`` int64; looked at with ``target_logits`` only.
        transform: from raw products to logits.
        k: 1 to V.
        target_logits: ``(C,)`` the label's raw product, unrounded; see ``contract.RowKernel``.
    """
    num_rows, vocab_size = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    sums = TopSums(*logits.new_empty((3, num_rows), dtype=dtype))
    step = max(-(-num_rows // _TILES), 1)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        tile = logits[rows]
        if target_logits is not None or transform.bias is not None:
            tile = tile.to(dtype, copy=True)
        if target_logits is not None:
            column = labels[rows, None].clamp(0, vocab_size - 1)
            in_range = ((labels >= 0) & (labels < vocab_size))[rows, None]
            exact = target_logits[rows, None].to(dtype).where(in_range, tile.gather(1, column))
            tile.scatter_(1, column, exact)
        if transform.bias is not None:
            tile.add_(transform.bias)
        top = _top(tile, k, transform).to(dtype)
        for out, value in zip(sums, top_sums(top, transform), strict=True):
            out[rows] = value
    return sums


def no_top(like: Tensor, num_rows: int, k: int, transform: LogitTransform) -> Tensor:
    """``(num_rows, k)`` for ``merge_top`` to begin with: values that every other one displaces."""
    nothing = -torch.inf if transform.scale > 0 else torch.inf
    return torch.full_like(like.new_empty((num_rows, k)), nothing)


def merge_top(top: Tensor, logits: Tensor, transform: LogitTransform, first_token: int) -> None:
    """Puts into ``top`` what a slab of the vocabulary has of the k foremost raw products, bias included.

    Args:
        top: ``(C, k)``, from ``no_top`` or the slabs before; in no order.
        logits: ``(C, S)`` raw products of tokens from ``first_token`` on, not written to.
    """
    width, k = logits.shape[1], top.shape[1]
    step = max(-(-width // _TILES), 1)
    for start in range(0, width, step):
        part = logits[:, start : start + step]
        if transform.bias is not None:
            part = part + transform.bias[first_token + start : first_token + start + part.shape[1]]
        foremost = _top(part, min(k, part.shape[1]), transform)
        top.copy_(_top(torch.cat((top, foremost), 1), k, transform))


def top_sums(top: Tensor, transform: LogitTransform) -> TopSums:
    """The sums of the foremost raw products ``(C, k)``, bias included."""
    z = top * transform.scale
    if transform.softcap is not None:
        z = torch.tanh_(z.div_(transform.softcap)).mul_(transform.softcap)
    z.div_(transform.temperature)
    maximum = z.amax(1)
    base = maximum.where(maximum != -torch.inf, 0.0)  # -inf - -inf would be NaN
    log_e = z.sub_(base[:, None]).clamp_(min=_LOWEST_LOG[z.dtype])
    e = log_e.exp()
    return TopSums(base, e.sum(1), log_e.mul_(e).sum(1))


def write_top(sums: TopSums, lse: Tensor, mass: Tensor, entropy: Tensor) -> None:
    """``mass (C,)`` and ``entropy (C,)`` from the sums and the rows' logsumexp."""
    log_largest = sums.maximum - lse
    largest = log_largest.exp()
    mass.copy_(sums.exp * largest)
    entropy.copy_(-(sums.exp_log + log_largest * sums.exp) * largest)


def _top(values: Tensor, k: int, transform: LogitTransform) -> Tensor:
    """The k raw products of each row whose logits are the largest: with a negative scale the smallest."""
    return torch.topk(values, k, dim=1, largest=transform.scale > 0, sorted=False).values
