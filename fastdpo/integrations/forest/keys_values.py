"""Keys and values of every layer of a row, and their gradients: on the device, in host memory, or on disk."""

from __future__ import annotations

import os
import tempfile
from math import prod

import torch
from torch import Tensor

from fastdpo.plan.schedule import MIB


class KeysValues:
    """What a carried context keeps.

    A layer's keys, values and, when they are expected, their gradients have a tensor each, as long as the
    row: ``(1, key heads, N, d)``. Each lies where there is room at the time: on the device up to a budget, in
    host memory up to another, else in a file. Gradients are of the keys' dtype, as those of attention are.

    Args:
        num_tokens: N.
        device: that layers compute on.
        device_mib, host_mib: the budgets, in MiB; None for no bound.
        directory: of the files; None for the system's.
    """

    def __init__(
        self,
        num_tokens: int,
        device: torch.device,
        device_mib: int | None,
        host_mib: int | None,
        directory: str | None,
    ) -> None:
        self.num_tokens, self.device, self.directory = num_tokens, device, directory
        self._room = {
            "device": float("inf") if device_mib is None else device_mib * MIB,
            "host": float("inf") if host_mib is None else host_mib * MIB,
        }
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._key_grads: list[Tensor] = []
        self._value_grads: list[Tensor] = []

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> None:
        """Keys and values ``(1, key heads, n, d)`` of the tokens from ``start`` on."""
        if layer == len(self._keys):
            self._keys.append(self._new(key))
            self._values.append(self._new(value))
        stop = start + key.shape[2]
        for kept, part in ((self._keys[layer], key), (self._values[layer], value)):
            kept[:, :, start:stop].copy_(part.detach(), non_blocking=kept.device == part.device)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens, on the device."""
        keys, values = (kept[layer][:, :, start:stop] for kept in (self._keys, self._values))
        return keys.to(self.device, non_blocking=True), values.to(self.device, non_blocking=True)

    def expect_gradients(self) -> None:
        """Make room for them, all 0."""
        for kept, grads in ((self._keys, self._key_grads), (self._values, self._value_grads)):
            grads += [self._new(tensor) for tensor in kept]

    def add_gradients(
        self, layer: int, first: int, start: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add gradients of the tokens from ``first`` on, and take those of the tokens from ``start`` on.

        Returns:
            The sums ``(1, key heads, n, d)`` of the last n tokens, on the device.
        """
        found = []
        for grads, part in ((self._key_grads[layer], keys), (self._value_grads[layer], values)):
            place = grads[:, :, first : first + part.shape[2]]
            place += part.to(place.device)
            found.append(place[:, :, start - first :].to(self.device, copy=True))
        return found[0], found[1]

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def close(self) -> None:
        """Give everything back."""
        for kept in (self._keys, self._values, self._key_grads, self._value_grads):
            kept.clear()

    def _new(self, like: Tensor) -> Tensor:
        """Zeros as long as the row."""
        shape = (*like.shape[:2], self.num_tokens, *like.shape[3:])
        size = prod(shape) * like.element_size()
        for place, room in self._room.items():
            if size <= room:
                self._room[place] -= size
                on_host = place == "host" and self.device.type != "cpu"
                device = torch.device("cpu") if place == "host" else self.device
                return torch.zeros(shape, dtype=like.dtype, device=device, pin_memory=on_host)
        return _in_file(shape, like.dtype, size, self.directory)


def _in_file(shape: tuple[int, ...], dtype: torch.dtype, size: int, directory: str | None) -> Tensor:
    """Zeros in a file that is gone from its directory at once, and from the disk with the tensor.

    Raises:
        OSError: the disk has no room; written to through memory, it would end the process.
    """
    handle, name = tempfile.mkstemp(prefix="fastdpo-context-", dir=directory)
    try:
        os.posix_fallocate(handle, 0, size)
        return torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
    except OSError as error:
        where = directory or tempfile.gettempdir()
        raise OSError(
            error.errno, f"context: {size / MIB:.0f} MiB of keys and values: {error.strerror}", where
        ) from None
    finally:
        os.close(handle)
        os.unlink(name)
