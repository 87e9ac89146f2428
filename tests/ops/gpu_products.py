"""A GPU's products on a CPU: fp32 results of 16-bit operands (``out_dtype``), so that its code runs for real.

Values are those of a GPU up to the order of its sums: operands of 16 bits, products and sums in fp32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.kernels import matmul

Seen = list[tuple[str, torch.dtype, torch.dtype, tuple[int, ...]]]


@pytest.fixture
def gpu_products(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Name, dtype of operands, dtype and shape of the result of every product that follows."""
    seen: Seen = []
    monkeypatch.setattr(matmul, "is_gpu", lambda device: True)
    for name, num_factors in (("mm", 2), ("bmm", 2), ("addmm", 2)):
        monkeypatch.setattr(torch, name, _emulated(getattr(torch, name), name, num_factors, seen))
    return seen


def _emulated(product: Any, name: str, num_factors: int, seen: Seen) -> Any:
    def emulated(*tensors: Tensor, out_dtype: torch.dtype | None = None, out: Tensor) -> Tensor:
        first = tensors[-1]
        assert tensors[-2].dtype == first.dtype and out.dtype == (out_dtype or first.dtype)
        seen.append((name, first.dtype, out.dtype, tuple(out.shape)))
        if out_dtype is not None:
            assert out_dtype == torch.float32 and first.dtype in matmul.LOW_PRECISION
            tensors = (*tensors[:-num_factors], *(factor.float() for factor in tensors[-num_factors:]))
        result: Tensor = product(*tensors, out=out)
        return result

    return emulated
