"""Scaling a ready gradient in its place: rounded once, and neither read nor written where the factor is 1."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdpo.ops.scaling import scaled

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2047, 2048, 2049, 10001)  # about the kernel's block

INTERPRETED = """
import torch
from fastdpo.kernels import scale_triton
from tests.ops.test_scaling import SIZES, check
for dtype in scale_triton.DTYPES:
    for size in SIZES:
        check(lambda tensor, factor: (scale_triton.scale_(tensor, factor), tensor)[1], dtype, size)
"""

COMPILED = """
import json, re, sys, torch, triton
from tests.kernels.triton_compile import StubDriver, disassemble
triton.runtime.driver.set_active(StubDriver(int(sys.argv[1])))
from fastdpo.kernels import scale_triton
reports = []
for dtype in scale_triton.DTYPES:
    grid, args, options = scale_triton.plan_launch(torch.zeros(2**16, dtype=dtype), torch.ones(()))
    kernel = scale_triton._scale_kernel.warmup(*args, grid=grid, **options)
    resources, sass = disassemble(kernel.asm["cubin"])
    reports.append([dict(re.findall(r"(REG|STACK):(\\d+)", resources)), sass])
json.dump(reports, sys.stdout)
"""


def check(scale: object, dtype: torch.dtype, size: int) -> None:
    for factor in (1.0, 0.125, -3.0, 1 / 3):
        tensor = torch.randn(size, dtype=torch.float64).to(dtype)
        before = tensor.clone()
        result = scale(tensor, torch.tensor(factor))  # type: ignore[operator]
        assert result.data_ptr() == tensor.data_ptr()
        wide = before.double() * torch.tensor(factor).double()
        torch.testing.assert_close(result, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
        assert factor != 1 or torch.equal(result, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_cpu(dtype: torch.dtype) -> None:
    for size in SIZES:
        check(scaled, dtype, size)


def test_the_triton_kernel_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_triton_kernel_compiles(arch: int, tmp_path: Path) -> None:
    """16-byte accesses, no spills, and the factor is looked at before anything else is loaded."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILED, str(arch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for usage, sass in json.loads(done.stdout):
        assert int(usage["STACK"]) == 0 and int(usage["REG"]) <= 64
        loads = [found.start() for found in re.finditer(r"\bLDG\S*\.128", sass)]
        leave = re.search(r"@!?U?P\d+\s+EXIT", sass)
        assert loads and leave and leave.start() < loads[0]
        assert re.search(r"\bSTG\S*\.128", sass) and not re.search(r"\b(LDL|STL)\b", sass)
