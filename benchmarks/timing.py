"""Time of the device, apart from that of the host: what every suite measures with.

A GPU runs behind the host. A first time stamp in an idle stream is taken at once, and the GPU then waits for
Python to launch what is timed: 0.5 to 1 ms of one of our passes would be charged to the kernels. So a kernel
that spins goes first, for longer than the host takes to launch the rest; the time stamp follows it, and what
is timed stands in the queue by then. How long the host took is told apart, and how often the spin was too
short: always where what is timed waits for the device itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Contender, recover, why

MIN_REPEATS = 5
FIRST_SPIN_MS = 1.0
# What waits for the device is never done before the spin: it is not made to wait for longer and longer.
MOST_SPIN_MS = 32.0
CALIBRATION_CYCLES = 10_000_000


class Sample(NamedTuple):
    """One run: milliseconds of the device, those of the host until the call returned, and whether the device
    had nothing to do before that."""

    ms: float
    host_ms: float
    device_waited: bool = False


class Timer:
    """Times runs of one contender on a device; the spin grows until the host is ahead of the device.

    On a CPU, which is its own host, by the clock and without a spin.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spin_ms = FIRST_SPIN_MS

    def __call__(self, run: Callable[[], object]) -> Sample:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - start) * 1e3
            return Sample(elapsed, elapsed)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        spin(self.device, self.spin_ms)
        begin.record()
        start = time.perf_counter()
        run()
        host_ms = (time.perf_counter() - start) * 1e3
        end.record()
        device_waited = begin.query()  # the spin is over
        end.synchronize()
        if device_waited:
            self.spin_ms = min(2 * self.spin_ms, MOST_SPIN_MS)
        return Sample(begin.elapsed_time(end), host_ms, device_waited)


class Stamp:
    """A time of the device, for a difference from a later one in seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Stamp) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


class Ahead:
    """For pytest-benchmark, which reads a clock right before and after a call: on a GPU that is `Stamp`;
    ``begin`` spins before it, and ``run`` sees how long that has to be."""

    def __init__(self, run: Callable[..., object], device: torch.device) -> None:
        self._run, self._device, self._spin_ms = run, device, FIRST_SPIN_MS
        self.host_ms: list[float] = []

    def begin(self) -> None:
        spin(self._device, self._spin_ms)

    def run(self, *args: Any) -> None:
        start = time.perf_counter()
        self._run(*args)
        self.host_ms.append((time.perf_counter() - start) * 1e3)
        self._spin_ms = min(max(self._spin_ms, 2 * self.host_ms[-1]), MOST_SPIN_MS)


def spin(device: torch.device, milliseconds: float) -> None:
    """Have a GPU's current stream do nothing for so long; the host goes on."""
    torch.cuda._sleep(int(milliseconds * _cycles_per_ms(device)))  # the spin that torch's own tests use


@lru_cache
def _cycles_per_ms(device: torch.device) -> float:
    """By the fastest of some spins: a clock that rises from idle would make later ones too short."""
    torch.cuda.synchronize(device)
    found = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda._sleep(CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
        found.append(CALIBRATION_CYCLES / begin.elapsed_time(end))
    return max(found)


def time_interleaved(
    contenders: list[Contender],
    device: torch.device,
    *,
    repeats: int = 20,
    warmup: int = 3,
    seconds: float | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, list[Sample]]:
    """Every run of every contender; they take turns, so that drift hits all alike.

    Args:
        repeats: runs of each contender.
        warmup: runs before, which do not count.
        seconds: about how long all of it may take; then fewer repeats, but ``MIN_REPEATS`` at least.
        failed: where the reason of a contender that raises, or runs out of memory, is put; it alone is out
            of the turns then. None: it raises.

    Returns:
        Samples by name, of those that ran to the end.

    Raises:
        DeviceLost: after an error the device answers no more.
    """
    timers = {contender.name: Timer(device) for contender in contenders}
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    start, round_ = time.perf_counter(), 0
    while round_ < warmup + repeats and samples:
        for contender in [contender for contender in contenders if contender.name in samples]:
            reason = None
            try:
                if contender.prepare is not None:
                    contender.prepare()
                sample = timers[contender.name](contender.run)
            except Exception as error:
                if failed is None:
                    raise
                reason = f"raised while it was timed: {why(error)}"
            if reason is not None and failed is not None:
                failed[contender.name] = reason
                del samples[contender.name]
                recover(device, contender.name, reason)
            elif round_ >= warmup:
                samples[contender.name].append(sample)
        round_ += 1
        if seconds is not None and time.perf_counter() - start > seconds:
            repeats = min(repeats, max(round_ - warmup, min(MIN_REPEATS, repeats)))
    return samples


def of_host(samples: Sequence[Sample], device: torch.device) -> dict[str, Any]:
    """What a result keeps of the host on a GPU: median milliseconds until the call returned, and the share of
    the samples in which the device may have waited for it."""
    if device.type != "cuda":
        return {}
    return {
        "host_ms": statistics.median(sample.host_ms for sample in samples),
        "device_waited": sum(sample.device_waited for sample in samples) / len(samples),
    }
