"""The counter by which a launch knows its last block: 0 before every launch, and left 0 by it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_counters: dict[tuple[int, int], Tensor] = {}
_lock = threading.Lock()


def ticket_counter(device: torch.device) -> Tensor:
    """``(1,)`` int32 that is 0, for one launch on the device's current stream.

    Launches of one stream follow each other and share a counter that is made, and set to 0, once: a launch
    stays a single launch. While a CUDA graph is captured it is a new one, zeroed in the graph: graphs may be
    replayed side by side, on other streams than they were captured on.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)  # interpreted
    with torch.cuda.device(device):  # the device of the stream, which need not be the current one
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream()
        key = (stream.device.index, stream.cuda_stream)
        with _lock:
            if key not in _counters:
                _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
            return _counters[key]
