"""The row kernel in Triton, compiled as the ops ask for it; `benchmarks.compiled` runs this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled import CompiledKernel, find_reductions, report
from fastdpo.ops.head_call import empty_d

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class CompileCase:
    """A specialisation of the kernel, named by the call that asks for it."""

    vocab: int
    logits_dtype: torch.dtype = FP32
    d_dtype: torch.dtype | None = BF16
    in_place: bool = False
    has_statistics: bool = False
    has_coeffs: bool = False
    has_target: bool = False
    is_heavy: bool = False  # bias, softcap, negative scale and temperature


# Long rows, whole groups and ragged, and rows of one tile, with as little and as much as can be asked for.
CASES = {
    "score": CompileCase(128256, d_dtype=None),
    "score bf16": CompileCase(128256, BF16, d_dtype=None),
    "score, statistics": CompileCase(128256, d_dtype=None, has_statistics=True),
    "D": CompileCase(128256),
    "D in place, statistics": CompileCase(128256, in_place=True, has_statistics=True),
    "D fp32 in place, coefficients": CompileCase(128256, d_dtype=FP32, in_place=True, has_coeffs=True),
    "D bf16 in place, target": CompileCase(128256, BF16, in_place=True, has_target=True),
    "D fp16 in place, coefficients": CompileCase(128256, FP16, FP16, in_place=True, has_coeffs=True),
    # Held by `cache` and `pairs` (`empty_d`): apart from the logits, padded as they are.
    "held ragged D": CompileCase(50257),
    "held ragged D, statistics": CompileCase(50257, has_statistics=True),
    "held odd D": CompileCase(128257),
    "held odd D bf16, target": CompileCase(128257, BF16, has_target=True),
    "short D in place": CompileCase(32000, in_place=True),
    "heavy D in place, statistics": CompileCase(256000, in_place=True, has_statistics=True, is_heavy=True),
    "heavy D bf16, coefficients, target": CompileCase(
        256000, BF16, has_coeffs=True, has_target=True, is_heavy=True
    ),
    "ragged score": CompileCase(50257, d_dtype=None),
    "ragged D in place, statistics": CompileCase(50257, in_place=True, has_statistics=True),
    "ragged heavy D bf16 in place, statistics, target": CompileCase(
        50257, BF16, in_place=True, has_statistics=True, has_target=True, is_heavy=True
    ),
    "one tile": CompileCase(4000),
    "one tile, heavy, all": CompileCase(4000, FP32, FP32, True, True, True, False, True),
    "one ragged tile, heavy bf16, all": CompileCase(2001, BF16, BF16, True, True, True, True, True),
}


def held_d(vocab: int, dtype: torch.dtype) -> Tensor:
    """Two rows of D as modes `cache` and `pairs` hold them: the ops' own layout."""
    call: Any = SimpleNamespace(
        plan=SimpleNamespace(vocab_size=vocab), hidden=torch.empty(0), operand_dtype=dtype
    )
    return empty_d(call, 2)


def _tiles_carried(ttir: str) -> int:
    """Tiles that the loop of pass two hands from step to step; 0 where there is no such loop."""
    loops = re.findall(r"scf\.for.*?iter_args\(.*?\) -> \((.*?)\)", ttir)
    types = [loop.split(", ") for loop in loops]
    return next((len(each) for each in types if len(set(each)) == 1), 0)


def compile_all(arch: int) -> list[CompiledKernel]:
    return [_compile(name, case, arch) for name, case in CASES.items()]


def _compile(name: str, case: CompileCase, arch: int) -> CompiledKernel:
    from fastdpo.kernels import triton as backend
    from fastdpo.kernels.contract import LogitTransform, RowOutputs

    def rows(dtype: torch.dtype) -> Tensor:
        return torch.empty(2, -(-case.vocab // 64) * 64, dtype=dtype)[:, : case.vocab]

    def per_row(dtype: torch.dtype = FP32) -> Tensor:
        return torch.empty(2, dtype=dtype)

    logits = rows(case.logits_dtype)
    if case.d_dtype is None:
        d = None
    elif not case.in_place:
        d = held_d(case.vocab, case.d_dtype)
    else:
        d = torch.as_strided(logits, (2, logits.stride(0)), logits.stride()).view(case.d_dtype)[
            :, : case.vocab
        ]
    transform = LogitTransform()
    if case.is_heavy:
        transform = LogitTransform(torch.empty(case.vocab), scale=-0.5, softcap=30.0, temperature=0.7)
    statistics = (per_row(), per_row(), per_row(), per_row(torch.bool)) if case.has_statistics else ()
    launch = backend.plan_launch(
        logits,
        torch.zeros(2, dtype=torch.int64),
        transform,
        RowOutputs(per_row(), per_row(), *statistics),
        per_row() if case.has_target else None,
        d,
        torch.empty(3, 2) if case.has_coeffs else None,
    )
    assert launch.options["IN_PLACE"] == case.in_place
    kernel = backend._row_kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    facts = {
        # As many as the registers it may use are meant to leave room for.
        "blocks_per_sm": 128 // launch.options["maxnreg"],
        "tiles_carried": _tiles_carried(kernel.asm["ttir"]),
        "tile_stores": len(re.findall(r"tt\.store .*tensor<", kernel.asm["ttir"])),
        "barriers": len(re.findall(r"\w+\.barrier\b", kernel.asm["ttir"])),  # written out
        "reductions": find_reductions(kernel.asm["ttgir"]),
    }
    warps, writes_d = launch.options["num_warps"], case.d_dtype is not None
    return report("row", name, kernel, arch, warps, writes_d=writes_d, facts=facts)
