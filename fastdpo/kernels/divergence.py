"""Divergences of two distributions over the vocabulary, row by row, with their gradients; plain torch.

For logits z of the policy and c of a teacher, p = softmax(z), q = softmax(c), delta = log q - log p:

    forward_kl = KL(q || p) = sum q delta                  dz = p - q
    reverse_kl = KL(p || q) = -sum p delta                 dz = p (-delta - reverse_kl)
    jsd = b KL(q || m) + (1 - b) KL(p || m)                dz = (1 - b) p (log p - log m - KL(p || m))
          with m = b q + (1 - b) p

    log m - log p = max(delta, 0) + s,   s = log(1 + w (exp(-|delta|) - 1)),   w = 1 - b if delta > 0 else b

so that nothing overflows and equal logits give exactly 0. The teacher is a constant. A probability of 0
contributes nothing where it is the weight of a sum, masked tokens (logits of -inf) included; a token that q
has and p masks makes KL(q || p) infinite, as it is. The label's log p and log q are read off on the way:

    logps = log p_y                                        dz = onehot(y) - p

The inputs are scratch: what is made beside them is ``TEMPORARIES`` times as large, so callers hand in tiles
of rows. Any floating dtype of at least 32 bits.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .contract import LogitTransform

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
DIFFERENTIABLE = (*DIVERGENCES, "logps")
# Tensors of the tiles' size that are made at a time: p, q, what is left of a cap's slope, s and its parts,
# the masks of a quarter of the size each.
TEMPORARIES = 6


class DivergenceOutputs(NamedTuple):
    """Per-row results ``(C,)`` in nats, written; None where not wanted. Differentiable ones come first."""

    forward_kl: Tensor | None = None  # KL(teacher || policy)
    reverse_kl: Tensor | None = None  # KL(policy || teacher)
    jsd: Tensor | None = None
    logps: Tensor | None = None  # log p of the label; NaN where that is outside 0..V-1
    l1_distance: Tensor | None = None  # sum |p_first - p_second| of two teachers
    ref_logps: Tensor | None = None  # log q of the label, likewise


class DivergenceKernel(Protocol):
    """Process one chunk; see the module's docstring for the maths."""

    def __call__(
        self,
        # (C, V) raw products x of the policy's head, fp32 (fp64: plain torch only); rows contiguous, any row
        # stride >= V. Scratch, as the next.
        logits: Tensor,
        teachers: tuple[Tensor, ...],  # (C, V) likewise, of one teacher's head or of two
        labels: Tensor,  # (C,) int64, contiguous; looked at for logps and ref_logps
        transforms: tuple[LogitTransform, ...],  # the policy's, then the teachers'
        outputs: DivergenceOutputs,
        *,
        # (2, C) with two teachers, a and b of their combination a z_first + b z_second; to these the slopes
        # add multiples of the teachers' L1 distance.
        coefficients: Tensor | None = None,
        slopes: tuple[float, float] = (0.0, 0.0),
        jsd_beta: float = 0.5,  # b, between 0 and 1
        # (C, V) fp32, bf16, fp16 (fp64): receives D, the gradient with respect to x over s / tau. With
        # logps_d_out None it may begin at the address of logits, with the byte stride of its rows; else at
        # that of the first teacher's. Otherwise it overlaps nothing.
        d_out: Tensor | None = None,
        # (C, V) likewise, only with d_out: receives the D of logps, where d_out has that of the divergence;
        # it may begin at the address of logits.
        logps_d_out: Tensor | None = None,
        # (4, C) contiguous, what D is the gradient of: their combination of DIFFERENTIABLE, of which outputs
        # has those with coefficients other than 0. None: of the one divergence in outputs.
        grad_coeffs: Tensor | None = None,
    ) -> None: ...


