"""Compiles the kernels of mode ``lean`` for architectures that need not be here, and reports what came out.

Run in a process of its own, as `tests.kernels.triton_compile`, which has the tools:
``python -m tests.kernels.lean_compile 90`` prints the reports of all CASES for sm_90 as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from fastdpo.types import TOKEN_STATISTICS
from tests.kernels.triton_compile import BF16, FP16, FP32, StubDriver, disassemble


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


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    registers: int
    stack_bytes: int  # spills and arrays in local memory
    shared_bytes: int
    threads: int
    instructions: dict[str, int]  # SASS, by name
    num_barriers: int  # in Triton's own code: those written out


def compile_case(case: LeanCase, arch: int) -> Compiled:
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
    return report(kernel, launch.options["num_warps"])


def compile_slab_case(case: SlabCase) -> Compiled:
    from fastdpo.kernels import slab_triton as backend
    from fastdpo.kernels.contract import LogitTransform

    logits = torch.empty(2, case.columns)
    d = logits.view(case.d_dtype)[:, : case.columns] if case.in_place else logits.to(case.d_dtype)
    transform = LogitTransform()
    if case.is_heavy:
        transform = LogitTransform(torch.empty(2 * case.columns), scale=-0.5, softcap=30.0, temperature=0.7)
    coeffs, entropy = (torch.empty(3, 2), torch.empty(2)) if case.has_coeffs else (None, None)
    labels = torch.zeros(2, dtype=torch.int64)
    launch = backend.plan_launch(logits, labels, torch.empty(2), transform, 64, d, coeffs, entropy)
    kernel = backend._slab_kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    return report(kernel, launch.options["num_warps"])


def report(kernel: Any, num_warps: int) -> Compiled:
    resources, sass = disassemble(kernel.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", resources))
    instruction = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return Compiled(
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        shared_bytes=kernel.metadata.shared,
        threads=32 * num_warps,
        instructions=Counter(instruction.findall(sass)),
        num_barriers=len(re.findall(r"\w+\.barrier\b", kernel.asm["ttir"])),
    )


def main(arch: int) -> None:
    import triton

    triton.runtime.driver.set_active(StubDriver(arch))
    reports = {name: vars(compile_case(case, arch)) for name, case in CASES.items()}
    reports |= {name: vars(compile_slab_case(case)) for name, case in SLAB_CASES.items()}
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
