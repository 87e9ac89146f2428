"""Every backend of the divergence kernel against ``DivergenceKernel`` of ``fastdpo/kernels/divergence.py``.

Triton's as in ``test_rows.py``: on a GPU where there is one, elsewhere interpreted, in a process of its own.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastdpo.definitions.logprob import combined_logits, divergences_reference
from fastdpo.kernels.divergence import DivergenceKernel
from fastdpo.testing import assert_close_to_fp64, assert_logps_close
from fastdpo.types import TeacherCombination
from tests.kernels.divergence_cases import (
    BF16,
    EVERYTHING,
    FP16,
    FP32,
    FP64,
    HEADS,
    DivergenceCase,
    DivergenceData,
    DivergenceResults,
    in_dtype,
    make_data,
    pick,
    run,
)
from tests.kernels.row_cases import MARGINS, set_margins
from tests.kernels.test_rows import _rounded
from tests.kernels.triton_processes import run_interpreted

HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TDPO, DISTILLED = ("forward_kl", "logps", "ref_logps"), ("reverse_kl", "logps", "l1_distance")

WHERE = (
    (1000, FP32, True), (65, BF16, False), (4001, BF16, True), (2, FP16, True), (8193, FP32, False)
)  # fmt: skip
CASES = [
    # Every divergence of every kind of head, with D apart and in its place.
    *(
        DivergenceCase(vocab, (name,), heads=heads, d_dtype=dtype, in_place=in_place)
        for (name, heads), (vocab, dtype, in_place) in zip(
            itertools.product(("forward_kl", "reverse_kl", "jsd"), HEADS),
            itertools.cycle(WHERE),
            strict=False,
        )
    ),
    *(
        DivergenceCase(vocab, TDPO, rows, "capped", d_dtype=None)
        for vocab, rows in ((1, 1), (63, 17), (4001, 3))
    ),
    *(
        DivergenceCase(
            vocab, TDPO, heads=heads, d_dtype=BF16, in_place=in_place, has_logps_d=True, row_padding=3
        )
        for vocab, heads, in_place in ((1000, "biased", True), (4001, "scaled", False), (65, "plain", True))
    ),
    *(
        DivergenceCase(vocab, EVERYTHING, heads=heads, d_dtype=FP32, in_place=True, has_coeffs=True, offset=1)
        for vocab, heads in ((1000, "capped"), (64, "biased"), (4001, "plain"))
    ),
    *(
        DivergenceCase(vocab, DISTILLED, heads=heads, num_teachers=2, d_dtype=BF16, in_place=True)
        for vocab, heads in ((1000, "plain"), (4001, "biased"), (65, "capped"), (2, "scaled"))
    ),
    DivergenceCase(1000, ("reverse_kl", "ref_logps"), num_teachers=2, has_slopes=False, d_dtype=FP16),
    DivergenceCase(
        4001, (*EVERYTHING, "l1_distance"), heads="biased", num_teachers=2, has_coeffs=True, row_padding=8
    ),
    DivergenceCase(50257, DISTILLED, 2, "capped", 2, d_dtype=BF16, in_place=True),
    DivergenceCase(128256, TDPO, 2, d_dtype=BF16, in_place=True, has_logps_d=True),
    DivergenceCase(128256, EVERYTHING, 2, "capped", d_dtype=BF16, has_coeffs=True),
]  # fmt: skip
INTERPRETED_CASES = pick(CASES, largest=4001)
BACKENDS = [
    "reference",
    "cpu",
    *(
        [pytest.param("triton", marks=pytest.mark.gpu if HAS_GPU else ())]
        if HAS_GPU or IS_INTERPRETED
        else []
    ),
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
    kernel: DivergenceKernel

    def run(
        self, case: DivergenceCase, data: DivergenceData, poison: float = float("nan")
    ) -> DivergenceResults:
        return run(self.kernel, case, data, self.device, poison)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name = request.param
    if name == "reference":
        module = importlib.import_module("fastdpo.kernels.divergence")
        return Backend(name, "cpu", module.divergence_kernel)
    if IS_INTERPRETED and HAS_GPU:
        pytest.skip("TRITON_INTERPRET=1 is set on a machine with a GPU")
    module = importlib.import_module(f"fastdpo.kernels.divergence_{name}")
    device = "cuda" if name == "triton" and HAS_GPU else "cpu"
    if reason := module.unavailable_reason(torch.device(device)):
        pytest.skip(f"{name}: {reason}")
    return Backend(name, device, module.divergence_kernel)


def assert_meets_contract(ours: DivergenceResults, case: DivergenceCase, data: DivergenceData) -> None:
    truth, eager = in_dtype(case, data, FP64), in_dtype(case, data, FP32)
    # A combination of two multiplies the logits' errors by its coefficients, up to 5 here.
    factor = 5.0 if case.num_teachers == 2 else 1.0
    for name, got in ours.values.items():
        assert_logps_close(got / factor, truth.values[name] / factor, FP32, name=name)
    for name in ("d", "logps_d"):
        got, want, plain = (getattr(results, name) for results in (ours, truth, eager))
        assert (got is None) == (want is None)
        if got is not None:
            assert_close_to_fp64(got, want, _rounded(plain, case.d_dtype), name=name)  # type: ignore[arg-type]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def assert_same_bits(a: DivergenceResults, b: DivergenceResults, rows: Tensor | slice = slice(None)) -> None:
    for name in a.values.keys() & b.values.keys():
        assert bits(a.values[name][rows]) == bits(b.values[name][rows]), name
    for name in ("d", "logps_d"):
        ours, other = getattr(a, name), getattr(b, name)
        if ours is not None and other is not None and ours.dtype == other.dtype:
            assert bits(ours[rows]) == bits(other[rows]), name


def _cases() -> list[DivergenceCase]:
    return INTERPRETED_CASES if IS_INTERPRETED else CASES


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_values_guards_and_repeatability(backend: Backend, case: DivergenceCase) -> None:
    data = make_data(case)
    results = backend.run(case, data)
    assert_meets_contract(results, case, data)
    assert_same_bits(results, backend.run(case, data, poison=0.0))


@pytest.mark.parametrize("case", [case for case in CASES if case.vocab < 10000 and case.rows > 1], ids=str)
def test_the_truth_is_the_definition(case: DivergenceCase) -> None:
    """Plain torch's kernel in fp64, by autograd of the definitions."""
    if IS_INTERPRETED:
        pytest.skip("nothing of Triton's")
    data = make_data(case)
    truth = in_dtype(case, data, FP64)
    logits = []
    for products, transform in zip(data.products, data.transforms, strict=True):
        x = products.double().requires_grad_()
        z = transform.scale * (x if transform.bias is None else x + transform.bias.double())
        if transform.softcap is not None:
            z = transform.softcap * torch.tanh(z / transform.softcap)
        logits.append((x, z / transform.temperature))
    (x, z), *teachers = logits
    teacher, distance = teachers[0][1], None
    if data.coefficients is not None:
        a, b = data.coefficients.double()
        mix = TeacherCombination(a, b, *data.slopes)
        teacher, distance = combined_logits(teachers[0][1], teachers[1][1], mix)
    found = divergences_reference(z, teacher.detach(), jsd_beta=0.3)
    pick_label = data.labels[:, None]
    log_p, log_q = (each.log_softmax(-1).gather(1, pick_label)[:, 0] for each in (z, teacher))
    wanted = {**found._asdict(), "logps": log_p, "ref_logps": log_q, "l1_distance": distance}
    for name, got in truth.values.items():
        torch.testing.assert_close(got, wanted[name].detach(), rtol=1e-9, atol=1e-11)
    if truth.d is None:
        return
    made = [name for name in ("forward_kl", "reverse_kl", "jsd", "logps") if name in case.outputs]
    if data.grad_coeffs is not None:
        order = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "logps": 3}
        total = sum((wanted[name] * data.grad_coeffs[order[name]].double()).sum() for name in made)
    else:
        total = wanted[made[0]].sum()
    scale = data.transforms[0].grad_scale
    (dx,) = torch.autograd.grad(total, x, retain_graph=True)
    torch.testing.assert_close(truth.d, dx / scale, rtol=1e-8, atol=1e-11)
    if truth.logps_d is not None:
        (dx,) = torch.autograd.grad(log_p.sum(), x)
        torch.testing.assert_close(truth.logps_d, dx / scale, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("outputs", [("forward_kl",), ("reverse_kl",), ("jsd",), TDPO], ids=str)
def test_equal_streams_give_exactly_0(backend: Backend, outputs: tuple[str, ...]) -> None:
    case = DivergenceCase(1000, outputs, heads="plain", has_logps_d="logps" in outputs)
    data = make_data(case)
    data.products[1].copy_(data.products[0])
    results = backend.run(case, data)
    assert results.d is not None
    assert not results.values[outputs[0]].any() and not results.d.any()
    if "logps" in outputs:
        assert bits(results.values["logps"]) == bits(results.values["ref_logps"])


@pytest.mark.parametrize("heads", ["plain", "capped"])
def test_equal_teachers_are_exactly_0_apart(backend: Backend, heads: str) -> None:
    case = DivergenceCase(1000, DISTILLED, heads=heads, num_teachers=2)
    data = make_data(case)
    data.products[2].copy_(data.products[1])
    data = replace(data, transforms=(data.transforms[0], data.transforms[1], data.transforms[1]))
    assert not backend.run(case, data).values["l1_distance"].any()


def _large(products: tuple[Tensor, ...]) -> None:
    for rows in products:
        rows[1:] *= 1e4 / 3


def _offset(products: tuple[Tensor, ...]) -> None:
    products[0][1] += 1e4
    products[1][2] -= 1e4


def _masked(products: tuple[Tensor, ...]) -> None:
    """Half of the vocabulary from every head, a wide stretch of it and the end; labels lie outside."""
    for rows in products:
        rows[1:, 100 : len(rows[0]) // 2] = float("-inf")
        rows[1:, -7:] = float("-inf")


def _masked_by_the_teachers(products: tuple[Tensor, ...]) -> None:
    for i, rows in enumerate(products[1:]):
        rows[1:, 100 * (i + 1) :: 3] = float("-inf")


EXTREMES: dict[str, Callable[[tuple[Tensor, ...]], None]] = {
    "large": _large,
    "offset": _offset,
    "masked": _masked,
    "masked by the teachers": _masked_by_the_teachers,
}


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("outputs", [TDPO, ("reverse_kl", "ref_logps"), ("jsd", "logps")], ids=str)
def test_extremes(backend: Backend, outputs: tuple[str, ...], name: str, num_teachers: int) -> None:
    """Finite where the definition is, infinite where that is, of the same sign; the same D."""
    case = DivergenceCase(3000, outputs, 5, num_teachers=num_teachers, has_slopes=False)
    data = make_data(case)
    data.labels[:] = torch.tensor([0, 50, 1, 2, 51])
    EXTREMES[name](data.products)
    ours, truth = backend.run(case, data), in_dtype(case, data, FP64)
    eager = in_dtype(case, data, FP32)
    for key, got in ours.values.items():
        want = truth.values[key]
        # Beyond some 100 nats fp32 logits are apart by more than the limit: to the spacing of the largest.
        size = max(float(each[each.isfinite()].abs().max()) for each in data.products)
        limit = max(1e-5, 8 * num_teachers * size * torch.finfo(FP32).eps)
        is_close = (got.double() - want).abs() <= limit + 1e-6 * want.abs()
        assert (is_close | (got.double() == want) | (got.isnan() & want.isnan())).all(), (key, got, want)
    assert ours.d is not None and truth.d is not None and eager.d is not None
    finite = truth.d.isfinite().all(1)
    assert torch.equal(ours.d.isfinite().all(1), finite)
    if name != "large":  # D of one-hot distributions hangs on the last bits of logits of 1e4
        assert_close_to_fp64(ours.d[finite], truth.d[finite], eager.d[finite], name="D")


@pytest.mark.parametrize("has_coeffs", [False, True], ids=["apart", "combined"])
def test_the_labels_gradient_where_p_rounds_to_one(backend: Backend, has_coeffs: bool) -> None:
    """The sum of the other probabilities, right to a relative error: 1 - p has no digits left there."""
    rows = len(MARGINS)
    case = DivergenceCase(1001, TDPO, rows, has_logps_d=not has_coeffs, has_coeffs=has_coeffs)
    data = make_data(case)
    others = set_margins(data.products[0], data.labels)
    if has_coeffs:
        data.grad_coeffs = torch.tensor([[0.0], [0.0], [0.0], [-1.0]]).expand(4, rows).contiguous()
    results = backend.run(case, data)
    d = -results.d if has_coeffs else results.logps_d  # type: ignore[operator]
    assert d is not None
    got = d.gather(1, data.labels[:, None])[:, 0].double()
    assert ((got - others).abs() <= 1e-5 * others).all(), (got, others)


def test_labels_out_of_range_give_nan_and_touch_nothing(backend: Backend) -> None:
    case = DivergenceCase(1000, TDPO, 6, d_dtype=BF16, in_place=True, has_logps_d=True)
    data = make_data(case)
    clean = backend.run(case, data)
    data.labels[1:5] = torch.tensor([-5, 1000 + 3, 1 << 40, -(1 << 62)])
    results = backend.run(case, data)
    for name in ("logps", "ref_logps"):
        assert results.values[name].isnan().tolist() == [False, True, True, True, True, False]
    assert torch.equal(results.values["forward_kl"], clean.values["forward_kl"])
    assert_same_bits(results, clean, torch.tensor([0, 5]))
    assert results.d is not None and clean.d is not None and torch.equal(results.d, clean.d)
    assert results.logps_d is not None and results.logps_d.isfinite().all()


@pytest.mark.parametrize("of", [0, 1], ids=["policy", "teacher"])
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_bad_row_stays_alone(backend: Backend, value: str, of: int) -> None:
    """A NaN, or nothing but -inf: bad results in that row, the same bits in all others."""
    case = DivergenceCase(4001, ("reverse_kl", "jsd"), 4, has_coeffs=True, d_dtype=BF16, in_place=True)
    data = make_data(case)
    clean = backend.run(case, data)
    data.products[of][2, slice(None) if value == "-inf" else 1234] = float(value)
    results = backend.run(case, data)
    assert_same_bits(results, clean, torch.tensor([0, 1, 3]))
    assert results.values["reverse_kl"][2].isnan() and results.values["jsd"][2].isnan()


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("vocab", [65, 1000, 4001])
def test_a_row_has_the_same_bits_in_every_chunk(backend: Backend, vocab: int, num_teachers: int) -> None:
    """Sums depend on V and the backend alone: not on the rows beside it, or its place."""
    outputs = EVERYTHING if num_teachers == 1 else (*EVERYTHING, "l1_distance")
    case = DivergenceCase(vocab, outputs, 7, "capped", num_teachers, BF16, has_coeffs=True)
    data = make_data(case)
    whole = backend.run(case, data)
    assert whole.d is not None
    for part in (slice(0, 1), slice(1, 3), slice(3, 7)):
        moved = replace(case, rows=part.stop - part.start, row_padding=64 - vocab % 64)
        expected = DivergenceResults(
            {name: value[part] for name, value in whole.values.items()}, whole.d[part], None
        )
        assert_same_bits(backend.run(moved, data.rows(part)), expected)


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_asking_for_more_changes_no_bit(backend: Backend, name: str, num_teachers: int) -> None:
    """The modes differ in what they ask a kernel for, and must agree."""
    rows = 1 if IS_INTERPRETED else 3
    case = DivergenceCase(4001, (name,), rows, "capped", num_teachers, d_dtype=None)
    data = make_data(case)
    alone = backend.run(case, data)
    more = replace(case, outputs=(name, "logps", "ref_logps"), d_dtype=BF16)
    for asked in (
        more,
        replace(more, in_place=True, has_logps_d=True),
        replace(more, has_coeffs=True),
        replace(more, outputs=EVERYTHING, has_coeffs=True),
    ):
        coeffs = make_data(asked).grad_coeffs
        assert_same_bits(alone, backend.run(asked, replace(data, grad_coeffs=coeffs)))


def test_no_rows(backend: Backend) -> None:
    case = DivergenceCase(65, EVERYTHING, 0, has_coeffs=True)
    backend.run(case, make_data(case))


@pytest.mark.skipif(IS_INTERPRETED or HAS_GPU, reason="Triton runs in this process")
@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(__file__, at_least=len(INTERPRETED_CASES) + 1, chosen="triton")
