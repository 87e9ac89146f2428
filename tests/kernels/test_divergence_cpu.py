"""What is special to the C++ divergence kernel; the contract is tested for every backend in
``test_divergence_kernels.py``."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastdpo.kernels import divergence, divergence_cpu
from fastdpo.kernels.contract import LogitTransform
from fastdpo.kernels.divergence import DivergenceOutputs
from fastdpo.testing import assert_close_to_fp64
from tests.kernels.divergence_cases import EVERYTHING, DivergenceCase, in_dtype, make_data, run

EPS = torch.finfo(torch.float32).eps
FP32, BF16 = torch.float32, torch.bfloat16
UNAVAILABLE = divergence_cpu.unavailable_reason()

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.999])
def test_jsd_of_near_and_far_distributions(beta: float) -> None:
    """What is added up is of the size of delta, so the sum is good to a few ulp of that: an expm1 or a log1p
    that loses x beside 1 would be off by eps itself."""
    delta = torch.logspace(-7, 2, 4001)
    logits = torch.stack([torch.zeros_like(delta), delta], 1)
    teacher = torch.zeros_like(logits)

    def kernel(module: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        jsd, d = torch.empty(len(delta), dtype=dtype), torch.empty_like(logits, dtype=dtype)
        module.divergence_kernel(
            logits.to(dtype, copy=True),
            (teacher.to(dtype, copy=True),),
            torch.zeros(len(delta), dtype=torch.int64),
            (LogitTransform(), LogitTransform()),
            DivergenceOutputs(jsd=jsd),
            jsd_beta=beta,
            d_out=d,
        )
        return jsd, d

    jsd, d = kernel(divergence_cpu, FP32)
    truth, d_truth = kernel(divergence, torch.float64)
    assert ((jsd - truth).abs() <= 4 * EPS * delta.clamp(max=1.0)).all()
    assert ((d - d_truth).abs() <= 4 * EPS * delta[:, None].clamp(max=1.0)).all()


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("names", [("forward_kl",), ("reverse_kl",), ("jsd",), EVERYTHING], ids=str)
def test_sorted_logits(order: str, names: tuple[str, ...]) -> None:
    """Rising ones move the maximum, and so everything summed and kept so far, at every block; of the teacher
    alone the other way around. A constant of the row changes nothing."""
    case = DivergenceCase(9000, names, 2, has_coeffs=names == EVERYTHING)
    data = make_data(case)
    for products, is_falling in zip(data.products, (order == "falling", order == "rising"), strict=True):
        products[0] = products[0].sort(descending=is_falling).values
        products[1] = products[1].sort(descending=order == "falling").values
    ours, truth = run(divergence_cpu.divergence_kernel, case, data), in_dtype(case, data, torch.float64)
    eager = in_dtype(case, data, FP32)
    for name, got in ours.values.items():
        assert ((got - truth.values[name]).abs() <= 1e-5 + 1e-6 * truth.values[name].abs()).all(), name
    assert ours.d is not None and truth.d is not None and eager.d is not None
    assert_close_to_fp64(ours.d, truth.d, eager.d, name="D")


@pytest.mark.parametrize("names", [("forward_kl",), ("reverse_kl",), ("jsd",), EVERYTHING], ids=str)
@pytest.mark.parametrize("masked_in", [(0, 1), (1,)], ids=["both", "teacher"])
def test_masked_blocks_before_very_low_logits(names: tuple[str, ...], masked_in: tuple[int, ...]) -> None:
    """The first blocks have no maximum; what is made relative to the one that comes must stay 0."""
    case = DivergenceCase(5000, names, 2, has_coeffs=names == EVERYTHING)
    data = make_data(case)
    for i, products in enumerate(data.products):
        products -= 2048.0
        if i in masked_in:
            products[:, :3000] = float("-inf")
    data.labels[:] = torch.tensor([3001, 4999])
    ours, truth = run(divergence_cpu.divergence_kernel, case, data), in_dtype(case, data, torch.float64)
    for name, got in ours.values.items():
        want = truth.values[name]
        is_close = (got - want).abs() <= 1e-5 + 1e-6 * want.abs()
        assert (is_close | (got.double() == want)).all(), (name, got, want)
    assert ours.d is not None and truth.d is not None
    finite = truth.d.isfinite()
    assert torch.equal(ours.d.isfinite(), finite)
    assert ((ours.d - truth.d).abs()[finite] <= 1e-6).all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_teachers", [1, 2])
def test_the_number_of_threads_changes_no_bit(num_teachers: int) -> None:
    case = DivergenceCase(5000, EVERYTHING, 7, num_teachers=num_teachers, has_coeffs=True, has_logps_d=True)
    data = make_data(case)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(divergence_cpu.divergence_kernel, case, data))
    for other in results[1:]:
        assert all(torch.equal(results[0].values[name], other.values[name]) for name in EVERYTHING)
        for name in ("d", "logps_d"):
            assert torch.equal(getattr(results[0], name), getattr(other, name))


def test_rows_beyond_2_31_bytes() -> None:
    """Memory that is never touched costs nothing, so rows may lie 8 GiB apart."""
    stride = (1 << 31) + 64
    try:
        memory = torch.frombuffer(mmap.mmap(-1, 4 * (stride + 128)), dtype=FP32)
    except OSError as error:
        pytest.skip(f"no address space for 8 GiB: {error}")
    logits, teacher = torch.randn(2, 100), torch.randn(2, 100)
    results = []
    for policy in (memory.as_strided((2, 100), (stride, 1)), torch.empty(2, 100)):
        policy.copy_(logits)
        kl = torch.empty(2)
        divergence_cpu.divergence_kernel(
            **_chunk(
                logits=policy,
                teachers=(teacher.clone(),),
                labels=torch.zeros(2, dtype=torch.int64),
                outputs=DivergenceOutputs(forward_kl=kl),
                d_out=policy,
            )
        )
        results.append((kl, policy.clone()))
    assert all(map(torch.equal, *results))


def _chunk(**changes: Any) -> dict[str, Any]:
    """Arguments of a legal call on 3 rows of 8 logits, with changes."""
    chunk: dict[str, Any] = {
        "logits": torch.randn(3, 8),
        "teachers": (torch.randn(3, 8),),
        "labels": torch.zeros(3, dtype=torch.int64),
        "transforms": (LogitTransform(), LogitTransform()),
        "outputs": DivergenceOutputs(forward_kl=torch.empty(3)),
    }
    return chunk | changes


def _two(**changes: Any) -> dict[str, Any]:
    chunk = _chunk(
        teachers=(torch.randn(3, 8), torch.randn(3, 8)),
        transforms=(LogitTransform(),) * 3,
        coefficients=torch.ones(2, 3),
    )
    return chunk | changes


IN_PLACE, D = torch.randn(3, 8), torch.empty(3, 8)
OVER_OTHER_ROWS = IN_PLACE.view(BF16).view(-1)[:24].view(3, 8)
BAD_CHUNKS = {
    "fp64 logits": ("logits", _chunk(logits=torch.randn(3, 8).double())),
    "bf16 logits": ("logits", _chunk(logits=torch.randn(3, 8).bfloat16())),
    "rows not contiguous": ("logits", _chunk(logits=torch.randn(8, 3).T)),
    "no teacher": ("teachers", _chunk(teachers=())),
    "three teachers": ("teachers", _two(teachers=(torch.randn(3, 8),) * 3)),
    "bf16 teacher": ("teachers[0]", _chunk(teachers=(torch.randn(3, 8).bfloat16(),))),
    "short teacher": ("teachers[0]", _chunk(teachers=(torch.randn(3, 7),))),
    "second teacher of fewer rows": ("teachers[1]", _two(teachers=(torch.randn(3, 8), torch.randn(2, 8)))),
    "int32 labels": ("labels", _chunk(labels=torch.zeros(3, dtype=torch.int32))),
    "one transform": ("transforms", _chunk(transforms=(LogitTransform(),))),
    "short bias": (
        "bias of teachers[0]",
        _chunk(transforms=(LogitTransform(), LogitTransform(bias=torch.zeros(7)))),
    ),
    "fp64 output": ("forward_kl", _chunk(outputs=DivergenceOutputs(forward_kl=torch.empty(3).double()))),
    "strided output": ("jsd", _chunk(outputs=DivergenceOutputs(jsd=torch.empty(6)[::2]))),
    "beta of 1": ("jsd_beta", _chunk(outputs=DivergenceOutputs(jsd=torch.empty(3)), jsd_beta=1.0)),
    "two teachers without coefficients": ("coefficients", _two(coefficients=None)),
    "coefficients of one teacher": ("coefficients", _chunk(coefficients=torch.ones(2, 3))),
    "coefficients apart": ("coefficients", _two(coefficients=torch.ones(2, 6)[:, :3])),
    "slopes of one teacher": ("slopes", _chunk(slopes=(0.5, 0.0))),
    "distance of one teacher": (
        "l1_distance",
        _chunk(outputs=DivergenceOutputs(l1_distance=torch.empty(3))),
    ),
    "small D": ("d_out", _chunk(d_out=torch.empty(3, 7))),
    "fp64 D": ("d_out", _chunk(d_out=torch.empty(3, 8).double())),
    "D over other rows": ("d_out", _chunk(logits=IN_PLACE, d_out=OVER_OTHER_ROWS)),
    "D over the teacher's other rows": ("d_out", _chunk(teachers=(IN_PLACE,), d_out=OVER_OTHER_ROWS)),
    "second D over other rows": (
        "logps_d_out",
        _chunk(logits=IN_PLACE, d_out=torch.empty(3, 8), logps_d_out=OVER_OTHER_ROWS),
    ),
    "both D in one place": ("logps_d_out", _chunk(d_out=D, logps_d_out=D)),
    "second D alone": ("logps_d_out", _chunk(logps_d_out=torch.empty(3, 8))),
    "D of two divergences": (
        "d_out",
        _chunk(outputs=DivergenceOutputs(torch.empty(3), torch.empty(3)), d_out=torch.empty(3, 8)),
    ),
    "gradients' coefficients without D": ("grad_coeffs", _chunk(grad_coeffs=torch.zeros(4, 3))),
    "gradients' coefficients of another shape": (
        "grad_coeffs",
        _chunk(grad_coeffs=torch.zeros(3, 3), d_out=torch.empty(3, 8)),
    ),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_what_the_kernel_cannot_take_is_refused(name: str) -> None:
    argument, chunk = BAD_CHUNKS[name]
    with pytest.raises(ValueError) as error:
        divergence_cpu.divergence_kernel(**chunk)
    assert str(error.value).startswith(f"{argument}: ")


def test_legal_chunks_are_taken() -> None:
    divergence_cpu.divergence_kernel(**_chunk())
    divergence_cpu.divergence_kernel(**_two())


def test_another_device_is_refused() -> None:
    assert "got cuda" in str(divergence_cpu.unavailable_reason(torch.device("cuda")))
    with pytest.raises(RuntimeError, match="got meta"):
        divergence_cpu.divergence_kernel(**_chunk(logits=torch.empty(3, 8, device="meta")))
