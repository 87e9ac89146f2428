"""Every backend of the row kernel against the contract of ``fastdpo/kernels/contract.py``.

``triton`` runs on a GPU where there is one. Elsewhere it runs under Triton's interpreter, which is
chosen when Triton is first imported and would break the tests that compile kernels in this process:
so ``test_triton_under_the_interpreter`` runs this file's Triton cases, fewer of them, in a process of
its own with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.kernels.contract import RowKernel
from fastdpo.testing import assert_close_to_fp64, assert_logps_close
from fastdpo.types import TOKEN_STATISTICS
from tests.kernels.row_cases import (
    MARGINS,
    RowCase,
    RowData,
    RowResults,
    dense_rows,
    make_data,
    pairwise_cases,
    run,
    set_margins,
)
from tests.kernels.triton_processes import run_interpreted

HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

OPTIONS: dict[str, Any] = {
    "logits_dtype": (FP32, BF16),
    "d": (
        (None, False),
        (FP32, False),
        (BF16, False),
        (FP16, False),
        (FP32, True),
        (BF16, True),
        (FP16, True),
    ),
    "has_bias": (False, True),
    "scale": (1.0, -0.7, 2.5),
    "softcap": (None, 5.0, 30.0),
    "temperature": (1.0, 0.7),
    "has_target": (False, True),
    "has_coeffs": (False, True),
    "statistics": ((), *((name,) for name in TOKEN_STATISTICS), TOKEN_STATISTICS),
    "row_padding": (0, 3, 8),
    "offset": (0, 1),
}
CASES = pairwise_cases({"vocab": (1, 2, 63, 64, 65, 1000, 4001, 8191, 8193), "rows": (1, 3, 17), **OPTIONS})
LARGE_CASES = pairwise_cases({"vocab": (32000, 50257), "rows": (1, 3), **OPTIONS}, seed=1)[:12]
HUGE_CASES = [
    RowCase(128256, 5, in_place=True, d_dtype=BF16, statistics=TOKEN_STATISTICS, row_padding=3),
    RowCase(
        128256, 3, logits_dtype=BF16, d_dtype=BF16, in_place=True, has_target=True, has_bias=True, offset=1
    ),
    RowCase(128256, 2, d_dtype=FP16, has_coeffs=True, softcap=30.0, statistics=TOKEN_STATISTICS),
]
INTERPRETED_CASES = [
    *pairwise_cases({"vocab": (1, 2, 65, 1000, 4001), "rows": (1, 3), **OPTIONS}, seed=2),
    RowCase(40000, 2, in_place=True, d_dtype=FP16, softcap=30.0, statistics=TOKEN_STATISTICS, row_padding=3),
    RowCase(40000, 1, logits_dtype=BF16, d_dtype=BF16, in_place=True, has_target=True, has_bias=True),
]

ALL_CASES = [*CASES, *LARGE_CASES, *HUGE_CASES]
BACKENDS = [
    "reference",
    "cpu",
    *(
        [pytest.param("triton", marks=pytest.mark.gpu if HAS_GPU else ())]
        if HAS_GPU or IS_INTERPRETED
        else []
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """At least two, whatever the run is given: one thread has only one order to add in."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    row_kernel: RowKernel

    def run(self, case: RowCase, data: RowData, poison: float = float("nan")) -> RowResults:
        return run(self.row_kernel, case, data, self.device, poison)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name = request.param
    if IS_INTERPRETED and name == "triton" and HAS_GPU:
        pytest.skip("TRITON_INTERPRET=1 is set on a machine with a GPU")
    module = importlib.import_module(f"fastdpo.kernels.{name}")
    device = "cuda" if name == "cuda" or (name == "triton" and HAS_GPU) else "cpu"
    if reason := module.unavailable_reason(torch.device(device)):
        pytest.skip(f"{name}: {reason}")
    return Backend(name, device, module.row_kernel)


def assert_meets_contract(ours: RowResults, case: RowCase, data: RowData) -> None:
    truth, eager = dense_rows(case, data, torch.float64), dense_rows(case, data, torch.float32)
    for name, got in ours.statistics.items():
        want = truth.statistics[name]
        if name == "is_top1":
            assert torch.equal(got, want)
        elif name == "mean_logit":  # terms of both signs: a sum errs by their size, not by its own
            allowed = (4 * torch.finfo(FP32).eps * truth.statistics["mean_abs_logit"]).clamp(min=1e-5)
            close, same = (got - want).abs() <= allowed, (got == want) | (got.isnan() & want.isnan())
            assert close.where(want.isfinite(), same).all(), (name, got, want)
        else:
            assert_logps_close(got, want, FP32, name=name)
    assert (ours.d is None) == (case.d_dtype is None)
    if ours.d is not None:
        assert_close_to_fp64(ours.d, truth.d, _rounded(eager.d, case.d_dtype), name="D")


