"""Tensors to the addresses that the compiled sequence kernels take: the Python side of ``csrc/common.h``.

As ``native.py``: what could make a kernel touch memory that is not its own is checked here. The offsets'
values are not, which would synchronise; the kernels force them into range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .native import _C, _vector
from .sequence import SigmoidOutputs, SigmoidTerms


def sequence_args(
    values: Tensor, offsets: Tensor, out: Tensor, weights: Tensor | None, mask: Tensor | None
) -> _C.SequenceArgs:
    """The arguments of ``sequence_sums``; they hold addresses only, the tensors must outlive their use.

    Raises:
        ValueError: a tensor whose shape, dtype, device or strides the kernels cannot take.
    """
    args = _C.SequenceArgs()
    _fill(args, values, offsets, out, weights, mask)
    return args


def sigmoid_args(
    values: Tensor,
    offsets: Tensor,
    terms: SigmoidTerms,
    outputs: SigmoidOutputs,
    weights: Tensor | None,
    mask: Tensor | None,
    *,
    pair_losses: Tensor,
    counter: Tensor | None,
) -> _C.SigmoidArgs:
    """The same for ``sigmoid_pairs``, with scratch: ``(P,)`` fp64 and, on CUDA, a ticket counter."""
    num_sequences = len(offsets) - 1
    if num_sequences % 2:
        raise ValueError(f"offsets: wanted those of 2P sequences, got {num_sequences} sequences")
    num_pairs, device = num_sequences // 2, values.device
    args = _C.SigmoidArgs()
    _fill(args, values, offsets, outputs.sums, weights, mask)
    for name in ("beta", "margin", "preferred", "pair_weights"):
        setattr(args, name, _per_pair(name, getattr(terms, name), (num_pairs,), device))
    args.divisor = _per_pair("divisor", terms.divisor, (), device)
    args.ref_sums = _vector("ref_sums", terms.ref_sums, (num_sequences,), torch.float32, device)
    args.loss = _vector("loss", outputs.loss, (), torch.float64, device)
    args.g = _vector("g", outputs.g, tuple(values.shape), torch.float32, device)
    args.pair_losses = _vector("pair_losses", pair_losses, (num_pairs,), torch.float64, device)
    args.counter = _vector("counter", counter, (1,), torch.int32, device)
    return args


def _fill(
    args: _C.SequenceArgs,
    values: Tensor,
    offsets: Tensor,
    out: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> None:
    device, shape = values.device, (values.numel(),)
    args.tokens, args.sequences = values.numel(), len(offsets) - 1
    args.values = _vector("values", values, shape, torch.float32, device)
    args.weights = _vector("weights", weights, shape, torch.float32, device)
    args.mask = _vector("mask", mask, shape, torch.bool, device)
    args.offsets = _vector("offsets", offsets, (args.sequences + 1,), torch.int64, device)
    args.sums = _vector("sums", out, (args.sequences,), torch.float32, device)


def _per_pair(name: str, value: float | Tensor, shape: tuple[int, ...], device: torch.device) -> _C.PerPair:
    result = _C.PerPair()
    if isinstance(value, Tensor):
        result.values = _vector(name, value, shape, torch.float32, device)
    else:
        result.number = value
    return result
