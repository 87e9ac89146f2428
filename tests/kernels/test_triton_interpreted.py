"""Triton's kernels, and the ops on them, under its interpreter: some of each in every run, in one process.

The tests named `test_triton_under_the_interpreter` run all of a file, a minute each, among the slow ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.kernels import test_divergence_kernels, test_lean_kernel, test_rows
from tests.kernels.sequence_cases import mixed_cases
from tests.kernels.triton_processes import run_interpreted

KERNELS = "tests/kernels"
# Beside the cases below: what they do not have.
OTHERS = (
    f"{KERNELS}/test_rows.py::test_a_row_has_the_same_bits_in_every_chunk[triton-65]",
    f"{KERNELS}/test_rows.py::test_extremes[triton-70-middle masked, label in it-coefficients]",
    f"{KERNELS}/test_rows.py::test_labels_out_of_range_give_nan_and_touch_nothing[triton-torch.bfloat16]",
    f"{KERNELS}/test_divergence_kernels.py::test_a_row_has_the_same_bits_in_every_chunk[triton-65-2]",
    f"{KERNELS}/test_sequence.py::test_a_pair_without_tokens_counts_nowhere[triton-masked]",
    f"{KERNELS}/test_sequence.py::test_an_impossible_outcome_costs_nothing[triton-tensor-1.0]",
    f"{KERNELS}/test_lean_kernel.py::test_slabs_make_a_row_kernel[{test_lean_kernel.LONG_CASES[0]}-triton]",
    f"{KERNELS}/test_lean_kernel.py::TestTritonLogprobs::test_values_and_repeatability"
    "[ragged, heavy-torch.float16]",
    f"{KERNELS}/test_lean_kernel.py::TestTritonLogprobs::test_values_and_repeatability"
    "[three splits, heavy-torch.float32]",
    "tests/ops/test_lean.py::test_few_tokens[2]",
    "tests/ops/test_divergence_backends.py::test_numbers[triton-('jsd',)-cache-torch.float16]",
    "tests/ops/test_scaling.py::test_the_triton_kernel",
)


def each_value(cases: Sequence[Any], *, but: tuple[str, ...] = ()) -> list[Any]:
    """Few cases that have every value of every field that all of them have, the short ones first."""

    def values(case: Any) -> set[tuple[str, Any]]:
        return {(name, value) for name, value in vars(case).items() if name not in but}

    missing = set().union(*map(values, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(values(case) & missing))
        missing -= values(best)
        chosen.append(best)
    return chosen


@pytest.mark.promise(13)
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs in this process")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is what this test starts")
def test_every_kernel_and_option_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    kernels = {
        "test_rows.py::test_values_guards_and_repeatability[triton-{}]": each_value(
            [case for case in test_rows.INTERPRETED_CASES if case.vocab < 10000]
        ),
        "test_divergence_kernels.py::test_values_guards_and_repeatability[triton-{}]": each_value(
            [case for case in test_divergence_kernels.INTERPRETED_CASES if case.rows < 17]
        ),
        "test_sequence.py::test_sums_loss_and_gradient[triton-{}]": each_value(
            mixed_cases(2), but=("lengths",)
        ),
        "test_lean_kernel.py::test_slabs_make_a_row_kernel[{}-triton]": each_value(
            [case for case in test_lean_kernel.SLAB_CASES if 1 < case.vocab < 1000 and case.rows < 17]
        ),
    }
    tests = [f"{KERNELS}/{test.format(case)}" for test, cases in kernels.items() for case in cases]
    assert len(set(tests)) == len(tests) > 25
    run_interpreted(*tests, *OTHERS, at_least=len(tests) + len(OTHERS))
