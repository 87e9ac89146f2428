"""Compiles the Triton sequence kernels for architectures that need not be here, and reports what came out.

Run in a process of its own, as ``triton_compile.py``, whose helpers it uses: ``python -m
tests.kernels.sequence_compile 90`` prints the reports of all CASES for sm_90 as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.kernels.triton_compile import StubDriver, disassemble


@dataclass(frozen=True)
class CompileCase:
    """A specialisation of a kernel, named by the call that asks for it."""

    has_loss: bool = True
    has_weights: bool = False
    has_mask: bool = False
    has_tensors: bool = False  # beta and the rest as tensors, and reference sums


CASES = {
    "sums": CompileCase(has_loss=False),
    "weighted masked sums": CompileCase(has_loss=False, has_weights=True, has_mask=True),
    "pairs": CompileCase(),
    "weighted masked pairs": CompileCase(has_weights=True, has_mask=True),
    "weighted masked pairs of tensors": CompileCase(has_weights=True, has_mask=True, has_tensors=True),
}
# Another number of tokens, sequences and pairs, at other addresses: 1 and multiples of 16 are what Triton
# would compile again for.
BATCHES = ((1000, 4, 0), (1, 2, 0), (16, 32, 0), (17, 34, 1), (4096, 2, 3))


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    threads: int
    registers: int
    stack_bytes: int  # spills and arrays in local memory
    shared_bytes: int
    instructions: dict[str, int]  # SASS, by name
    reductions: list[str]  # the layouts in which fp64 tiles are added up
    tickets: list[str]  # PTX of the atomics
    num_kernels: int  # compiled for all BATCHES together


def compile_case(case: CompileCase) -> Compiled:
    launches = [make_launch(case, *batch) for batch in BATCHES]
    kernels = [launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options) for launch in launches]
    kernel = kernels[0]
    resources, sass = disassemble(kernel.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", resources))
    instruction = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return Compiled(
        threads=32 * launches[0].options["num_warps"],
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        shared_bytes=int(usage["SHARED"]),
        instructions=Counter(instruction.findall(sass)),
        reductions=reduction_layouts(kernel.asm["ttgir"]),
        tickets=re.findall(r"\batom\.[\w.:]+", kernel.asm["ptx"]),
        num_kernels=len({id(each) for each in kernels}),
    )


def make_launch(case: CompileCase, num_tokens: int, num_sequences: int, offset: int) -> Any:
    from fastdpo.kernels import sequence_triton as backend
    from fastdpo.kernels.sequence import SigmoidOutputs, SigmoidTerms

    def vector(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size + offset, dtype=dtype)[offset:]

    values, offsets = vector(num_tokens), vector(num_sequences + 1, torch.int64)
    weights = vector(num_tokens) if case.has_weights else None
    mask = vector(num_tokens, torch.bool) if case.has_mask else None
    if not case.has_loss:
        return backend.plan_sums(values, offsets, vector(num_sequences), weights, mask)
    terms = SigmoidTerms(beta=0.1 + offset)
    if case.has_tensors:
        per_pair = [vector(num_sequences // 2) for _ in range(4)]
        terms = SigmoidTerms(*per_pair, vector(1)[0], vector(num_sequences))
    outputs = SigmoidOutputs(vector(num_sequences), vector(1, torch.float64)[0], vector(num_tokens))
    return backend.plan_pairs(values, offsets, terms, outputs, weights, mask, vector(1, torch.int32))


def reduction_layouts(ttgir: str) -> list[str]:
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    found = set(re.findall(r"^\s*\}\) : \(tensor<\d+xf64, (#\w+)>\) ->", ttgir, re.MULTILINE))
    return sorted(layouts[name] for name in found)


def main(arch: int) -> None:
    import triton

    triton.runtime.driver.set_active(StubDriver(arch))
    json.dump({name: vars(compile_case(case)) for name, case in CASES.items()}, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