def divergence_kernel(
    logits: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor,
    transforms: tuple[LogitTransform, ...],
    outputs: DivergenceOutputs,
    *,
    coefficients: Tensor | None = None,
    slopes: tuple[float, float] = (0.0, 0.0),
    jsd_beta: float = 0.5,
    d_out: Tensor | None = None,
    logps_d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> None:
    """``DivergenceKernel`` in plain torch, on any device: for tiles of rows, see ``TEMPORARIES``."""
    for products, transform in zip((logits, *teachers), transforms, strict=True):
        to_logits(products, transform)
    teacher = teachers[0]
    if coefficients is not None:
        if outputs.l1_distance is not None or any(slopes):
            distance = l1_distance(*teachers)
            if outputs.l1_distance is not None:
                outputs.l1_distance.copy_(distance)
            if any(slopes):
                coefficients = coefficients + torch.stack([slope * distance for slope in slopes])
        teacher = combine(teachers[0], teachers[1], coefficients)
    divergence_rows(
        logits,
        teacher,
        labels,
        transforms[0],
        outputs,
        jsd_beta=jsd_beta,
        d_out=d_out,
        logps_d_out=logps_d_out,
        grad_coeffs=grad_coeffs,
    )


def to_logits(products: Tensor, transform: LogitTransform) -> Tensor:
    """Raw products ``(C, V)`` as logits z = softcap(s (x + b)) / tau, in place."""
    if transform.bias is not None:
        products.add_(transform.bias)
    products.mul_(transform.scale)
    if transform.softcap is not None:
        products.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return products.div_(transform.temperature)


def l1_distance(first: Tensor, second: Tensor) -> Tensor:
    """``(C,)`` sum over the vocabulary of the difference of two softmaxes, without the customary half."""
    difference = first.sub(first.amax(1, keepdim=True)).exp_()
    difference.div_(difference.sum(1, keepdim=True))
    other = second.sub(second.amax(1, keepdim=True)).exp_()
    return difference.sub_(other.div_(other.sum(1, keepdim=True))).abs_().sum(1)


def combine(first: Tensor, second: Tensor, coefficients: Tensor) -> Tensor:
    """Logits ``a first + b second`` in the place of ``first``; ``coefficients`` ``(2, C)``.

    A token that either teacher masks is masked: -inf - -inf says nothing.
    """
    is_masked = (first == -torch.inf) | (second == -torch.inf)
    # The maximum goes first, so that what a and b multiply is small; a constant per row changes no softmax.
    first.sub_(first.amax(1, keepdim=True)).mul_(coefficients[0, :, None])
    second.sub_(second.amax(1, keepdim=True)).mul_(coefficients[1, :, None])
    return first.add_(second).masked_fill_(is_masked, -torch.inf)


def divergence_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    outputs: DivergenceOutputs,
    *,
    jsd_beta: float = 0.5,
    d_out: Tensor | None = None,
    logps_d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> None:
    """The divergences of a tile from one teacher's logits, and D; the rest as of ``DivergenceKernel``.

    Args:
        logits: ``(C, V)`` of the policy, from ``to_logits`` with ``transform``; scratch.
        teacher_logits: ``(C, V)``; scratch.
    """
    cap_slope = None
    if d_out is not None and transform.softcap is not None:
        cap_slope = logits.mul(transform.temperature / transform.softcap).square_().neg_().add_(1.0)
    p = _log_softmax_(logits)
    q = _log_softmax_(teacher_logits)
    for out, log_probs in ((outputs.logps, logits), (outputs.ref_logps, teacher_logits)):
        if out is not None:
            out.copy_(_at_labels(log_probs, labels))
    # Two masked logits are equal, and -inf - -inf would be NaN.
    is_equal = teacher_logits == logits
    delta = teacher_logits.sub_(logits).masked_fill_(is_equal, 0.0)
    scratch = logits

    def total(weight: Tensor) -> Tensor:
        """The sum of weight times what is in ``scratch``."""
        return scratch.mul_(weight).masked_fill_(weight == 0, 0.0).sum(1)

    reverse_kl = kl_to_mean = log_1p = None
    if outputs.forward_kl is not None:
        scratch.copy_(delta)
        outputs.forward_kl.copy_(total(q))
    if outputs.reverse_kl is not None:
        torch.neg(delta, out=scratch)
        reverse_kl = total(p)
        outputs.reverse_kl.copy_(reverse_kl)
    if outputs.jsd is not None:
        log_1p = _log_mean(delta, jsd_beta)
        torch.clamp(delta, max=0.0, out=scratch).sub_(log_1p)  # log q - log m
        teacher_part = total(q)
        log_1p.add_(delta.clamp(min=0.0)).neg_()  # log p - log m
        scratch.copy_(log_1p)
        kl_to_mean = total(p)
        outputs.jsd.copy_(jsd_beta * teacher_part + (1 - jsd_beta) * kl_to_mean)
    if d_out is None:
        return

    weights = (1.0, 1.0, 1.0, 1.0) if grad_coeffs is None else grad_coeffs[:, :, None]
    d = scratch.zero_()
    if reverse_kl is not None:
        d.sub_(delta.add_(reverse_kl[:, None]).mul_(weights[1]))
    if kl_to_mean is not None and log_1p is not None:
        d.add_(log_1p.sub_(kl_to_mean[:, None]).mul_((1 - jsd_beta) * weights[2]))
    if reverse_kl is not None or kl_to_mean is not None:
        d.mul_(p).masked_fill_(p == 0, 0.0)
    if outputs.forward_kl is not None:
        d.sub_(q.sub_(p).mul_(weights[0]))
    if outputs.logps is not None and (grad_coeffs is not None or logps_d_out is not None):
        minus_d = _minus_d_of_logps_(p, labels)
        if grad_coeffs is not None:
            d.addcmul_(minus_d, grad_coeffs[3, :, None], value=-1.0)
    _write_d(d, cap_slope, d_out)
    if logps_d_out is not None:
        torch.neg(minus_d, out=d)
        _write_d(d, cap_slope, logps_d_out)


def _write_d(d: Tensor, cap_slope: Tensor | None, d_out: Tensor) -> None:
    if cap_slope is not None:
        d.mul_(cap_slope)
    # D of 16 bits may lie over d: first in memory of its own.
    d_out.copy_(d if d_out.dtype == d.dtype else d.to(d_out.dtype))


def _at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """``(C,)``: what stands at each row's label; NaN for a label outside 0..V-1."""
    safe = labels.clamp(0, values.shape[1] - 1)
    return values.gather(1, safe[:, None])[:, 0].masked_fill(safe != labels, torch.nan)


def _minus_d_of_logps_(p: Tensor, labels: Tensor) -> Tensor:
    """``p - onehot`` in the place of ``p``; of a label minus the others' sum, which p near 1 has not."""
    safe = labels.clamp(0, p.shape[1] - 1)[:, None]
    is_label, of_label = safe == labels[:, None], p.gather(1, safe)
    others = p.scatter_(1, safe, of_label.masked_fill(is_label, 0.0)).sum(1, keepdim=True)
    return p.scatter_(1, safe, others.neg_().where(is_label, of_label))


def _log_softmax_(logits: Tensor) -> Tensor:
    """The softmax; ``logits`` become its logarithm. torch's own adds up in a chain; see ``reference.py``."""
    logits.sub_(logits.amax(1, keepdim=True))
    p = logits.exp()
    total = p.sum(1, keepdim=True)
    logits.sub_(total.log())
    return p.div_(total)


def _log_mean(delta: Tensor, b: float) -> Tensor:
    """s of the module's docstring."""
    # Tensors of delta's dtype: of two numbers torch.where makes fp32.
    weight = torch.where(delta > 0, delta.new_full((), 1 - b), delta.new_full((), b))
    return delta.abs().neg_().expm1_().mul_(weight).log1p_()
