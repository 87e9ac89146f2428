"""``benchmarks/pretended.py`` for tests: op bodies on meta tensors as on a GPU, and the bytes they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pretended import MODES, make_call, pretended_gpu, run_call

__all__ = ["MODES", "make_call", "run_call"]


@pytest.fixture
def meta_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of 132 multiprocessors, on which ``auto`` is Triton."""
    monkeypatch.undo()  # the poison of uninitialised memory is an operation of its own
    with pretended_gpu(backend="triton"):
        yield
        monkeypatch.undo()  # what a test patched over it goes first, or it would be put back after it


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once, results included."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in _tensors((args, tuple(kwargs.values())))}
        result = func(*args, **kwargs)
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
