"""The sequence kernel in Triton; ``sequence.py`` has the maths and the rules.

A program for each sequence, or for each pair. It adds up a sequence in tiles that begin at the sequence's
first token, so that a sum's bits depend on its sequence alone. The program that finishes last adds up the
losses of all pairs, in the order of the pairs.
"""
# Arguments of a Triton kernel have no types that a type checker knows.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sequence import SigmoidOutputs, SigmoidTerms
from .tickets import ticket_counter
from .triton_device import unavailable_reason
from .triton_parts import _jit, triton

if triton is not None:
    import triton.language as tl

__all__ = ["sequence_sums", "sigmoid_pairs", "unavailable_reason"]

TILE = 512  # tokens; the order of sums hangs on it
NUM_WARPS = 8
# Four programs a multiprocessor. Without it ptxas aims, as its version likes, at more, and spills.
MAX_REGISTERS = 64


@_jit()
def _span(offsets, sequence, num_tokens):
    """The sequence's first token and the one after its last, forced into range whatever the offsets are."""
    low = num_tokens.to(tl.int64) * 0
    begin = tl.minimum(tl.maximum(tl.load(offsets + sequence), low), low + num_tokens)
    end = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), begin), low + num_tokens)
    return begin, end


@_jit()
def _counts(mask, tokens, inside):
    if mask is not None:
        inside &= tl.load(mask + tokens, mask=inside, other=0).to(tl.int1)
    return inside


@_jit()
def _add_up(values, weights, mask, begin, end, TILE: tl.constexpr):
    """The sequence's sum in fp64, and 1 if a token counts, else 0."""
    lanes = tl.arange(0, TILE)
    sums = tl.zeros([TILE], tl.float64)
    has_token = tl.zeros([TILE], tl.int32)
    start = begin
    while start < end:
        tokens = start + lanes
        counts = _counts(mask, tokens, tokens < end)
        # A token that does not count may be NaN: it is not even read.
        summand = tl.load(values + tokens, mask=counts, other=0.0).to(tl.float64)
        if weights is not None:
            summand *= tl.load(weights + tokens, mask=counts, other=0.0).to(tl.float64)
        sums += summand
        has_token |= counts.to(tl.int32)
        start += TILE
    return tl.sum(sums), tl.max(has_token)


@_jit()
def _write_g(g, weights, mask, offsets, sequence, num_tokens, coeff, TILE: tl.constexpr):
    # Read again: kept since the sums, the span would hold registers through all the maths of the loss.
    start, end = _span(offsets, sequence, num_tokens)
    lanes = tl.arange(0, TILE)
    while start < end:
        tokens = start + lanes
        inside = tokens < end
        counts = _counts(mask, tokens, inside)
        grad = tl.zeros([TILE], tl.float64) + coeff
        if weights is not None:
            grad *= tl.load(weights + tokens, mask=counts, other=0.0).to(tl.float64)
        tl.store(g + tokens, tl.where(counts, grad, 0.0).to(g.dtype.element_ty), mask=inside)
        start += TILE


@_jit()
def _at_pair(values, number, pair):
    """The pair's number out of a tensor, or the one for all of them."""
    if values is not None:
        number = tl.load(values + pair).to(tl.float64)
    return tl.full([], 0.0, tl.float64) + number


