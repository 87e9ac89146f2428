"""Every test here begins on a device as a new process has it, and has to leave it so.

A cache of freed blocks makes an allocation that should fail succeed, and memory look taken that is free; TF32
makes products of fp32 wrong by 1e-3; a synchronisation mode, a current device or a memory limit that a test
forgets fails the next one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def device_as_new() -> Iterator[None]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    products = torch.backends.cuda.matmul
    allowed_before, products.allow_tf32 = products.allow_tf32, False
    yield
    products.allow_tf32 = allowed_before
    left = {
        "sync_debug_mode": torch.cuda.get_sync_debug_mode(),
        "current_device": torch.cuda.current_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cuda"),
        "capturing": torch.cuda.is_current_stream_capturing(),
        "is_default_stream": torch.cuda.current_stream() == torch.cuda.default_stream(),
    }
    assert left == {
        "sync_debug_mode": 0,
        "current_device": 0,
        "deterministic": False,
        "default_dtype": torch.float32,
        "autocast": False,
        "capturing": False,
        "is_default_stream": True,
    }
