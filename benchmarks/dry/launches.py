"""Launches of Triton's kernels on a GPU that is not there: recorded, or compiled, and never run."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.dry.device import Card, Pretence

# Whose kernels are recorded: a peer's are compiled where it is timed, as its user has them.
PACKAGE = "fastdpo."


class Target:
    """Stands for a GPU as far as Triton needs one to compile."""

    def __init__(self, card: Card) -> None:
        from triton.backends.compiler import GPUTarget

        major, minor = card.capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """What was launched: every specialisation once.

    Args:
        path: a file to add each to as it is found, one a line: a run that is cut off leaves what it has.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.specialisations: dict[tuple[str, str], str] = {}
        self.count = 0
        self._path = path

    def install(self, pretence: Pretence) -> None:
        """Until the pretence ends: nothing is compiled or run."""
        from triton import knobs
        from triton.runtime.jit import JITFunction

        aim(pretence.card)
        run = JITFunction.run

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            self.count += 1
            pretence.mode.launch(kernel.__name__)
            return run(kernel, *args, grid=grid, warmup=True, **options)

        pretence.replace(JITFunction, "run", launch)
        pretence.replace(knobs.runtime, "jit_cache_hook", self._found)

    def _found(self, *, key: str, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        """Triton's hook before a compilation; True keeps it from one."""
        name = f"{fn.module}:{fn.jit_function.fn.__name__}"
        if fn.module.startswith(PACKAGE) and (name, key) not in self.specialisations:
            self.specialisations[name, key] = compile["specialization_data"]
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([name, key, compile["specialization_data"]]) + "\n")
        return True


def read_launches(paths: list[Path]) -> dict[tuple[str, str], str]:
    """The specialisations of several files: (kernel, key) -> what `compile_one` takes."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    return {(name, key): data for name, key, data in map(json.loads, lines)}


def aim(card: Card) -> None:
    """Have Triton compile for a card, in this process and for good."""
    import triton

    triton.runtime.driver.set_active(Target(card))


def compile_one(name: str, data: str) -> Any:
    """A kernel for the card that was aimed at, into Triton's cache; the compiled kernel."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function).preload(data)


def watch_cache(seen: Callable[[str, bool], None]) -> None:
    """Call ``seen(kernel, was_in_the_cache)`` at every compilation of this process."""
    from triton import knobs

    def listener(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        seen(src.name, cache_hit)

    knobs.compilation.listener = listener
