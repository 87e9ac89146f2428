"""Scaling a ready gradient in its place: rounded once, and neither read nor written where the factor is 1."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastdpo.ops.scaling import scaled
from tests import ROOT

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
