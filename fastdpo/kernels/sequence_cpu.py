"""The sequence kernel in C++ (``csrc/cpu/sequence.cpp``): sequences or pairs over OpenMP threads."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import unavailable_reason
from .native import _C
from .sequence import SigmoidOutputs, SigmoidTerms
from .sequence_native import sequence_args, sigmoid_args

__all__ = ["sequence_sums", "sigmoid_pairs", "unavailable_reason"]


def sequence_sums(
    values: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``sequence.SequenceKernels`` on CPU tensors, with up to ``torch.get_num_threads()`` threads.

    Raises:
        RuntimeError: the backend cannot run here, see ``unavailable_reason``.
        ValueError: tensors of a shape, dtype, device or strides the kernel cannot take.
    """
    _check_available(values)
    args = sequence_args(values, offsets, out, weights, mask)
    _C.cpu_sequence_sums(args, torch.get_num_threads())


def sigmoid_pairs(
    values: Tensor,
    offsets: Tensor,
    terms: SigmoidTerms,
    outputs: SigmoidOutputs,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``sequence.SequenceKernels`` on CPU tensors; raises as ``sequence_sums``."""
    _check_available(values)
    pair_losses = values.new_empty((len(offsets) - 1) // 2, dtype=torch.float64)
    args = sigmoid_args(values, offsets, terms, outputs, weights, mask, pair_losses=pair_losses, counter=None)
    _C.cpu_sigmoid_pairs(args, torch.get_num_threads())


def _check_available(values: Tensor) -> None:
    if (reason := unavailable_reason(values.device)) is not None:
        raise RuntimeError(reason)
