"""Activations in host memory from the forward pass to the backward pass.

What autograd saves in the backbone is moved by hooks (``torch.autograd.graph.saved_tensors_hooks``): results
are the same bits, in every layout, with checkpointing too, of which the layers' inputs are then all that is
moved. The head's op stays as it is: what it keeps has a bound of its own (``cache_mib``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from fastdpo.integrations.lm_head import find_backbone


class _Packed(NamedTuple):
    """A saved tensor: in host memory, with the device it goes back to, or as it was."""

    tensor: Tensor
    device: torch.device | None = None


class _Forward:
    """One forward pass of the backbone.

    Args:
        backbone: its weights and buffers stay where they are: they take no memory of the step's.
    """

    def __init__(self, backbone: nn.Module) -> None:
        tensors = [*backbone.parameters(), *backbone.buffers()]
        self.kept = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        # Layers save one tensor several times (queries, keys and values come of the same states). The weak
        # reference frees the tensor's memory, and keeps its key from becoming another's.
        self.copies: dict[Any, tuple[StorageWeakRef, _Packed]] = {}
        self.hooks: Any = saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> _Packed:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.kept:
            return _Packed(tensor)
        reference = StorageWeakRef(storage)
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (reference.cdata, *view, tensor._version)
        if key in self.copies:
            return self.copies[key][1]
        on_device = tensor.device.type != "cpu"
        copy = torch.empty_like(tensor, device="cpu", pin_memory=on_device, requires_grad=False)
        # To pinned memory and back in the order of the device's stream, so nothing is read too early.
        copy.copy_(tensor, non_blocking=on_device)
        packed = _Packed(copy, tensor.device)
        self.copies[key] = reference, packed
        return packed

    @staticmethod
    def unpack(packed: _Packed) -> Tensor:
        if packed.device is None:
            return packed.tensor
        return packed.tensor.to(packed.device, non_blocking=True)


@contextmanager
def offloaded_activations(model: nn.Module) -> Iterator[None]:
    """In this context, what the backbone's backward pass needs is kept in host memory, pinned on a GPU.

    Args:
        model: patched, or a peft model of a patched one.
    """
    running: list[_Forward] = []

    def begin(backbone: nn.Module, args: Any) -> None:
        running.append(_Forward(backbone))
        running[-1].hooks.__enter__()

    def end(backbone: nn.Module, args: Any, output: Any) -> None:
        forward = running.pop()
        forward.hooks.__exit__()
        # What is saved holds its copy; this held all of them.
        forward.copies.clear()

    backbone = find_backbone(model)
    handles = [
        backbone.register_forward_pre_hook(begin),
        backbone.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
