"""The GPU of a dry run: what torch, Triton and the extension are told of a device that is not there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.dry.moves import to
from benchmarks.dry.tensor import CUDA, HollowMode


@dataclass(frozen=True)
class Card:
    """What a program asks of a GPU.

    Args:
        memory: bytes.
        shared_memory: bytes, the most that a block may ask for.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    shared_memory: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Card:
        found = json.loads(text)
        return cls(**{**found, "capability": tuple(found["capability"])})


# As their makers publish them; memory as a driver reports it, or a little less.
CARDS = {
    "a100": Card("A100", (8, 0), 108, 81920 << 20, 163 << 10),
    "l4": Card("L4", (8, 9), 58, 22478 << 20, 99 << 10),
    "h200": Card("H200", (9, 0), 132, 143771 << 20, 227 << 10),
    # The smallest slice of it: a seventh of its multiprocessors, an eighth of its memory.
    "h200-mig": Card("H200 MIG 1g.18gb", (9, 0), 16, 16384 << 20, 227 << 10),
    "b200": Card("B200", (10, 0), 148, 183359 << 20, 227 << 10),
    "rtx5060": Card("RTX 5060", (12, 0), 30, 8151 << 20, 99 << 10),
}


def card_of(device: torch.device) -> Card:
    """The GPU that is there."""
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", CARDS["l4"].shared_memory)
    return Card(
        found.name, (found.major, found.minor), found.multi_processor_count, found.total_memory, shared
    )


class Pretence:
    """A GPU that torch takes for one, within a ``with``."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.mode = HollowMode(card.memory)
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Pretence:
        for name, answer in _answers(self.card, self.mode).items():
            self.replace(torch.cuda, name, answer)
        self.replace(torch.Tensor, "to", to)
        self.replace(torch.Tensor, "cuda", lambda t, *args, **options: to(t, CUDA, **options))
        self.replace(torch.Tensor, "cpu", lambda t, **options: to(t, "cpu"))
        self.replace(torch.Tensor, "pin_memory", lambda t, *args: t)
        self.replace(torch, "Generator", _Generator)
        self.replace(torch, "compile", _not_compiled)
        self.replace(torch.profiler, "profile", lambda **options: _Profile(self.mode))
        self._autocast()
        # A module moved there gets new parameters: the old ones' memory is a CPU's.
        future = torch.__future__
        self._switch_on(
            future.get_overwrite_module_params_on_conversion, future.set_overwrite_module_params_on_conversion
        )
        # Data are made tensors of a CPU first, and then moved, where `HollowMode` sees it.
        self._switch_on(torch._C._only_lift_cpu_tensors, torch._C._set_only_lift_cpu_tensors)
        self.mode.__enter__()
        self._undo.append(lambda: self.mode.__exit__(None, None, None))
        return self

    def __exit__(self, *exc: Any) -> None:
        while self._undo:
            self._undo.pop()()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Until the end."""
        missing = object()
        before = vars(owner).get(name, missing)
        self._undo.append(
            (lambda: delattr(owner, name)) if before is missing else lambda: setattr(owner, name, before)
        )
        setattr(owner, name, value)

    def _switch_on(self, read: Callable[[], bool], write: Callable[[bool], None]) -> None:
        before = read()
        write(True)
        self._undo.append(lambda: write(before))

    def _autocast(self) -> None:
        """What is a CPU to C++ is autocast as one."""

        def as_cpu(function: Any) -> Any:
            return lambda kind="cuda", *args: function("cpu" if kind == "cuda" else kind, *args)

        names = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype")
        for name in names:
            self.replace(torch, name, as_cpu(getattr(torch, name)))
        autocast = torch.amp.autocast_mode.autocast
        made = autocast.__init__

        def init(self: Any, kind: str, dtype: Any = None, *args: Any, **options: Any) -> None:
            if kind == "cuda":
                kind, dtype = "cpu", dtype or torch.float16
            made(self, kind, dtype, *args, **options)

        self.replace(autocast, "__init__", init)


def _answers(card: Card, mode: HollowMode) -> dict[str, Any]:
    """Functions and classes of ``torch.cuda``, by name."""
    properties = SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=card.memory,
        multi_processor_count=card.multiprocessors, shared_memory_per_block_optin=card.shared_memory,
        warp_size=32,
    )  # fmt: skip

    def fraction(share: float, device: Any = None) -> None:
        mode.limit = int(share * card.memory)

    def forget_peak(device: Any = None) -> None:
        mode.peak = mode.allocated

    def forbid_waiting(how: str | int) -> None:
        mode.forbids_waiting = how in ("error", 2)

    def constant(value: Any = None) -> Any:
        return lambda *args, **options: value

    stream = _Stream()
    return {
        "is_available": constant(True), "is_initialized": constant(True), "_lazy_init": constant(),
        "device_count": constant(1), "current_device": constant(0), "set_device": constant(),
        "_exchange_device": constant(0), "_maybe_exchange_device": constant(0),
        "get_device_capability": constant(card.capability), "get_device_name": constant(card.name),
        "get_device_properties": constant(properties),
        "is_bf16_supported": constant(card.capability >= (8, 0)),
        "mem_get_info": lambda device=None: (mode.limit - mode.allocated, card.memory),
        "memory_allocated": lambda device=None: mode.allocated,
        "memory_reserved": lambda device=None: mode.allocated,
        "max_memory_allocated": lambda device=None: mode.peak,
        "max_memory_reserved": lambda device=None: mode.peak,
        "reset_peak_memory_stats": forget_peak, "set_per_process_memory_fraction": fraction,
        "empty_cache": constant(), "ipc_collect": constant(), "synchronize": constant(), "_sleep": constant(),
        "set_sync_debug_mode": forbid_waiting,
        "get_sync_debug_mode": lambda: 2 * mode.forbids_waiting, "current_stream": constant(stream),
        "default_stream": constant(stream), "Stream": _Stream, "stream": _nothing, "Event": _Event,
        "CUDAGraph": _Graph, "graph": _nothing, "is_current_stream_capturing": constant(False),
        "manual_seed": constant(), "manual_seed_all": constant(),
        "get_rng_state": lambda device=None: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": constant(), "get_rng_state_all": constant([]), "set_rng_state_all": constant(),
    }  # fmt: skip


class _Stream:
    device, cuda_stream, stream_id, device_index = CUDA, 0, 0, 0

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *args: Any, **options: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return False

    def elapsed_time(self, later: _Event) -> float:
        return 1.0


class _Graph:
    def replay(self) -> None: ...


class _Profile:
    """What a GPU would have run under it, as events with names."""

    def __init__(self, mode: HollowMode) -> None:
        self._mode = mode
        self._launched: list[str] = []

    def __enter__(self) -> _Profile:
        self._mode.launched = self._launched
        return self

    def __exit__(self, *exc: Any) -> None:
        self._mode.launched = None

    def events(self) -> list[Any]:
        kind = SimpleNamespace(name="CUDA")
        return [SimpleNamespace(name=name, device_type=kind) for name in self._launched]


class _Generator(torch.Generator):
    """A CPU's random numbers, whatever device is named."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def _nothing(*args: Any, **options: Any) -> Iterator[None]:
    yield


def _not_compiled(model: Any = None, **options: Any) -> Any:
    return _not_compiled if model is None else model
