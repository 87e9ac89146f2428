"""The divergence kernel in Triton, compiled as the ops ask for it; `benchmarks.compiled` runs this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled import CompiledKernel, find_reductions, report

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class CompileCase:
    """A specialisation of the kernel, named by the call that asks for it."""

    outputs: tuple[str, ...]
    vocab: int = 128256
    num_teachers: int = 1
    d: str = "in place"  # apart, or none
    has_logps_d: bool = False
    has_coeffs: bool = False
    is_heavy: bool = False  # bias, softcap, negative scale and temperature, of every head


TDPO = ("forward_kl", "logps", "ref_logps")
DISTILLED = ("reverse_kl", "logps", "l1_distance")
EVERYTHING = ("forward_kl", "reverse_kl", "jsd", "logps", "ref_logps")
CASES = {
    "score": CompileCase(TDPO, d="none"),
    "TDPO, kept": CompileCase(TDPO, d="apart", has_logps_d=True),
    "TDPO, stashed": CompileCase(TDPO, has_logps_d=True),
    "TDPO, recomputed": CompileCase(("forward_kl", "logps"), has_coeffs=True),
    "TDPO, odd and heavy": CompileCase(TDPO, 50257, d="apart", has_logps_d=True, is_heavy=True),
    "reverse": CompileCase(("reverse_kl",), 152064),
    "jsd": CompileCase(("jsd",), 256000, is_heavy=True),
    "all, recomputed": CompileCase(EVERYTHING, has_coeffs=True),
    "AlignDistil, kept": CompileCase(DISTILLED, num_teachers=2, d="apart"),
    "AlignDistil, stashed, heavy": CompileCase(DISTILLED, 152064, num_teachers=2, is_heavy=True),
    "AlignDistil, all": CompileCase(EVERYTHING, num_teachers=2, has_coeffs=True, is_heavy=True),
}


def compile_all(arch: int) -> list[CompiledKernel]:
    return [_compile(name, case, arch) for name, case in CASES.items()]


def _compile(name: str, case: CompileCase, arch: int) -> CompiledKernel:
    from fastdpo.kernels import divergence_triton as backend
    from fastdpo.kernels.contract import LogitTransform
    from fastdpo.kernels.divergence import DivergenceOutputs

    padded = -(-case.vocab // 64) * 64

    def rows(dtype: torch.dtype) -> Tensor:
        return torch.empty(2, padded, dtype=dtype)[:, : case.vocab]

    def front(of: Tensor) -> Tensor:
        whole = torch.as_strided(of, (2, padded), (padded, 1))
        return whole.view(BF16)[:, : case.vocab]

    logits, *teachers = (rows(FP32) for _ in range(1 + case.num_teachers))
    transform = LogitTransform()
    if case.is_heavy:
        transform = LogitTransform(torch.empty(case.vocab), scale=-0.5, softcap=30.0, temperature=0.7)
    d = logps_d = None
    if case.d != "none":
        of_d, of_logps = (teachers[0], logits) if case.has_logps_d else (logits, logits)
        d = rows(BF16) if case.d == "apart" else front(of_d)
        if case.has_logps_d:
            logps_d = rows(BF16) if case.d == "apart" else front(of_logps)
    launch = backend.plan_launch(
        logits,
        tuple(teachers),
        torch.zeros(2, dtype=torch.int64),
        (transform,) * (1 + case.num_teachers),
        DivergenceOutputs(**{name: torch.empty(2) for name in case.outputs}),
        torch.empty(2, 2) if case.num_teachers == 2 else None,
        (0.5, -0.5) if case.num_teachers == 2 else (0.0, 0.0),
        0.3,
        d,
        logps_d,
        torch.empty(4, 2) if case.has_coeffs else None,
    )
    assert launch.options["IN_PLACE"] == (case.d == "in place")
    kernel: Any = backend._divergence_kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    facts = {
        "walks": len(re.findall(r"\bscf\.for\b", kernel.asm["ttir"])),  # over a row
        "barriers": len(re.findall(r"\w+\.barrier\b", kernel.asm["ttir"])),  # written out
        "reductions": find_reductions(kernel.asm["ttgir"]),
    }
    warps, writes_d = launch.options["num_warps"], case.d != "none"
    return report("divergence", name, kernel, arch, warps, writes_d=writes_d, facts=facts)
