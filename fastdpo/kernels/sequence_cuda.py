"""The sequence kernel in CUDA C++ (``csrc/cuda/sequence.cu``): a block for each sequence or pair."""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda import unavailable_reason
from .native import _C
from .sequence import SigmoidOutputs, SigmoidTerms
from .sequence_native import sequence_args, sigmoid_args
from .tickets import ticket_counter

__all__ = ["sequence_sums", "sigmoid_pairs", "unavailable_reason"]


def sequence_sums(
    values: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``sequence.SequenceKernels`` on CUDA tensors: one launch on the current stream, no synchronisation.

    Raises:
        RuntimeError: the backend cannot run here, see ``unavailable_reason``, or the launch failed.
        ValueError: tensors of a shape, dtype, device or strides the kernel cannot take.
    """
    _check_available(values)
    args = sequence_args(values, offsets, out, weights, mask)
    with torch.cuda.device(values.device):  # the launch goes to the current device, which may be another
        _C.cuda_sequence_sums(args, torch.cuda.current_stream().cuda_stream)


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
    _check_available(values)
    with torch.cuda.device(values.device):
        pair_losses = values.new_empty((len(offsets) - 1) // 2, dtype=torch.float64)
        counter = ticket_counter(values.device)
        args = sigmoid_args(
            values, offsets, terms, outputs, weights, mask, pair_losses=pair_losses, counter=counter
        )
        _C.cuda_sigmoid_pairs(args, torch.cuda.current_stream().cuda_stream)


def _check_available(values: Tensor) -> None:
    if (reason := unavailable_reason(values.device)) is not None:
        raise RuntimeError(reason)
