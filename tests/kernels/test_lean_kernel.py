"""The kernels of mode ``lean`` against the definitions: sums of slabs, D from a given lse, store-free logps.

The plain-torch ones run here; Triton's run on a GPU, or under Triton's interpreter in a process of its own
(``test_triton_under_the_interpreter``; see ``test_rows.py``). The interpreter's ``tl.dot`` is wrong for bf16,
which therefore runs on a GPU only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy
import pytest
import torch
from torch import Tensor

from fastdpo.definitions.logprob import token_statistics
from fastdpo.kernels import slab
from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.testing import assert_logps_close
from fastdpo.types import TOKEN_STATISTICS
from tests.kernels.lean_cases import DEVICE, HEADS, NAMES, Head, assert_equal_bits
from tests.kernels.row_cases import MARGINS, RowCase, make_data, pairwise_cases, run, set_margins
from tests.kernels.test_rows import EXTREMES, OPTIONS, assert_meets_contract, assert_same_bits
from tests.kernels.triton_processes import run_interpreted

HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_TRITON = HAS_GPU or IS_INTERPRETED
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, FP16, *([BF16] if HAS_GPU else [])]

needs_triton = [
    pytest.mark.skipif(not RUNS_TRITON, reason="Triton runs in a process of its own"),
    *([pytest.mark.gpu] if HAS_GPU else []),
]
GRADIENTS = ["torch", pytest.param("triton", marks=needs_triton)]
if IS_INTERPRETED:
    GRADIENTS = GRADIENTS[1:]

# A row kernel made of slabs: plain-torch sums, and D from the lse they give, meet its contract whatever the
# slabs' width.

SLAB_OPTIONS = OPTIONS | {"logits_dtype": (FP32,), "has_target": (False,), "offset": (0,)}
SLAB_CASES = pairwise_cases({"vocab": (1, 2, 65, 1000), "rows": (1, 3, 17), **SLAB_OPTIONS}, seed=3)
LONG_CASES = [
    RowCase(
        9001, 3, d_dtype=BF16, in_place=True, has_coeffs=True, statistics=TOKEN_STATISTICS, row_padding=3
    ),
    RowCase(9001, 2, d_dtype=FP16, in_place=True, softcap=5.0, has_bias=True),
]


def kernel_in_slabs(implementation: str, width: int | None) -> Callable[..., None]:
    """A row kernel that goes through V in slabs of ``width``; None for one, in place where that is asked."""
    gradient: slab.SlabGradient = slab.slab_gradient
    if implementation == "triton":
        from fastdpo.kernels.slab_triton import slab_gradient

        gradient = slab_gradient

    def kernel(
        logits: Tensor,
        labels: Tensor,
        transform: LogitTransform,
        outputs: RowOutputs,
        *,
        target_logits: Tensor | None = None,
        d_out: Tensor | None = None,
        grad_coeffs: Tensor | None = None,
    ) -> None:
        assert target_logits is None
        vocab = logits.shape[1]
        ranges = [(i, min(i + (width or vocab), vocab)) for i in range(0, vocab, width or vocab)]
        _, slope = slab.value_and_slope(transform)
        sums = slab.no_sums(outputs.lse, len(labels), NAMES)
        for start, stop in ranges:
            part = slab.slab_sums(logits[:, start:stop], labels, transform, start, NAMES)
            sums = slab.merged(sums, part, slope)
        asked = outputs._replace(entropy=torch.empty_like(outputs.lse))
        slab.write_outputs(sums, labels, vocab, slope, asked)
        if outputs.entropy is not None:
            outputs.entropy.copy_(asked.entropy)
        for start, stop in ranges:
            if d_out is not None:
                slab_logits = logits if width is None else logits[:, start:stop].clone()
                gradient(
                    slab_logits,
                    labels,
                    outputs.logps,
                    outputs.lse,
                    transform,
                    start,
                    d_out[:, start:stop],
                    coeffs=grad_coeffs,
                    entropy=None if grad_coeffs is None else asked.entropy,
                )

    return kernel


@pytest.mark.parametrize("implementation", GRADIENTS)
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in [*SLAB_CASES, *LONG_CASES]])
def test_slabs_make_a_row_kernel(case: RowCase, implementation: str):
    if case.vocab == 1 and implementation == "triton" and case.softcap is not None:
        pytest.skip("D is exactly 0 only where lse comes from the same tanh; here torch made it")
    data = make_data(case)
    # Odd ones of a long row are few: each is two score of launches.
    widths = (None,) if case.in_place else (None, 64, 7 if case.vocab < 100 else 67)
    for width in widths[:2] if IS_INTERPRETED else widths:
        kernel = kernel_in_slabs(implementation, width)
        results = run(kernel, case, data, DEVICE if implementation == "triton" else "cpu")
        assert_meets_contract(results, case, data)
        assert_same_bits(
            results, run(kernel, case, data, DEVICE if implementation == "triton" else "cpu", 0.0)
        )


@pytest.mark.parametrize("has_coeffs", [False, True], ids=["D", "coefficients"])
@pytest.mark.parametrize("name", [name for name in EXTREMES if "masked" in name])
@pytest.mark.parametrize("implementation", GRADIENTS)
def test_masked_vocabulary(implementation: str, name: str, has_coeffs: bool):
    """Whole slabs of -inf, with and without the label in them."""
    case = RowCase(70, 5, has_coeffs=has_coeffs, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    EXTREMES[name](data.logits, data.labels)
    device = DEVICE if implementation == "triton" else "cpu"
    results = run(kernel_in_slabs(implementation, 8), case, data, device)
    assert_meets_contract(results, case, data)
    assert results.d.isfinite().all()


@pytest.mark.parametrize("name", ["large logits", "common offset", "one winner"])
def test_far_apart_logits(name: str):
    """Logps lose nothing to slabs; D, not asked for here, does to an lse of 1e4 rounded to fp32."""
    case = RowCase(1000, 5, d_dtype=None, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    EXTREMES[name](data.logits, data.labels)
    assert_meets_contract(run(kernel_in_slabs("torch", 64), case, data), case, data)


@pytest.mark.parametrize("has_coeffs", [False, True], ids=["D", "coefficients"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("implementation", GRADIENTS)
def test_a_bad_row_stays_alone(implementation: str, value: str, has_coeffs: bool):
    case = RowCase(201, 4, d_dtype=FP16, has_coeffs=has_coeffs, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    kernel, device = kernel_in_slabs(implementation, 64), DEVICE if implementation == "triton" else "cpu"
    clean = run(kernel, case, data, device)
    data.logits[2, slice(None) if value == "-inf" else 123] = float(value)
    results = run(kernel, case, data, device)
    assert_same_bits(results, clean, torch.tensor([0, 1, 3]))
    assert not results.statistics["logps"][2].isfinite() and not results.d[2].isfinite().all()
    if value != "inf":
        assert results.statistics["logps"][2].isnan() and results.d[2].isnan().all()


@pytest.mark.parametrize("implementation", GRADIENTS)
def test_labels_out_of_range(implementation: str):
    case = RowCase(200, 6, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    data.labels[1:5] = torch.tensor([-5, 203, 1 << 40, -(1 << 62)])
    device = DEVICE if implementation == "triton" else "cpu"
    results = run(kernel_in_slabs(implementation, 64), case, data, device)
    assert_meets_contract(results, case, data)
    assert results.statistics["logps"].isnan().tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("implementation", GRADIENTS)
def test_slabs_give_the_labels_gradient_where_p_rounds_to_one(implementation: str):
    """The log-probability is right to a relative error there, and 1 - p is made of it."""
    case = RowCase(1001, len(MARGINS))
    data = make_data(case)
    others = set_margins(data.logits, data.labels)
    for width in (None, 300):
        device = DEVICE if implementation == "triton" else "cpu"
        results = run(kernel_in_slabs(implementation, width), case, data, device)
        logps = results.statistics["logps"].double()
        assert ((logps - (-others).log1p()).abs() <= 1e-5 * others).all(), logps
        got = results.d.gather(1, data.labels[:, None])[:, 0].double()
        assert ((got - others).abs() <= 1e-5 * others).all(), (got, others)


def test_torch_slabs_take_fp64():
    logits = torch.randn(3, 50, dtype=torch.float64)
    labels = torch.tensor([0, 49, 20])
    outputs = RowOutputs(torch.empty_like(logits[:, 0]), torch.empty_like(logits[:, 0]))
    sums = slab.slab_sums(logits, labels, LogitTransform(), 0, ())
    slab.write_outputs(sums, labels, 50, 1.0, outputs)
    want = token_statistics(logits, labels, ("logps", "lse"))
    assert_logps_close(outputs.logps, want["logps"], torch.float64)
    assert_logps_close(outputs.lse, want["lse"], torch.float64)


@pytest.mark.skipif(not RUNS_TRITON, reason="Triton runs in a process of its own")
def test_triton_refuses_rows_that_would_overlap():
    from fastdpo.kernels.slab_triton import slab_gradient

    logits = torch.zeros(2, 64, device=DEVICE)
    d = logits.view(-1).view(FP16).as_strided((2, 64), (64, 1))
    with pytest.raises(ValueError, match="d_out"):
        per_row = logits[:, 0]
        slab_gradient(logits, per_row.long(), per_row, per_row, LogitTransform(), 0, d)


# Store-free log-probabilities.


@pytest.mark.skipif(not RUNS_TRITON, reason="Triton runs in a process of its own")
class TestTritonLogprobs:
    @pytest.fixture(autouse=True)
    def narrow_splits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More splits and groups of a smaller head: interpreting a tile takes milliseconds."""
        from fastdpo.kernels import lean_triton

        assert lean_triton.SPLIT % 256 == 0
        monkeypatch.setattr(lean_triton, "SPLIT", 256)
        monkeypatch.setattr(lean_triton, "GROUP_BLOCKS", 2)

    def test_splits_as_they_are(self, monkeypatch: pytest.MonkeyPatch):
        from fastdpo.kernels import lean_triton

        monkeypatch.undo()
        assert lean_triton.SPLIT == 2048
        head = Head(5, 33, 2049, FP16)
        head.check(head.run())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", HEADS)
    def test_values_and_repeatability(self, name: str, dtype: torch.dtype):
        head = Head(dtype=dtype, **HEADS[name])
        results = head.run(TOKEN_STATISTICS[1:])
        head.check(results)
        assert_equal_bits(results, head.run(TOKEN_STATISTICS[1:]))

    def test_more_blocks_of_rows_than_a_group(self):
        """Programs are numbered group by group, the last group being smaller: each (block, split) once."""
        head = Head(64 * 5 + 1, 16, 600, has_index=False)
        head.check(head.run())

    def test_asking_for_statistics_changes_no_bit(self):
        head = Head(heavy=True, vocab=300)
        alone = head.run()
        for name in TOKEN_STATISTICS[1:]:
            assert_equal_bits(alone, head.run((name,)))

    def test_a_row_has_the_same_bits_in_every_block(self):
        head = Head(num_tokens=150, vocab=300)
        whole = head.run(TOKEN_STATISTICS[1:])
        # Interpreted, a dot is the CPU's, which does not treat all rows of a block alike: whole blocks then.
        first, second = (64, 128) if IS_INTERPRETED else (1, 70)
        for rows in (slice(0, first), slice(first, second), slice(second, 150)):
            expected = {name: value[rows] for name, value in whole.items()}
            assert_equal_bits(head.run(TOKEN_STATISTICS[1:], rows), expected)

    def test_no_tokens(self):
        head = Head()
        assert len(head.run(TOKEN_STATISTICS[1:], slice(0, 0))["logps"]) == 0

    def test_labels_out_of_range_give_nan(self):
        head = Head(vocab=300)
        clean = head.run(("is_top1",))
        head.labels[1:5] = torch.tensor([-5, 300, 1 << 40, -(1 << 62)])
        results = head.run(("is_top1",))
        assert results["logps"][1:5].isnan().all() and not results["is_top1"][1:5].any()
        others = torch.tensor([0, *range(5, 20)])
        assert_equal_bits(results, clean, others)
        assert torch.equal(results["lse"], clean["lse"])

    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_a_bad_row_stays_alone(self, value: str):
        head = Head(vocab=300)
        clean = head.run(TOKEN_STATISTICS[1:])
        assert head.index is not None
        head.hidden[head.index[7], 3] = float(value)
        results = head.run(TOKEN_STATISTICS[1:])
        others = torch.tensor([row for row in range(20) if row != 7])
        assert_equal_bits(results, clean, others)
        assert results["logps"][7].isnan() and not results["is_top1"][7]

    @pytest.mark.parametrize("masked", [(0, 256), (256, 512), (500, 523), (1, 523)], ids=str)
    def test_masked_vocabulary(self, masked: tuple[int, int]):
        """-inf over whole splits and more, with labels in and out of it."""
        head = Head(vocab=523)
        bias = torch.zeros(523, device=DEVICE)
        bias[slice(*masked)] = -torch.inf
        head.transform = replace(head.transform, bias=bias)
        head.labels[::2] = 0
        head.labels[1::2] = 522
        statistics = tuple(name for name in TOKEN_STATISTICS[1:] if name != "mean_logit")
        results = head.run((*statistics, "mean_logit"))
        assert (results.pop("mean_logit") == -torch.inf).all()
        head.check(results)

    def test_nothing_but_masked_logits(self):
        head = Head()
        head.transform = LogitTransform(torch.full((300,), -torch.inf, device=DEVICE))
        results = head.run()
        assert results["logps"].isnan().all() and (results["lse"] == -torch.inf).all()

    def test_common_offset(self):
        """A bias of 1e4 on every token costs logps what it costs the logits, one rounding of 1e-3."""
        head = Head(heavy=False)
        head.transform = LogitTransform(torch.full((300,), 1e4, device=DEVICE))
        results, truth = head.run(), token_statistics(head.logits(), head.labels, ("logps",))
        assert (results["logps"] - truth["logps"]).abs().max() < 2 * 1e4 * 2**-24

    @pytest.mark.parametrize("dtypes", [(FP32, FP16), (FP16, FP32), (FP32, FP32)], ids=str)
    def test_operands_are_rounded_inside(self, dtypes: tuple[torch.dtype, torch.dtype]):
        """As under autocast: fp32 tensors, 16-bit products, and no converted copy."""
        head = Head(vocab=300, dtype=FP32)
        head.hidden, head.weight = head.hidden.to(dtypes[0]), head.weight.to(dtypes[1])
        head.compute_dtype = FP16
        head.check(head.run())

    def test_offsets_pass_32_bits(self):
        """Rows of hidden and of the weight beyond 2^31 elements, in memory that is never there."""
        if HAS_GPU:
            pytest.skip("needs memory that is not really allocated")
        head = Head(3, 32, 600, FP16)
        # NumPy leaves zeros to the system, page by page as they are touched; torch writes them.
        hidden = torch.from_numpy(numpy.zeros(2 * (2**30 + 64) + 32, numpy.float16))
        stored = hidden.as_strided((3, 32), (2**30 + 64, 1)).copy_(head.rows())
        weight = torch.from_numpy(numpy.zeros(600 * 2**22, numpy.float16))
        head.weight = weight.as_strided((600, 32), (2**22, 1)).copy_(head.weight)
        head.hidden, head.index = stored, torch.arange(3)
        head.labels[2] = 599
        head.check(head.run())

    def test_refusals(self):
        head = Head()
        with pytest.raises(TypeError, match="weight"):
            head.weight = head.weight.double()
            head.run()


@pytest.mark.skipif(RUNS_TRITON, reason="Triton runs in this process")
@pytest.mark.slow
def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__, at_least=len(SLAB_CASES) + 2 * len(HEADS) + 1)
