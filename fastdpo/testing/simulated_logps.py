"""Errors of log-probabilities that the hardware's sums alone make, on logits like those of trained models.

No vocabulary is needed. Logits have standard deviation 3, so the entries that a softmax weighs are, in any
large vocabulary, those with a logit of 9 and a standard deviation of 3 again; the logsumexp errs by their
mean error. A row of the weight with a given logit z is a random one moved along the hidden state, which is
what a random row with that logit is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.testing.accuracy import Capability, logps_bound, sum_error
from fastdpo.testing.hardware_sums import (
    multiply_add_chain,
    summed_by,
    tensor_core_sums,
    truncated_to_tf32,
)

STD = 3.0
# Of 30,000 random labels the least likely, of 100,000 entries the most likely: the argmax.
LOWEST, TOP = -12.0, 13.0
SIZES = (64, 256, 1024, 2048, 4096, 8192, 16384)
Sums = Callable[[Tensor, Tensor], Tensor]  # (1, H), (rows, H) -> (rows,)


class LogpErrors(NamedTuple):
    """Errors in nats, ``(labels,)`` fp64 each: of the lowest labels, of the argmax, of random labels."""

    lowest: Tensor
    top: Tensor
    random: Tensor

    @property
    def worst(self) -> float:
        """What one label in 30,000 of the worst kind is off by: four standard deviations from its mean."""
        return max(float(kind.mean().abs() + 4 * kind.std()) for kind in self)


def sums_of(dtype: torch.dtype, capability: Capability | None, *, tf32: bool = False) -> Sums:
    """The sums of a GPU, or with None of a CPU, over operands of a dtype; arguments as in ``sum_error``."""
    core = summed_by(dtype, capability, tf32=tf32)
    if core is None:
        return multiply_add_chain
    if dtype != torch.float32:
        return partial(tensor_core_sums, core=core)
    return lambda a, b: tensor_core_sums(truncated_to_tf32(a), truncated_to_tf32(b), core)


def simulated_errors(
    hidden_size: int,
    dtype: torch.dtype,
    sums: Sums,
    *,
    num_states: int = 4,
    num_labels: int = 64,
    seed: int = 0,
) -> LogpErrors:
    """Errors of ``num_states * num_labels`` log-probabilities of each kind, beside sums in fp64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.special.ndtri((torch.arange(2 * num_labels).double() + 0.5) / (2 * num_labels))
    constant = normal.new_ones(num_labels)
    logits = torch.cat((STD**2 + STD * normal, LOWEST * constant, TOP * constant, STD * normal[::2]))
    kinds = []
    for _ in range(num_states):
        hidden = torch.randn(1, hidden_size, generator=generator).to(dtype).double()
        rows = torch.randn(len(logits), hidden_size, generator=generator).double() * (STD / hidden_size**0.5)
        rows += (logits - rows @ hidden[0])[:, None] * hidden / hidden.square().sum()
        rows = rows.to(dtype).double()
        error = sums(hidden, rows).double() - rows @ hidden[0]
        of_lse = error[: 2 * num_labels].mean()
        kinds.append((error[2 * num_labels :] - of_lse).view(3, num_labels))
    return LogpErrors(*torch.cat(kinds, 1))


def simulated_rows(sizes: Sequence[int] = SIZES, **how: int) -> list[dict[str, int | float | str]]:
    """A table of what is simulated, beside what is promised, in nats: a row for each size and way to sum.

    Returns:
        ``hidden_size``, ``dtype``, ``sums`` (in words); ``worst``, simulated; ``of_sum``, granted to the sum;
        ``bound``, promised of the log-probability.
    """
    table: list[dict[str, int | float | str]] = []
    for words, dtype, capability, tf32 in (
        ("tensor cores, sm_90 and newer", torch.bfloat16, (9, 0), False),
        ("tensor cores, sm_8x", torch.bfloat16, (8, 0), False),
        ("a chain in fp32: fp32 operands, CPUs", torch.float32, None, False),
        ("TF32, sm_90 and newer", torch.float32, (9, 0), True),
    ):
        for size in sizes:
            errors = simulated_errors(size, dtype, sums_of(dtype, capability, tf32=tf32), **how)
            table.append(
                {
                    "hidden_size": size,
                    "dtype": str(dtype).removeprefix("torch."),
                    "sums": words,
                    "worst": errors.worst,
                    "of_sum": sum_error(size, dtype, capability, tf32=tf32),
                    "bound": logps_bound(size, dtype, capability, tf32=tf32),
                }
            )
    return table
