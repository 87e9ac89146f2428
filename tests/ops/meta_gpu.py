"""Op bodies on meta tensors, as they run on a GPU: no memory, no values, and every call of torch is seen.

A meta tensor has no values, so whatever would read one (``.item()``, ``bool()``, ``.tolist()``, a size that
hangs on data) raises; and shapes can be those of a real head. Row kernels are stubs: a GPU's are not asked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.kernels import matmul
from fastdpo.ops import head_call, lean_backward, library
from fastdpo.ops.chunked import backward_chunks, forward_chunks
from fastdpo.ops.gradients import TokenGrads
from fastdpo.ops.head_call import HeadCall
from fastdpo.ops.lean import forward_lean
from fastdpo.ops.library import CallOptions
from fastdpo.ops.paired_chunks import paired_chunks
from fastdpo.schedule import PairGroup

MODES = ("score", "stash", "cache", "recompute", "pairs", "lean")


@pytest.fixture
def meta_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the device's kind is told: a GPU of 132 multiprocessors, whose GEMMs sum in fp32."""
    monkeypatch.undo()  # the poison of uninitialised memory is an operation of its own

    monkeypatch.setattr(head_call, "load_row_kernel", lambda name: _no_kernel)
    monkeypatch.setattr(library, "num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(matmul, "is_gpu", lambda device: True)


def _no_kernel(*args: Any, **kwargs: Any) -> None:
    pass


def make_call(
    mode: str,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    index_kind: str = "tokens",
    weight_dtype: torch.dtype = torch.bfloat16,
    workspace_mib: int = 512,
    cache_mib: int = 1024,
    pair_length: int = 512,
    has_reference: bool = False,
    **needs: bool,
) -> HeadCall:
    """A call of bf16 operands and fp32 logits, every row of hidden a labelled token's."""
    hidden = torch.empty(num_tokens, hidden_size, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(vocab_size, hidden_size, device="meta", dtype=weight_dtype)
    tokens = torch.empty(num_tokens, device="meta", dtype=torch.int64)
    options = CallOptions(
        1.0, None, 1.0, mode, "reference", torch.bfloat16, torch.float32, workspace_mib, cache_mib
    )
    pair_rows = [*range(0, num_tokens, pair_length), num_tokens] if mode == "pairs" else [0]
    return library.head_call(
        hidden, weight, None, tokens, tokens, index_kind, options,
        ref_hidden=hidden if has_reference else None, pair_rows=pair_rows, **needs,
    )  # fmt: skip


def run_call(
    call: HeadCall, *, has_lse: bool = False, grad_weight_out: Tensor | None = None, statistics: Any = ()
) -> Any:
    """Forward and backward of what the call's mode has gradients of."""
    mode = call.plan.mode
    if mode == "pairs":

        def group_loss(logps: Tensor, ref_logps: Tensor | None, group: PairGroup) -> tuple[Tensor, Tensor]:
            return logps.new_zeros((), dtype=torch.float64), torch.zeros_like(logps)

        needs = {"needs_hidden": True, "needs_weight": True, "needs_bias": False}
        return paired_chunks(call, statistics, group_loss, **needs)
    outputs, _, kept, _ = (forward_lean if mode == "lean" else forward_chunks)(call, statistics)
    if mode == "score":
        return None
    zeros = torch.zeros_like(outputs.logps)
    grads = TokenGrads(zeros, zeros if has_lse else None)
    needs = {"needs_hidden": True, "needs_weight": mode != "stash", "needs_bias": False}
    if mode == "lean":
        return lean_backward.backward_lean(call, outputs, grads, **needs, grad_weight_out=grad_weight_out)
    return backward_chunks(call, kept, outputs, grads, **needs, grad_weight_out=grad_weight_out)


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
