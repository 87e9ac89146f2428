"""Softmax over a vocabulary that is never there as a whole: a slab's share, and how shares add up.

A slab is a range of the vocabulary for C tokens; its raw products ``x = W h`` have shape (C, S). As in
``contract.py``, z = softcap(s (x + b)) / tau. What a row needs of a slab is its maximum and sums relative
to it, `SlabSums`; those of two slabs, relative to a common maximum, add up. Once lse is known, the slab's
part of

    D = (onehot(y) - p) * cf,    p = exp(z - lse)

needs nothing of the other slabs. As in the Triton row kernel z = slope v with slope > 0, and differences of
v are taken before anything is scaled. The label's logit is no part of the sums of exponentials: it is kept
beside them and added at the end, so that 1 - p, and a log p near 0, are right where p rounds to 1.

This module is plain torch: any dtype, any device. It goes through a slab in parts, so that its temporaries
stay within half of the slab's own memory. ``slab_triton.py`` is the second implementation of
`SlabGradient`, and ``lean_triton.py`` makes the sums without the logits.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .contract import LogitTransform, RowOutputs

# exp of anything lower is 0 in the dtype; a finite number instead of -inf keeps 0 * log p at 0.
_LOWEST_LOG = {torch.float32: -200.0, torch.float64: -1000.0}
# Into how many parts a slab is cut; at most 8 temporaries of a part's size live at a time.
_PARTS = 16


class SlabSums(NamedTuple):
    """What is kept of the logits of a range of the vocabulary; each ``(C,)``, or ``(C, K)`` for K ranges.

    The label's logit is left out, but of ``value``.
    """

    maximum: Tensor  # of v; -inf for nothing
    exp: Tensor  # sum of e = exp(slope (v - maximum))
    label_value: Tensor  # v of the label; 0 where the range does not have it
    exp_sq: Tensor | None = None  # sum of e^2
    exp_log: Tensor | None = None  # sum of e log e
    value: Tensor | None = None  # sum of v, the label's too


class SlabGradient(Protocol):
    """Write the slab's part of D, or of the gradient of a logp + b lse + c entropy, from the given lse.

    The rules of ``contract.py`` hold: a label outside the slab brings no one-hot, a masked logit has p = 0,
    NaN stays in its row, offsets have 64 bits. ``logits`` is scratch.
    """

    def __call__(
        self,
        logits: Tensor,  # (C, S) raw products, fp32 (fp64: plain torch only); rows contiguous
        labels: Tensor,  # (C,) int64 token ids
        logps: Tensor,  # (C,) in the dtype of logits: of the labels, whose 1 - p is made of it
        lse: Tensor,  # (C,) the same
        transform: LogitTransform,  # with the bias of the whole vocabulary
        first_token: int,  # the token id of column 0
        # (C, S) in the operands' dtype. At the address of `logits` it has the byte stride of its rows
        # exactly; otherwise it does not overlap.
        d_out: Tensor,
        *,
        coeffs: Tensor | None = None,  # (3, C) contiguous: a, b, c; see contract.py
        entropy: Tensor | None = None,  # (C,) with coeffs: the rows' entropy; None where c is 0
    ) -> None: ...


def value_and_slope(transform: LogitTransform) -> tuple[float | None, float]:
    """``(pre_scale, slope)``: v = pre_scale (x + b), and its tanh with a softcap; z = slope v, slope > 0."""
    if transform.softcap is None:
        return (None if transform.scale > 0 else -1.0), abs(transform.grad_scale)
    return transform.scale / transform.softcap, transform.softcap / transform.temperature


def no_sums(like: Tensor, num_rows: int, statistics: tuple[str, ...]) -> SlabSums:
    """The sums over an empty range, with room for what the statistics named need."""
    zeros = like.new_zeros(num_rows)
    return SlabSums(
        torch.full_like(zeros, -torch.inf),
        zeros,
        zeros,
        zeros if "log_sum_sq_probs" in statistics else None,
        zeros if "entropy" in statistics else None,
        zeros if "mean_logit" in statistics else None,
    )


def slab_sums(
    logits: Tensor, labels: Tensor, transform: LogitTransform, first_token: int, statistics: tuple[str, ...]
) -> SlabSums:
    """The sums over one slab from its raw products ``logits`` (C, S)."""
    _, slope = value_and_slope(transform)
    sums = no_sums(logits, len(logits), statistics)
    for start, stop in _parts(logits):
        value = _value(logits[:, start:stop], transform, first_token + start)
        at = labels - (first_token + start)
        inside = (at >= 0) & (at < stop - start)
        column = at.where(inside, 0)[:, None]
        here = value.gather(1, column)[:, 0]
        label_value = here.where(inside, 0.0)
        total = value.sum(1) if "mean_logit" in statistics else None
        value.scatter_(1, column, here.masked_fill(inside, -torch.inf)[:, None])
        maximum = value.amax(1)
        base = maximum.where(maximum != -torch.inf, 0.0)  # -inf - -inf would be NaN
        log_e = value.sub_(base[:, None]).mul_(slope).clamp_(min=_LOWEST_LOG[value.dtype])
        e = log_e.exp()
        exp = e.sum(1)
        exp_log = log_e.mul_(e).sum(1) if "entropy" in statistics else None
        exp_sq = e.square_().sum(1) if "log_sum_sq_probs" in statistics else None
        sums = merged(sums, SlabSums(maximum, exp, label_value, exp_sq, exp_log, total), slope)
    return sums


def combined(parts: SlabSums, slope: float) -> SlabSums:
    """The sums over K ranges ``(C, K)`` as those over all of them ``(C,)``, in the order of the ranges."""
    maximum = parts.maximum.amax(1)
    shift = (parts.maximum - maximum[:, None]) * slope
    # Nothing but masked logits: the sums are 0 (NaN in a row of NaN), and -inf - -inf would be NaN.
    shift = shift.where(parts.maximum != -torch.inf, 0.0)
    factor = shift.exp()
    exp_log = None
    if parts.exp_log is not None:
        # A range far below the maximum has a factor of 0 and, with +inf for a maximum, a shift of -inf.
        shift = shift.clamp(min=_LOWEST_LOG[shift.dtype])
        exp_log = (factor * (parts.exp_log + shift * parts.exp)).sum(1)
    return SlabSums(
        maximum,
        (factor * parts.exp).sum(1),
        parts.label_value.sum(1),
        None if parts.exp_sq is None else (factor.square() * parts.exp_sq).sum(1),
        exp_log,
        None if parts.value is None else parts.value.sum(1),
    )


def merged(first: SlabSums, second: SlabSums, slope: float) -> SlabSums:
    """The sums over two ranges that share no token."""
    pairs = zip(first, second, strict=True)
    stacked = (None if a is None or b is None else torch.stack((a, b), 1) for a, b in pairs)
    return combined(SlabSums(*stacked), slope)  # type: ignore[arg-type]


def logsumexp(sums: SlabSums, slope: float) -> Tensor:
    """Of z over the range that the sums are of; -inf of nothing but masked logits."""
    base = sums.maximum.where(sums.maximum != -torch.inf, 0.0)
    return base * slope + sums.exp.log()


def with_labels(sums: SlabSums, has_label: Tensor, slope: float) -> tuple[SlabSums, Tensor, Tensor]:
    """The sums of a range with its labels in them; their log-probabilities ``(C,)`` there; log of the sum.

    Args:
        has_label: ``(C,)`` bool, whether the range has the row's label.
    """
    label = sums.label_value.where(has_label, -torch.inf)
    # The label as a range of its own: one e of 1, none where it is masked.
    e, zeros = (label != -torch.inf).to(label.dtype), torch.zeros_like(label)
    others, sums = sums, merged(sums, SlabSums(label, e, zeros, e, zeros, zeros), slope)
    base = sums.maximum.where(sums.maximum != -torch.inf, 0.0)
    # Of a label at the top the sum is 1 + the others', which may be small.
    rest = others.exp * ((others.maximum - base) * slope).exp()
    is_top = (label == sums.maximum) & (e == 1)
    log_sum = rest.log1p().where(is_top, sums.exp.log())
    return sums, (label - base) * slope - log_sum, log_sum


def write_outputs(sums: SlabSums, labels: Tensor, vocab_size: int, slope: float, outputs: RowOutputs) -> None:
    """The log-probabilities and statistics of C tokens from their sums over the whole vocabulary."""
    has_label = (labels >= 0) & (labels < vocab_size)
    label = sums.label_value
    sums, logp, log_sum = with_labels(sums, has_label, slope)
    outputs.logps.copy_(logp.where(has_label, torch.nan))
    outputs.lse.copy_(logsumexp(sums, slope))
    if outputs.entropy is not None and sums.exp_log is not None:
        outputs.entropy.copy_(log_sum - sums.exp_log / sums.exp)
    if outputs.log_sum_sq_probs is not None and sums.exp_sq is not None:
        outputs.log_sum_sq_probs.copy_(sums.exp_sq.log() - 2 * log_sum)
    if outputs.mean_logit is not None and sums.value is not None:
        outputs.mean_logit.copy_(sums.value / vocab_size * slope)
    if outputs.is_top1 is not None:
        is_number = sums.exp == sums.exp
        outputs.is_top1.copy_(has_label & (label == sums.maximum) & is_number)


def slab_gradient(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    transform: LogitTransform,
    first_token: int,
    d_out: Tensor,
    *,
    coeffs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> None:
    """`SlabGradient` in plain torch; also takes fp64."""
    _, slope = value_and_slope(transform)
    others = logps.expm1().neg()  # 1 - p of the labels
    # In place, a D of 16 bits lies over the front of each row: parts go up, each read before it is written.
    for start, stop in _parts(logits):
        value = _value(logits[:, start:stop], transform, first_token + start)
        at = labels - (first_token + start)
        inside = (at >= 0) & (at < stop - start)
        log_p = (value * slope).sub_(lse[:, None]).clamp_(min=_LOWEST_LOG[value.dtype])
        column = at.where(inside, 0)[:, None]
        label_log_p = log_p.gather(1, column)
        if coeffs is None:
            d = log_p.exp_().neg_()
            at_label = others[:, None]
        else:
            a, b, c = coeffs[:, :, None]  # each (C, 1)
            at_label = a * others[:, None] + label_log_p.exp() * b
            if entropy is None:
                d = log_p.exp_().mul_(b - a)
            else:
                d = log_p.exp().mul_((log_p + entropy[:, None]).mul_(-c).add_(b - a))
                at_label -= label_log_p.exp() * c * (label_log_p + entropy[:, None])
        d.scatter_(1, column, at_label.where(inside[:, None], d.gather(1, column)))
        if transform.softcap is not None:
            d.mul_(value.square_().neg_().add_(1.0))
        d_out[:, start:stop] = d


def _parts(slab: Tensor) -> list[tuple[int, int]]:
    width = slab.shape[1]
    step = max(-(-width // _PARTS), 1)
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def _value(products: Tensor, transform: LogitTransform, first_token: int) -> Tensor:
    """v of a range of raw products, in memory of its own."""
    pre_scale, _ = value_and_slope(transform)
    if transform.bias is None:
        value = products.clone()
    else:
        value = products + transform.bias[first_token : first_token + products.shape[1]]
    if pre_scale is not None:
        value.mul_(pre_scale)
    return value if transform.softcap is None else value.tanh_()
