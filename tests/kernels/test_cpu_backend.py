"""What is special to the C++ row kernel; the contract itself is tested for every backend in test_rows.py."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.kernels import cpu
from fastdpo.kernels.contract import LogitTransform, RowOutputs

EPS = torch.finfo(torch.float32).eps
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))


def run(
    logits: Tensor, labels: Tensor | None = None, transform: LogitTransform | None = None, **options: Any
) -> RowOutputs:
    """The kernel on a copy of ``logits``; all outputs."""
    rows = len(logits)
    outputs = RowOutputs(*(torch.empty(rows) for _ in range(5)), torch.empty(rows, dtype=torch.bool))
    labels = torch.zeros(rows, dtype=torch.int64) if labels is None else labels
    cpu.row_kernel(logits.clone(), labels, transform or LogitTransform(), outputs, **options)
    return outputs


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.promise(1)
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_log_probabilities_of_the_largest_vocabulary_are_exact_to_1e_5(order: str):
    """Rising logits move the maximum, and so everything summed so far, at every block."""
    logits = 4 * torch.randn(4, 262208)
    if order != "random":
        logits = logits.sort(dim=1, descending=order == "falling").values
    labels = torch.tensor([0, 1, 131072, 262207])
    truth = torch.log_softmax(logits.double(), 1)
    outputs = run(logits, labels)
    assert (outputs.logps - truth.gather(1, labels[:, None])[:, 0]).abs().max() < 1e-5
    entropy = -(truth.exp() * truth).sum(1)
    assert outputs.entropy is not None and (outputs.entropy - entropy).abs().max() < 1e-5


def test_exp_is_good_to_a_few_ulp_and_0_where_it_underflows():
    """Column 0 is the maximum and holds nearly all the probability, so -D of the rest is exp of the rest."""
    offsets = torch.cat([torch.linspace(-86, -20, 100_000), torch.tensor([-88.5, -1e4, -torch.inf])])
    d = torch.empty(1, len(offsets) + 1)
    run(torch.cat([torch.zeros(1), offsets])[None], d_out=d)
    truth = offsets.double().exp() / (1 + offsets.double().exp().sum())
    assert (-d[0, 1:-3] / truth[:-3] - 1).abs().max() < 4 * EPS
    assert (d[0, -3:] == 0).all()


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_softcap_is_good_to_a_few_ulp(cap: float):
    """With a vocabulary of one token lse is the logit itself."""
    x = torch.cat([torch.logspace(-30, 3, 20_001), torch.linspace(0, 2, 20_001), torch.tensor([torch.inf])])
    x = torch.cat([x, -x, torch.tensor([torch.nan])])[:, None]
    lse = run(x, transform=LogitTransform(softcap=cap)).lse
    truth = cap * torch.tanh(x[:, 0].double() / cap)
    assert ((lse - truth).abs() <= 4 * EPS * truth.abs())[:-1].all()
    assert lse[-1].isnan()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_d_is_rounded_as_torch_rounds(dtype: torch.dtype):
    """Halves to even, subnormal numbers, overflow, infinities and NaN; the coefficients carry the values."""
    bits = torch.arange(0, 1 << 32, 65521, dtype=torch.int64).to(torch.int32)  # all exponents and signs
    ties = (torch.arange(1 << 16) << 16) + (1 << 15)
    half_ties = (torch.arange(1 << 18) << 13) + (1 << 12) + (112 << 23)
    values = torch.cat([bits, ties.to(torch.int32), half_ties.to(torch.int32)]).view(FP32)
    rows = len(values)
    coeffs = torch.stack([values, values, torch.zeros(rows)])  # with p = 1, a (1 - p) + b p = a
    wide, narrow = torch.empty(rows, 1), torch.empty(rows, 1, dtype=dtype)
    run(torch.zeros(rows, 1), d_out=wide, grad_coeffs=coeffs)
    run(torch.zeros(rows, 1), d_out=narrow, grad_coeffs=coeffs)
    finite = values.isfinite()
    assert torch.equal(wide[finite, 0], values[finite])
    want = wide.to(dtype)
    is_nan = want.isnan()
    assert torch.equal(narrow.isnan(), is_nan)
    assert torch.equal(narrow[~is_nan].view(torch.int16), want[~is_nan].view(torch.int16))


@pytest.mark.promise(39)
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit():
    logits, labels = torch.randn(7, 5000), torch.arange(7)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        d = torch.empty(7, 5000)
        results.append([*run(logits, labels, d_out=d), d])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.promise(14)
def test_rows_beyond_2_31_elements():
    """Memory that is never touched costs nothing, so rows may lie 4 GiB apart."""
    stride = (1 << 31) + 64
    try:
        memory = torch.frombuffer(mmap.mmap(-1, 2 * (stride + 128)), dtype=BF16)
    except OSError as error:
        pytest.skip(f"no address space for 4 GiB: {error}")
    logits = memory.as_strided((2, 100), (stride, 1))
    logits.copy_(torch.randn(2, 100))
    d = torch.empty(2, 100)
    apart = RowOutputs(torch.empty(2), torch.empty(2))
    together = run(logits.contiguous(), d_out=d)
    cpu.row_kernel(logits, torch.zeros(2, dtype=torch.int64), LogitTransform(), apart, d_out=logits)
    assert torch.equal(apart.logps, together.logps)
    assert torch.equal(logits, d.to(BF16))


def _chunk(**changes: Any) -> dict[str, Any]:
    """Arguments of a legal call on 3 rows of 8 logits, with changes."""
    chunk: dict[str, Any] = {
        "logits": torch.randn(3, 8),
        "labels": torch.zeros(3, dtype=torch.int64),
        "transform": LogitTransform(),
        "outputs": RowOutputs(torch.empty(3), torch.empty(3)),
    }
    return chunk | changes


IN_PLACE = torch.randn(3, 8)
BAD_CHUNKS = {
    "fp64 logits": ("logits", _chunk(logits=torch.randn(3, 8).double())),
    "fp16 logits": ("logits", _chunk(logits=torch.randn(3, 8).half())),
    "rows not contiguous": ("logits", _chunk(logits=torch.randn(8, 3).T)),
    "overlapping rows": ("logits", _chunk(logits=torch.randn(20).as_strided((3, 8), (4, 1)))),
    "int32 labels": ("labels", _chunk(labels=torch.zeros(3, dtype=torch.int32))),
    "too few labels": ("labels", _chunk(labels=torch.zeros(2, dtype=torch.int64))),
    "bf16 bias": ("bias", _chunk(transform=LogitTransform(bias=torch.zeros(8, dtype=BF16)))),
    "short bias": ("bias", _chunk(transform=LogitTransform(bias=torch.zeros(7)))),
    "fp64 output": ("logps", _chunk(outputs=RowOutputs(torch.empty(3).double(), torch.empty(3)))),
    "strided output": ("lse", _chunk(outputs=RowOutputs(torch.empty(3), torch.empty(6)[::2]))),
    "float is_top1": (
        "is_top1",
        _chunk(outputs=RowOutputs(torch.empty(3), torch.empty(3), is_top1=torch.empty(3))),
    ),
    "target with fp32 logits": ("target_logits", _chunk(target_logits=torch.zeros(3))),
    "small D": ("d_out", _chunk(d_out=torch.empty(3, 7))),
    "fp64 D": ("d_out", _chunk(d_out=torch.empty(3, 8).double())),
    "D over other rows": (
        "d_out",
        _chunk(logits=IN_PLACE, d_out=IN_PLACE.view(BF16).view(-1)[:24].view(3, 8)),
    ),
    "coefficients without D": ("grad_coeffs", _chunk(grad_coeffs=torch.zeros(3, 3))),
    "coefficients of another shape": (
        "grad_coeffs",
        _chunk(grad_coeffs=torch.zeros(3, 2), d_out=torch.empty(3, 8)),
    ),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_memory_the_kernel_cannot_take_is_refused(name: str):
    argument, chunk = BAD_CHUNKS[name]
    with pytest.raises(ValueError, match=f"^{argument}: "):
        cpu.row_kernel(**chunk)


def test_a_legal_chunk_is_taken():
    cpu.row_kernel(**_chunk())


def test_another_device_is_refused():
    assert "got cuda" in str(cpu.unavailable_reason(torch.device("cuda")))
    with pytest.raises(RuntimeError, match="got meta"):
        cpu.row_kernel(**_chunk(logits=torch.empty(3, 8, device="meta")))


WITHOUT_EXTENSION = """
import sys
sys.modules["fastdpo._C"] = None
import torch
from fastdpo.kernels import cpu, divergence_cpu
from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.kernels.divergence import DivergenceOutputs
x, y, plain = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64), LogitTransform()
for module, run in (
    (cpu, lambda: cpu.row_kernel(x, y, plain, RowOutputs(torch.empty(3), torch.empty(3)))),
    (
        divergence_cpu,
        lambda: divergence_cpu.divergence_kernel(x, (x.clone(),), y, (plain,) * 2, DivergenceOutputs()),
    ),
):
    try:
        run()
    except RuntimeError as error:
        assert str(error) == module.unavailable_reason()
        print(error)
"""


@pytest.mark.promise(44)
def test_without_the_extension_the_reason_names_the_remedy():
    """Of the kernels of rows and of divergences."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, check=True
    )
    reasons = result.stdout.splitlines()
    assert len(reasons) == 2
    for reason in reasons:
        assert re.search(r"fastdpo\._C is not built.*: with a C.*compiler, `fastdpo build`", reason)
