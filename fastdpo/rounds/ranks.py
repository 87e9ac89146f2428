"""Several processes that share a piece of work: which one this is, and where it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


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

    def wait(self) -> None:
        """Until all of them are here."""
        self.state.wait_for_everyone()


def device_of(use_cpu: bool) -> torch.device:
    """Where this process computes."""
    device: torch.device = Ranks.joined(use_cpu).state.device
    return device
