"""A way to compute a task of the head: ours in ``ours``, other people's in ``peers``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.problem import PASSES, HeadProblem, Outcome, Size


@dataclass(frozen=True)
class Method:
    """One contender.

    Args:
        package: the distribution whose version counts.
        what: what is called, in words.
        rows: ``labelled`` or ``all``: what it projects.
        run: computes a task of a problem: all that the task asks for, forward and backward.
        unavailable: a reason why it does not run on this device with this dtype, or None.
        tasks: what it can compute.
        bytes_needed: beyond inputs and gradients, of a size; 0 where it is bounded.
        is_compiled: takes a minute of compilation for every new size.
        is_exact: held to fastdpo's promise instead of to what rounded logits explain.
    """

    name: str
    package: str
    what: str
    rows: str
    run: Callable[[HeadProblem, str], Outcome]
    unavailable: Callable[[torch.device, torch.dtype], str | None]
    tasks: tuple[str, ...] = tuple(PASSES)
    bytes_needed: Callable[[Size], int] = lambda size: 0
    is_compiled: bool = False
    is_exact: bool = False


WHOLE = "the whole case"  # what failed where no contender did
OUR_LAYOUTS = ("padded", "packed", "shared_prompt", "auto")
OUR_CONTEXTS = ("checkpointed", "carried", "carried-host", "carried-disk")


def is_ours(name: str) -> bool:
    """Whether a contender is fastdpo: a peer that fails is a result, ours is a mistake to mend."""
    kernels = ("triton", "cuda", "cpu", "reference")
    return name.startswith("fastdpo") or name in (*kernels, *OUR_LAYOUTS, *OUR_CONTEXTS)