def _rounded(d: Tensor, dtype: torch.dtype) -> Tensor:
    """Eager's D in ``dtype``; truncated to bf16 where Triton's interpreter does that instead of rounding."""
    if IS_INTERPRETED and dtype == BF16:
        d = (d.view(torch.int32) & -(1 << 16)).view(FP32)
    return d.to(dtype)


def assert_same_bits(a: RowResults, b: RowResults, rows: Tensor | slice = slice(None)) -> None:
    for name, value in a.statistics.items():
        assert _bits(value[rows]) == _bits(b.statistics[name][rows]), name
    if a.d is not None:
        assert _bits(a.d[rows]) == _bits(b.d[rows]), "D"


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _cases(cases: list[RowCase]) -> list:
    return [pytest.param(case, id=str(case)) for case in (INTERPRETED_CASES if IS_INTERPRETED else cases)]


@pytest.mark.promise(13, 39, 46)
@pytest.mark.parametrize("case", _cases(ALL_CASES))
def test_values_guards_and_repeatability(backend: Backend, case: RowCase):
    data = make_data(case)
    results = backend.run(case, data)
    assert_meets_contract(results, case, data)
    assert_same_bits(results, backend.run(case, data, poison=0.0))


def _large_logits(logits: Tensor, labels: Tensor) -> None:
    logits[1::2] *= 1e4 / 3


def _common_offset(logits: Tensor, labels: Tensor) -> None:
    logits[1] += 1e4
    logits[2] -= 1e4


def _one_winner(logits: Tensor, labels: Tensor) -> None:
    """The label wins by far in row 1; another token does in row 2; a near tie of two in row 3."""
    logits[1, labels[1]] = 1e4
    logits[2, labels[2] - 1] = 1e4
    logits[3, labels[3]], logits[3, labels[3] - 1] = 1e4, 1e4 - 1


def _masked(first: float, last: float, is_label_masked: bool) -> Callable[[Tensor, Tensor], None]:
    """-inf over a share of the vocabulary wide enough to hold whole tiles, in all rows but row 0."""

    def change(logits: Tensor, labels: Tensor) -> None:
        vocab = logits.shape[1]
        start, end = int(first * vocab), int(last * vocab)
        logits[1:, start:end] = float("-inf")
        outside = 0 if start else vocab - 1
        labels[1:] = (start + end) // 2 if is_label_masked else outside

    return change


EXTREMES = {
    "large logits": _large_logits,
    "common offset": _common_offset,
    "one winner": _one_winner,
    **{
        f"{place} masked, label {'in' if inside else 'out of'} it": _masked(first, last, inside)
        for place, first, last in (("front", 0, 0.5), ("middle", 0.25, 0.75), ("end", 0.5, 1))
        for inside in (False, True)
    },
}


