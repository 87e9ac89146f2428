"""Matrix products are counted, not timed: 2 M N K summed over the profiler's mm and addmm events."""

from __future__ import annotations

import pytest
import torch

from fastdpo import Execution, explain_plan
from fastdpo.testing import make_case
from tests.ops.common import leaves, run_op

# The place of the two factors among the matrices an event takes (an `out=` may follow them).
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}


def count_passes(
    run: object, num_tokens: int, hidden_size: int, vocab_size: int, *, of_size: int | None = None
) -> float:
    """Products during ``run()`` in units of 2 N H V; those alone of matrices that have a side ``of_size``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run()  # type: ignore[operator]
    flop = 0
    # Not `profile.events()`, which makes a tree of all of them, for seconds.
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() in PRODUCTS:
            first = PRODUCTS[event.name()]
            left, right = [shape for shape in event.shapes() if len(shape) == 2][first : first + 2]
            if of_size is not None and of_size not in (*left, *right):
                continue
            flop += 2 * left[0] * left[1] * right[1]
    return flop / (2 * num_tokens * hidden_size * vocab_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("needs", "mode", "cache_mib", "passes"),
    [
        ("nothing", "auto", 64, 1),
        ("hidden", "auto", 64, 2),
        ("both", "auto", 64, 3),
        ("both", "auto", 0, 4),
        ("both", "recompute", 64, 4),
        ("hidden", "recompute", 64, 3),
        ("weight", "auto", 64, 2),
        ("weight", "auto", 0, 3),
    ],
)
def test_passes(needs: str, mode: str, cache_mib: int, passes: int, seed: int, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, seed=seed, has_bias=False)
    num_tokens = int((case.labels != case.ignore_index).sum())
    assert num_tokens < case.labels.numel()
    h, w, _ = leaves(case, hidden=needs in ("hidden", "both"), weight=needs in ("weight", "both"))
    execution = Execution(mode=mode, cache_mib=cache_mib, workspace_mib=1)

    def run() -> None:
        out = run_op(case, h, w, None, execution)
        if needs != "nothing":
            out.logps.backward(case.upstream)

    assert count_passes(run, num_tokens, *reversed(case.weight.shape)) == passes
    plan = explain_plan(
        num_tokens,
        case.weight.shape[1],
        case.weight.shape[0],
        mode=mode,
        hidden_requires_grad=h.requires_grad,
        weight_requires_grad=w.requires_grad,
        operand_bytes=4,
        workspace_mib=1,
        cache_mib=cache_mib,
    )
    assert plan.gemm_passes == passes


def test_partly_cached_passes_lie_between() -> None:
    """Three, plus the share of the rows that the budget did not hold."""
    case = make_case(dtype=torch.float32, has_bias=False)
    num_tokens = int((case.labels != case.ignore_index).sum())
    h, w, _ = leaves(case)
    execution = Execution(cache_mib=1, workspace_mib=1)

    def run() -> None:
        run_op(case, h, w, None, execution).logps.backward(case.upstream)

    counted = count_passes(run, num_tokens, *reversed(case.weight.shape))
    plan = explain_plan(
        num_tokens,
        *reversed(case.weight.shape),
        weight_requires_grad=True,
        operand_bytes=4,
        workspace_mib=1,
        cache_mib=1,
    )
    assert 3 < counted < 4
    assert counted == pytest.approx(plan.gemm_passes, abs=1e-12)


def test_all_ignored_needs_no_product() -> None:
    case = make_case(dtype=torch.float32, has_bias=False)
    case.labels.fill_(case.ignore_index)
    h, w, _ = leaves(case)

    def run() -> None:
        run_op(case, h, w, None).logps.sum().backward()

    assert count_passes(run, 1, *case.weight.shape) == 0
