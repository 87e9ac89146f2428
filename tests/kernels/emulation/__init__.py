"""The CUDA row kernel's own source on a CPU, as one more backend for the contract's tests.

GPU threads are fibers (``cluster.h``). It shows that the algorithm is right: indices, barriers, the exchange
between thread blocks, masks, numbers. What only a GPU can show it does not: the approximate exp2, the memory
model, speed.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fastdpo.kernels.contract import LogitTransform, RowKernel, RowOutputs

TILE = 512  # columns: kTileColumns of csrc/cuda/row_plan.h
SOURCE = Path(__file__).with_name("row_kernel.cpp")
FLAGS = "-std=c++17 -O2 -fPIC -shared -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas".split()
KIB = 1024


class Limits(ctypes.Structure):
    """``DeviceLimits`` of ``csrc/cuda/row_plan.h``, in bytes."""

    _fields_ = [
        ("shared_per_block", ctypes.c_int64),
        ("shared_per_sm", ctypes.c_int64),
        ("reserved_per_block", ctypes.c_int64),
        ("max_cluster", ctypes.c_int),
    ]


HOPPER = Limits(227 * KIB, 228 * KIB, KIB, 8)
AMPERE = Limits(163 * KIB, 164 * KIB, KIB, 1)
ADA = Limits(99 * KIB, 100 * KIB, KIB, 1)
# Devices small enough for small vocabularies to meet every case: clusters of 2, 4 and 8 blocks, one or two
# blocks on a multiprocessor, rows that do not fit.
SMALL_HOPPER = Limits(40 * KIB, 44 * KIB, KIB, 8)
SMALL_AMPERE = Limits(22 * KIB, 23 * KIB, KIB, 1)


class RowPlan(ctypes.Structure):
    """``RowPlan`` of ``csrc/cuda/row_plan.h``."""

    _fields_ = [
        ("cluster", ctypes.c_int),
        ("warps", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("tiles_per_quarter", ctypes.c_int),
        ("ahead", ctypes.c_int),
        ("shared_bytes", ctypes.c_int64),
    ]

    @property
    def resident_tiles(self) -> int:
        return 4 * self.tiles_per_quarter * self.warps


class _RowArgs(ctypes.Structure):
    """``RowArgs`` of ``csrc/common.h``."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("logits_dtype", ctypes.c_int32),
        ("logits_stride", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("temperature", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in RowOutputs._fields),
        ("target_logits", ctypes.c_void_p),
        ("d_out", ctypes.c_void_p),
        ("d_dtype", ctypes.c_int32),
        ("d_stride", ctypes.c_int64),
        ("grad_coeffs", ctypes.c_void_p),
    ]


def compiled(source: Path, folder: Path) -> Path:
    """A shared library in a folder, made once for all processes that ask for it there.

    Raises:
        CalledProcessError: it does not compile.
    """
    compiler = shutil.which("g++")
    assert compiler is not None, "the caller has looked for g++"
    library = folder / f"{source.stem}.so"
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            subprocess.run([compiler, *FLAGS, "-o", str(library), str(source)], check=True)
    return library


class Emulator:
    """The compiled emulation; raises CalledProcessError where the kernel's source does not compile."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(compiled(SOURCE, folder)))
        self._library.run.restype = ctypes.c_char_p

    def plan(self, vocab: int, limits: Limits) -> RowPlan:
        plan = RowPlan()
        self._library.plan(ctypes.c_int64(vocab), ctypes.byref(limits), ctypes.byref(plan))
        return plan

    def row_kernel(self, limits: Limits, *, clusters: int = 2, seed: int = 0) -> RowKernel:
        """The kernel on a device that runs ``clusters`` clusters at a time, with one roll of the dice."""

        def row_kernel(
            logits: Tensor,
            labels: Tensor,
            transform: LogitTransform,
            outputs: RowOutputs,
            *,
            target_logits: Tensor | None = None,
            d_out: Tensor | None = None,
            grad_coeffs: Tensor | None = None,
        ) -> None:
            args = _RowArgs(
                *logits.shape,
                _address(logits),
                _dtype(logits),
                logits.stride(0),
                _address(labels),
                _address(transform.bias),
                transform.scale,
                transform.softcap or 0.0,
                transform.temperature,
                *map(_address, outputs),
                _address(target_logits),
                _address(d_out),
                0 if d_out is None else _dtype(d_out),
                0 if d_out is None else d_out.stride(0),
                _address(grad_coeffs),
            )
            problem = self._library.run(ctypes.byref(args), ctypes.byref(limits), clusters, seed)
            assert problem is None, problem.decode()

        return row_kernel


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor) -> int:
    return (torch.float32, torch.bfloat16, torch.float16).index(tensor.dtype)