@pytest.mark.promise(4, 5)
@pytest.mark.parametrize("has_coeffs", [False, True], ids=["D", "coefficients"])
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("vocab", [70, 1000] if IS_INTERPRETED else [70, 20000, 70000])
def test_extremes(backend: Backend, vocab: int, name: str, has_coeffs: bool):
    case = RowCase(vocab, 5, has_coeffs=has_coeffs, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    EXTREMES[name](data.logits, data.labels)
    results = backend.run(case, data)
    assert_meets_contract(results, case, data)
    assert not (results.statistics["logps"] > 0).any()
    assert results.d.isfinite().all()


@pytest.mark.parametrize("has_coeffs", [False, True], ids=["D", "coefficients"])
@pytest.mark.parametrize("logits_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("vocab", [70, 1001] if IS_INTERPRETED else [70, 1001, 40000])
def test_the_labels_gradient_where_p_rounds_to_one(
    backend: Backend, vocab: int, logits_dtype: torch.dtype, has_coeffs: bool
):
    """The sum of the other probabilities, right to a relative error: 1 - p has no digits left there."""
    case = RowCase(
        vocab,
        len(MARGINS),
        logits_dtype,
        has_coeffs=has_coeffs,
        has_target=logits_dtype == BF16,
        temperature=0.7,
    )
    data = make_data(case)
    exact = data.logits.float()
    others = set_margins(exact, data.labels, spread=0.7)
    data.logits = exact.to(logits_dtype)
    if (
        data.target is not None
    ):  # of bf16 logits only the label's is exact, and the others as they are rounded
        exact = data.logits.float()
        others = set_margins(exact, data.labels, spread=0.7)
        data.target = exact.gather(1, data.labels[:, None])[:, 0]
    a = torch.ones(len(MARGINS))
    if data.coeffs is not None:
        data.coeffs = torch.stack((a, 0 * a, 0 * a))
    results = backend.run(case, data)
    got = results.d.gather(1, data.labels[:, None])[:, 0].double()
    # Exponents down to -66 are rounded to 2^-18 of an octave (2.6e-6), sums and exp2 add a few times 2^-24.
    assert ((got - others).abs() <= 1e-5 * others).all(), (got, others)


@pytest.mark.promise(21)
@pytest.mark.parametrize("logits_dtype", [FP32, BF16], ids=str)
def test_labels_out_of_range_give_nan_and_touch_nothing(backend: Backend, logits_dtype: torch.dtype):
    """Every run checks the guards around logits and D; the far labels would leave the process's memory."""
    case = RowCase(
        1000,
        6,
        logits_dtype,
        logits_dtype,
        True,
        has_target=logits_dtype == BF16,
        statistics=TOKEN_STATISTICS,
    )
    data = make_data(case)
    clean = backend.run(case, data)
    data.labels[1:5] = torch.tensor([-5, 1000 + 3, 1 << 40, -(1 << 62)])
    results = backend.run(case, data)
    assert_meets_contract(results, case, data)
    assert results.statistics["logps"].isnan().tolist() == [False, True, True, True, True, False]
    assert_same_bits(results, clean, torch.tensor([0, 5]))


@pytest.mark.promise(6)
@pytest.mark.parametrize("has_coeffs", [False, True], ids=["D", "coefficients"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_bad_row_stays_alone(backend: Backend, value: str, has_coeffs: bool):
    """A NaN, an infinity, or nothing but -inf: bad results in that row, the same bits in all others."""
    case = RowCase(4001, 4, d_dtype=BF16, in_place=True, has_coeffs=has_coeffs, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    clean = backend.run(case, data)
    data.logits[2, slice(None) if value == "-inf" else 1234] = float(value)
    results = backend.run(case, data)
    assert_same_bits(results, clean, torch.tensor([0, 1, 3]))
    if value == "inf":  # inf - inf is NaN; what of the row is 0 * inf is left to the backend
        assert not results.statistics["logps"][2].isfinite() and not results.d[2].isfinite().all()
    else:
        assert results.statistics["logps"][2].isnan() and results.d[2].isnan().all()


@pytest.mark.parametrize("vocab", [65, 1000] if IS_INTERPRETED else [65, 4001, 50257, 128256])
def test_a_row_has_the_same_bits_in_every_chunk(backend: Backend, vocab: int):
    """Sums depend on V and the backend alone: not on the rows beside it, its place, or alignment."""
    case = RowCase(vocab, 7, d_dtype=BF16, has_coeffs=True, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    whole = backend.run(case, data)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 7)):
        part = RowData(data.logits[rows], data.labels[rows], None, None, data.coeffs[:, rows].contiguous())
        moved = replace(case, rows=len(part.labels), row_padding=5, offset=1)
        expected = RowResults({name: value[rows] for name, value in whole.statistics.items()}, whole.d[rows])
        assert_same_bits(backend.run(moved, part), expected)


@pytest.mark.parametrize("logits_dtype", [FP32, BF16], ids=str)
def test_asking_for_more_changes_no_bit_of_the_log_probabilities(backend: Backend, logits_dtype: torch.dtype):
    """The modes differ in what they ask a kernel for, and must agree on logps and lse."""
    case = RowCase(4001, 3, logits_dtype, d_dtype=None, has_bias=True, softcap=30.0)
    more = replace(case, d_dtype=BF16, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    alone = backend.run(case, data)
    for asked in (more, replace(more, in_place=True), replace(more, has_coeffs=True)):
        assert_same_bits(alone, backend.run(asked, replace(data, coeffs=make_data(asked).coeffs)))


def test_no_rows(backend: Backend):
    case = RowCase(65, 0, has_coeffs=True, statistics=TOKEN_STATISTICS)
    backend.run(case, make_data(case))


@pytest.mark.skipif(IS_INTERPRETED or HAS_GPU, reason="Triton runs in this process")
@pytest.mark.slow
def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__, at_least=len(INTERPRETED_CASES) + 1, chosen="triton")
