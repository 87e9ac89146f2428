"""The Triton kernel that scales a gradient, compiled for each dtype; `benchmarks.compiled` runs this."""

from __future__ import annotations

import torch

from benchmarks.compiled import CompiledKernel, report


def compile_all(arch: int) -> list[CompiledKernel]:
    from fastdpo.kernels import scale_triton as backend

    compiled = []
    for dtype in backend.DTYPES:
        grid, args, options = backend.plan_launch(torch.zeros(2**16, dtype=dtype), torch.ones(()))
        kernel = backend._scale_kernel.warmup(*args, grid=grid, **options)
        name = str(dtype).removeprefix("torch.")
        compiled.append(report("scale", name, kernel, arch, options["num_warps"]))
    return compiled
