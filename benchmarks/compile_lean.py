"""The Triton kernels of mode ``lean``, compiled as the ops ask for them; `benchmarks.compiled` runs this."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from benchmarks.compiled import CompiledKernel, report
from fastdpo.types import TOKEN_STATISTICS

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class LeanCase:
    """A specialisation of the store-free kernel, named by the call that asks for it."""

    dtype: torch.dtype = BF16
    hidden_size: int = 4096
    vocab: int = 128256
    weight_dtype: torch.dtype | None = None  # where it is not that of the products' operands
    hidden_dtype: torch.dtype | None = None
    has_index: bool = True
    has_statistics: bool = False
    is_heavy: bool = False  # bias, softcap, negative scale and temperature


CASES = {
    "bf16": LeanCase(),
    "fp16, no index": LeanCase(FP16, has_index=False),
    "bf16, statistics": LeanCase(has_statistics=True),
    "bf16, heavy, statistics": LeanCase(vocab=256000, hidden_size=3584, has_statistics=True, is_heavy=True),
    "bf16, ragged, heavy, statistics": LeanCase(
        vocab=50257, hidden_size=1000, has_statistics=True, is_heavy=True
    ),
    "bf16, aligned, ragged, heavy, statistics": LeanCase(
        vocab=50257, hidden_size=1008, has_statistics=True, is_heavy=True
    ),
    "bf16, uneven, statistics": LeanCase(vocab=50257, has_statistics=True),
    "bf16, uneven, heavy, statistics": LeanCase(vocab=50257, has_statistics=True, is_heavy=True),
    "bf16 of an fp32 weight": LeanCase(weight_dtype=FP32),
    "bf16 of fp32": LeanCase(weight_dtype=FP32, hidden_dtype=FP32, has_statistics=True),
    "fp32": LeanCase(FP32),
    "fp32, statistics": LeanCase(FP32, has_statistics=True),
    "fp32, ragged, heavy, statistics": LeanCase(
        FP32, vocab=50257, hidden_size=1001, has_statistics=True, is_heavy=True
    ),
}


@dataclass(frozen=True)
class SlabCase:
    """A specialisation of the kernel that makes D from a given lse."""

    d_dtype: torch.dtype = BF16
    columns: int = 4096
    in_place: bool = True
    has_coeffs: bool = False
    is_heavy: bool = False


SLAB_CASES = {
    "D in place": SlabCase(),
    "D apart": SlabCase(in_place=False),
    "D fp32 in place": SlabCase(FP32),
    "D fp16 in place, heavy, coefficients": SlabCase(FP16, has_coeffs=True, is_heavy=True),
    "D in place, short": SlabCase(columns=192),
}


def compile_all(arch: int) -> list[CompiledKernel]:
    lean = [_compile(name, case, arch) for name, case in CASES.items()]
    return lean + [_compile_slab(name, case, arch) for name, case in SLAB_CASES.items()]


def _compile(name: str, case: LeanCase, arch: int) -> CompiledKernel:
    from fastdpo.kernels import lean_triton as backend
    from fastdpo.kernels.contract import LogitTransform

    transform = LogitTransform()
    if case.is_heavy:
        transform = LogitTransform(torch.empty(case.vocab), scale=-0.5, softcap=30.0, temperature=0.7)
    # Its memory is never touched, and so never there.
    weight = torch.empty(case.vocab, case.hidden_size, dtype=case.weight_dtype or case.dtype)
    launch = backend.plan_launch(
        torch.empty(2, case.hidden_size, dtype=case.hidden_dtype or case.dtype),
        weight,
        torch.zeros(2, dtype=torch.int64) if case.has_index else None,
        torch.zeros(2, dtype=torch.int64),
        transform,
        TOKEN_STATISTICS if case.has_statistics else (),
        case.dtype,
        divmod(arch, 10),
    )
    kernel = backend._lean_kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    return report("lean", name, kernel, arch, launch.options["num_warps"])


def _compile_slab(name: str, case: SlabCase, arch: int) -> CompiledKernel:
    from fastdpo.kernels import slab_triton as backend
    from fastdpo.kernels.contract import LogitTransform

    logits = torch.empty(2, case.columns)
    d = logits.view(case.d_dtype)[:, : case.columns] if case.in_place else logits.to(case.d_dtype)
    transform = LogitTransform()
    if case.is_heavy:
        transform = LogitTransform(torch.empty(2 * case.columns), scale=-0.5, softcap=30.0, temperature=0.7)
    coeffs, entropy = (torch.empty(3, 2), torch.empty(2)) if case.has_coeffs else (None, None)
    labels = torch.zeros(2, dtype=torch.int64)
    launch = backend.plan_launch(
        logits, labels, torch.empty(2), torch.empty(2), transform, 64, d, coeffs, entropy
    )
    kernel = backend._slab_kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    facts = {"barriers": len(re.findall(r"\w+\.barrier\b", kernel.asm["ttir"]))}  # written out
    return report("slab", name, kernel, arch, launch.options["num_warps"], writes_d=True, facts=facts)
