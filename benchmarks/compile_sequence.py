"""The sequence kernels in Triton, compiled as the ops ask for them; `benchmarks.compiled` runs this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled import CompiledKernel, find_reductions, report


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


def compile_all(arch: int) -> list[CompiledKernel]:
    return [_compile(name, case, arch) for name, case in CASES.items()]


def _compile(name: str, case: CompileCase, arch: int) -> CompiledKernel:
    launches = [make_launch(case, *batch) for batch in BATCHES]
    kernels = [launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options) for launch in launches]
    kernel = kernels[0]
    facts = {
        # The layouts in which tiles are added up, and the PTX of the atomics.
        "reductions": sorted(set().union(*find_reductions(kernel.asm["ttgir"], "f64").values())),
        "tickets": re.findall(r"\batom\.[\w.:]+", kernel.asm["ptx"]),
        "kernels": len({id(each) for each in kernels}),  # compiled for all BATCHES together
    }
    return report("sequence", name, kernel, arch, launches[0].options["num_warps"], facts=facts)


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