@_jit()
def _softplus(x):
    """log(1 + e^x): with u = 1 + e rounded, log(u) e / (u - 1) has the error of the rounding cancel."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p  # NaN where x is: log1p is


@_jit()
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@_jit()
def _expected(probability, penalty):
    """probability * penalty; 0 where the probability is, however large the penalty."""
    return tl.where(probability != 0.0, probability * penalty, 0.0)


PER_TOKEN = ("values", "weights", "mask", "g")
PER_PAIR = ("offsets", "sums", "ref_sums", "betas", "margins", "preferreds", "pair_weights", "divisors")


# Compiled once, not again for another batch: nothing here gets faster by knowing the size or the alignment.
@_jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=(*PER_TOKEN[:3], "offsets", "sums"))
def _sums_kernel(values, weights, mask, offsets, sums, num_tokens, TILE: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = _span(offsets, sequence, num_tokens)
    total, _ = _add_up(values, weights, mask, begin, end, TILE)
    tl.store(sums + sequence, total.to(sums.dtype.element_ty))


@_jit(
    do_not_specialize=["num_tokens", "num_pairs"],
    do_not_specialize_on_alignment=(*PER_TOKEN, *PER_PAIR, "pair_losses", "loss", "counter"),
)
def _pairs_kernel(
    values, weights, mask, offsets,  # (N,) three times, (2P + 1,)
    ref_sums, betas, margins, preferreds, pair_weights, divisors,  # (2P,), (P,) four times, ()
    sums, loss, g, pair_losses, counter,  # (2P,), (), (N,), (P,), (1,)
    num_tokens, num_pairs,
    beta: tl.float64, margin: tl.float64, preferred: tl.float64, pair_weight: tl.float64, divisor: tl.float64,
    TILE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    begin, end = _span(offsets, 2 * pair, num_tokens)
    chosen_total, has_chosen = _add_up(values, weights, mask, begin, end, TILE)
    begin, end = _span(offsets, 2 * pair + 1, num_tokens)
    rejected_total, has_rejected = _add_up(values, weights, mask, begin, end, TILE)
    # The rounded sums: those that the caller sees, and equal to a reference's bit for bit.
    chosen = chosen_total.to(sums.dtype.element_ty)
    rejected = rejected_total.to(sums.dtype.element_ty)
    tl.store(sums + 2 * pair, chosen)
    tl.store(sums + 2 * pair + 1, rejected)

    chosen_ratio, rejected_ratio = chosen.to(tl.float64), rejected.to(tl.float64)
    if ref_sums is not None:
        chosen_ratio -= tl.load(ref_sums + 2 * pair).to(tl.float64)
        rejected_ratio -= tl.load(ref_sums + 2 * pair + 1).to(tl.float64)
    b = _at_pair(betas, beta, pair)
    q = _at_pair(preferreds, preferred, pair)
    w = _at_pair(pair_weights, pair_weight, pair)
    all_pairs = _at_pair(divisors, divisor, 0)
    h = b * (chosen_ratio - rejected_ratio) - _at_pair(margins, margin, pair)
    is_scored = (has_chosen | has_rejected) > 0
    pair_loss = w * (_expected(q, _softplus(-h)) + _expected(1.0 - q, _softplus(h)))
    coeff = w * ((1.0 - q) * _sigmoid(h) - q * _sigmoid(-h)) * b / all_pairs
    coeff = tl.where(is_scored, coeff, 0.0)
    tl.store(pair_losses + pair, tl.where(is_scored, pair_loss, 0.0))
    _write_g(g, weights, mask, offsets, 2 * pair, num_tokens, coeff, TILE)
    _write_g(g, weights, mask, offsets, 2 * pair + 1, num_tokens, -coeff, TILE)

    tl.debug_barrier()  # the pair's loss is written before its ticket is taken, whichever threads do it
    ticket = tl.atomic_add(counter, 1, sem="acq_rel")
    if ticket == num_pairs - 1:
        lanes = tl.arange(0, TILE)
        total = tl.zeros([TILE], tl.float64)
        start = ticket * 0
        while start < num_pairs:
            # Past L1, which need not know what other multiprocessors wrote.
            inside = start + lanes < num_pairs
            total += tl.load(pair_losses + start + lanes, mask=inside, other=0.0, cache_modifier=".cg")
            start += TILE
        tl.store(loss, (tl.sum(total) / all_pairs).to(loss.dtype.element_ty))
        tl.store(counter, 0)


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]


def sequence_sums(
    values: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``sequence.SequenceKernels`` on CUDA tensors: one launch, no host synchronisation.

    Raises:
        RuntimeError: the backend does not run here.
    """
    _run(plan_sums(values, offsets, out, weights, mask), values)


def sigmoid_pairs(
    values: Tensor,
    offsets: Tensor,
    terms: SigmoidTerms,
    outputs: SigmoidOutputs,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``sequence.SequenceKernels`` on CUDA tensors, in one launch; raises as ``sequence_sums``."""
    if len(offsets) == 1:
        outputs.loss.zero_()  # without a pair there is no last program to write it
        return
    counter = ticket_counter(values.device)
    _run(plan_pairs(values, offsets, terms, outputs, weights, mask, counter), values)


def plan_sums(
    values: Tensor, offsets: Tensor, out: Tensor, weights: Tensor | None, mask: Tensor | None
) -> Launch:
    """What ``sequence_sums`` launches, so that a test can compile just that."""
    args = (values, weights, mask, offsets, out, values.numel())
    return Launch(_sums_kernel, (len(offsets) - 1,), args, _options())


def plan_pairs(
    values: Tensor,
    offsets: Tensor,
    terms: SigmoidTerms,
    outputs: SigmoidOutputs,
    weights: Tensor | None,
    mask: Tensor | None,
    counter: Tensor,
) -> Launch:
    """What ``sigmoid_pairs`` launches."""
    num_pairs = (len(offsets) - 1) // 2
    each = (terms.beta, terms.margin, terms.preferred, terms.pair_weights, terms.divisor)
    tensors = [value if isinstance(value, Tensor) else None for value in each]
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in each]
    pair_losses = values.new_empty(num_pairs, dtype=torch.float64)
    args = (
        values, weights, mask, offsets, terms.ref_sums, *tensors,
        outputs.sums, outputs.loss, outputs.g, pair_losses, counter,
        values.numel(), num_pairs, *numbers,
    )  # fmt: skip
    return Launch(_pairs_kernel, (num_pairs,), args, _options())


def _options() -> dict[str, Any]:
    return {"TILE": TILE, "num_warps": NUM_WARPS, "maxnreg": MAX_REGISTERS, "enable_fp_fusion": False}


def _run(launch: Launch, values: Tensor) -> None:
    if (reason := unavailable_reason(values.device)) is not None:
        raise RuntimeError(reason)
    if launch.grid[0] == 0:
        return
    with torch.cuda.device_of(values):
        launch.kernel[launch.grid](*launch.args, **launch.options)
