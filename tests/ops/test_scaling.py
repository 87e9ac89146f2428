"""Scaling a ready gradient in its place: rounded once, and neither read nor written where the factor is 1."""

from __future__ import annotations

import os

import pytest
import torch

from fastdpo.ops.scaling import scaled

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2047, 2048, 2049, 10001)  # about the kernel's block


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


def test_on_a_device_that_has_no_kernel() -> None:
    """In pieces, of which here nothing but the sizes is known."""
    tensor = torch.empty(7, 3, dtype=torch.bfloat16, device="meta")
    assert scaled(tensor, torch.empty((), device="meta")) is tensor


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="`test_triton_interpreted.py` runs it in a process of its own",
)
def test_the_triton_kernel() -> None:
    from fastdpo.kernels import scale_triton

    def scale(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        scale_triton.scale_(tensor, factor)
        return tensor

    for dtype in scale_triton.DTYPES:
        for size in SIZES:
            check(scale, dtype, size)
