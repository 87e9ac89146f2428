"""``token_divergence`` on every backend of the divergence kernel: numbers, and the same bits in every mode.

Triton's under its interpreter in a process of its own; ``tests/gpu`` has it on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fastdpo import Execution, TokenDivergenceOutput, token_divergence
from fastdpo.ops.backends import DIVERGENCE_BACKENDS, resolve_divergence_backend
from fastdpo.ops.token_divergence import plan_divergences
from tests.kernels.triton_processes import run_interpreted
from tests.ops.common import backend_or_skip
from tests.ops.divergence_cases import assert_divergence_right, make_divergence_case, run_divergence, small

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [name for name in DIVERGENCE_BACKENDS if (name == "triton") == IS_INTERPRETED]
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# The interpreter cuts off what rounding to bf16 would look at.
DTYPES = [FP32, FP16, *([] if IS_INTERPRETED else [BF16])]
# Which takes some milliseconds a row.
LENGTH = 8 if IS_INTERPRETED else 64
TDPO, DISTILLED = ("forward_kl", "logps", "ref_logps"), ("reverse_kl", "logps", "l1_distance")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return backend_or_skip(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["auto", "cache", "recompute"])
@pytest.mark.parametrize("outputs", [("jsd",), TDPO], ids=str)
def test_numbers(backend: str, outputs: tuple[str, ...], mode: str, dtype: torch.dtype) -> None:
    case = make_divergence_case("a cap on the policy", dtype, length=LENGTH)
    assert_divergence_right(case, outputs, small(mode, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [DISTILLED, ("forward_kl", "jsd", "logps")], ids=str)
def test_two_teachers(backend: str, outputs: tuple[str, ...], dtype: torch.dtype) -> None:
    case = make_divergence_case("a cap on the teacher", dtype, num_teachers=2, length=LENGTH)
    assert_divergence_right(case, outputs, small(backend=backend), value_factor=5.0)


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("outputs", [TDPO, ("reverse_kl", "logps")], ids=str)
def test_modes_have_the_same_bits(backend: str, outputs: tuple[str, ...], num_teachers: int) -> None:
    case = make_divergence_case("a cap on the policy", num_teachers=num_teachers, length=LENGTH)
    results: list[TokenDivergenceOutput] = []
    for mode, needs in (("score", ""), ("stash", "h"), ("cache", "hw"), ("recompute", "hw")):
        h = case.policy.hidden.clone().requires_grad_("h" in needs)
        w = case.policy.weight.clone().requires_grad_("w" in needs)
        results.append(run_divergence(case, h, w, case.policy.bias, outputs, small(mode, backend=backend)))
    for other in results[1:]:
        for name in outputs:
            assert torch.equal(getattr(other, name), getattr(results[0], name)), name


@pytest.mark.parametrize("mode", ["stash", "cache"])
def test_the_same_model_is_0(backend: str, mode: str) -> None:
    case = make_divergence_case("plain", FP16, length=LENGTH)
    h = case.policy.hidden.clone().requires_grad_()
    w = case.policy.weight.clone().requires_grad_(mode == "cache")
    run = small(mode, backend=backend)
    out = token_divergence(h, w, case.policy.hidden, case.policy.labels, outputs=TDPO, execution=run)
    assert out.forward_kl is not None and out.logps is not None
    out.forward_kl.sum().backward()
    assert torch.equal(out.logps, out.ref_logps)
    assert not out.forward_kl.any() and h.grad is not None and not h.grad.any()


def test_plain_torch_alone_needs_room_for_temporaries(backend: str) -> None:
    """The others' chunks are larger: a share of the workspace for each head, and one for the row maths."""
    hidden, weight = torch.zeros(1, 8).expand(4096, 8), torch.zeros(4096, 8)
    head = make_divergence_case("plain").policy.lm_head.__class__(weight)
    rows = {
        name: plan_divergences(
            hidden, head, [(hidden, head)], 4096, outputs=TDPO,
            execution=Execution(workspace_mib=48, backend=name),
        ).chunk_rows
        for name in ("reference", backend)
    }  # fmt: skip
    assert (rows[backend] > rows["reference"]) == (backend != "reference")


def test_which_backend_runs() -> None:
    cpu = torch.device("cpu")
    for dtype in (FP32, FP64):
        chosen = resolve_divergence_backend("auto", cpu, dtype)
        assert chosen in DIVERGENCE_BACKENDS and (dtype == FP32 or chosen == "reference")
    case: Any = make_divergence_case("plain", FP64)
    with pytest.raises(TypeError, match="float64 runs on the 'reference' backend only"):
        token_divergence(
            case.policy.hidden, case.policy.weight, case.policy.hidden, case.policy.labels,
            execution=Execution(backend="triton"),
        )  # fmt: skip


@pytest.mark.skipif(IS_INTERPRETED or torch.cuda.is_available(), reason="Triton runs in this process")
@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    # The kernel's own tests have the rest: here it is what the op hands it.
    chosen = "(numbers and float16) or (two_teachers and float32) or same_model"
    run_interpreted(__file__, at_least=10, chosen=chosen)
