"""What the timers time on a GPU: stood in for by one that only says in which order it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.harness import Contender
from benchmarks.timing import Ahead, Sample, Stamp, Timer, of_host, time_interleaved

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CYCLES_PER_MS = 1000


class Device:
    """One stream, and a host that takes the milliseconds it is told: the device's clock, and what it runs."""

    def __init__(self) -> None:
        self.host_ms = 0.0
        self.free_at = 0.0  # when the device has done what stands in the queue
        self.asked: list[str] = []

    def enqueue(self, name: str, milliseconds: float) -> None:
        self.asked.append(name)
        self.free_at = max(self.free_at, self.host_ms) + milliseconds

    def run(self, host_ms: float, device_ms: float) -> Callable[[], None]:
        """Something to time: Python first, then a launch."""

        def call() -> None:
            self.host_ms += host_ms
            self.enqueue("run", device_ms)

        return call


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            found.enqueue("stamp", 0.0)
            self.at = found.free_at

        def query(self) -> bool:
            return self.at <= found.host_ms

        def synchronize(self) -> None:
            found.host_ms = max(found.host_ms, self.at)

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: found.enqueue("spin", cycles / CYCLES_PER_MS))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: found.host_ms / 1e3))
    timing._cycles_per_ms.cache_clear()
    assert timing._cycles_per_ms(CUDA) == pytest.approx(CYCLES_PER_MS)
    found.asked.clear()
    yield found
    timing._cycles_per_ms.cache_clear()


def test_the_host_is_not_charged_to_the_device(device: Device) -> None:
    """0.7 ms of Python before the first launch, which an idle stream would wait for."""
    sample = Timer(CUDA)(device.run(host_ms=0.7, device_ms=0.25))
    assert device.asked == ["spin", "stamp", "run", "stamp"]
    assert sample == Sample(pytest.approx(0.25), pytest.approx(0.7), False)


def test_a_spin_that_was_too_short_is_told_and_grows(device: Device) -> None:
    timer = Timer(CUDA)
    samples = [timer(device.run(host_ms=5.0, device_ms=0.25)) for _ in range(5)]
    assert [sample.device_waited for sample in samples] == [True, True, True, False, False]
    assert samples[0].ms == pytest.approx(5.0 - 1.0 + 0.25)  # what was charged before
    assert samples[-1].ms == pytest.approx(0.25)
    for _ in range(20):  # what waits for the device itself is not made to wait for longer and longer
        device.run(0.0, 0.0)()
        timer(device.run(host_ms=1e3, device_ms=0.25))
    assert timer.spin_ms == timing.MOST_SPIN_MS


def test_contenders_are_timed_alike_and_their_host_is_in_the_results(device: Device) -> None:
    contenders = [
        Contender("slow to launch", device.run(0.6, 2.0)),
        Contender("quick", device.run(0.01, 2.0)),
    ]
    samples = time_interleaved(contenders, CUDA, repeats=4, warmup=1)
    for taken in samples.values():
        assert [sample.ms for sample in taken] == pytest.approx([2.0] * 4)
    assert of_host(samples["slow to launch"], CUDA) == {"host_ms": pytest.approx(0.6), "device_waited": 0}
    assert of_host(samples["quick"], CPU) == {}


def test_pytest_benchmark_reads_the_devices_clock(device: Device) -> None:
    """Its order: set up, a time stamp, the call, a time stamp."""
    ahead = Ahead(device.run(0.7, 0.25), CUDA)
    taken = []
    for _ in range(3):
        ahead.begin()
        start = Stamp()
        ahead.run()
        taken.append(Stamp() - start)
    assert taken == pytest.approx([0.25e-3] * 3) and ahead.host_ms == pytest.approx([0.7] * 3)
    assert device.asked == ["spin", "stamp", "run", "stamp"] * 3


def test_the_spin_is_measured_at_the_fastest_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle GPU's clock rises while it is asked; a spin of its first would be too short later."""
    taken = iter([50.0, 20.0, 10.0, 10.0, 12.0])
    event: Any = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    event.elapsed_time = lambda later: next(taken)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    timing._cycles_per_ms.cache_clear()
    assert timing._cycles_per_ms(CUDA) == timing.CALIBRATION_CYCLES / 10.0
    timing._cycles_per_ms.cache_clear()


def test_a_cpu_is_its_own_host() -> None:
    sample = Timer(CPU)(lambda: sum(range(1000)))
    assert sample.ms == sample.host_ms > 0 and not sample.device_waited
