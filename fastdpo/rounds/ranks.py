"""Several processes that share a piece of work: which one this is, and where it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started.

    Args:
        state: accelerate's; one that all of a run shares.
    """

    state: Any

    @classmethod
    def joined(cls, use_cpu: bool) -> Ranks:
        """The processes that were started together; a single one meets nobody."""
        from accelerate import PartialState

        return cls(PartialState(cpu=use_cpu))

    @property
    def rank(self) -> int:
        """From 0."""
        return int(self.state.process_index)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def together(self, step: Callable[[], Result]) -> Result:
        """What ``step`` returns here, once it has ended on all of them.

        Raises:
            ValueError: what it raised here, or another process's error: no one waits for one that failed.
        """
        error: Exception | None = None
        try:
            found = step()
        except Exception as raised:  # whatever it is, the others have to hear of it
            error = raised
        if self.count > 1:
            from accelerate.utils import gather_object

            told = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
            first = next(((rank, text) for rank, text in enumerate(told) if text is not None), None)
            if error is None and first is not None:
                raise ValueError(f"process {first[0]} failed: {first[1]}")
        if error is not None:
            raise error
        return found

    def wait(self) -> None:
        """Until all of them are here."""
        self.state.wait_for_everyone()


def device_of(use_cpu: bool) -> torch.device:
    """Where this process computes."""
    device: torch.device = Ranks.joined(use_cpu).state.device
    return device
