"""The CUDA sequence kernel's own source on a CPU, as one more backend for the contract's tests.

It shows that the algorithm is right: indices, barriers, the order of sums, the last block. What blocks that
run at the same time see of each other, only a GPU can show.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpo.kernels.sequence import SigmoidOutputs, SigmoidTerms
from tests.kernels.emulation import compiled

SOURCE = Path(__file__).with_name("sequence.cpp")


class _PerPair(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("number", ctypes.c_double)]


class _SigmoidArgs(ctypes.Structure):
    """``SigmoidArgs`` of ``csrc/common.h``, which begins as ``SequenceArgs`` does."""

    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("values", "weights", "mask", "offsets", "sums", "ref_sums")),
        *((name, _PerPair) for name in ("beta", "margin", "preferred", "pair_weights", "divisor")),
        *((name, ctypes.c_void_p) for name in ("pair_losses", "loss", "g", "counter")),
    ]


class SequenceEmulator:
    """``fastdpo.kernels.sequence.SequenceKernels`` on fibers; each call rolls the dice that a GPU would."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self._library = ctypes.CDLL(str(compiled(SOURCE, folder)))
        self._library.run_sums.restype = self._library.run_pairs.restype = ctypes.c_char_p
        self.seed = seed
        self.counter = torch.zeros(1, dtype=torch.int32)

    def sequence_sums(
        self,
        values: Tensor,
        offsets: Tensor,
        out: Tensor,
        *,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self._run("run_sums", self._args(values, offsets, out, weights, mask))

    def sigmoid_pairs(
        self,
        values: Tensor,
        offsets: Tensor,
        terms: SigmoidTerms,
        outputs: SigmoidOutputs,
        *,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        args = self._args(values, offsets, outputs.sums, weights, mask)
        for name in ("beta", "margin", "preferred", "pair_weights", "divisor"):
            value = getattr(terms, name)
            is_tensor = isinstance(value, Tensor)
            setattr(args, name, _PerPair(_address(value), 0.0) if is_tensor else _PerPair(None, value))
        pair_losses = values.new_empty((len(offsets) - 1) // 2, dtype=torch.float64)
        args.ref_sums, args.pair_losses = _address(terms.ref_sums), _address(pair_losses)
        args.loss, args.g = _address(outputs.loss), _address(outputs.g)
        args.counter = _address(self.counter)
        self._run("run_pairs", args)
        assert self.counter.item() == 0, "the counter was not left 0"

    def _args(self, values: Tensor, offsets: Tensor, out: Tensor, *optional: Tensor | None) -> _SigmoidArgs:
        weights, mask = optional
        addresses = map(_address, (values, weights, mask, offsets, out))
        return _SigmoidArgs(values.numel(), len(offsets) - 1, *addresses)

    def _run(self, function: str, args: Any) -> None:
        problem = getattr(self._library, function)(ctypes.byref(args), self.seed)
        self.seed += 1
        assert problem is None, problem.decode()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
