"""The CUDA row kernel's own source, run on a CPU (``emulation/``), against the contract of every backend.

A seed is one roll of the dice on what a GPU leaves open: the order of threads, and when copies and messages
arrive.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.types import TOKEN_STATISTICS
from tests.kernels.conftest import folder_of_all_workers
from tests.kernels.emulation import ADA, AMPERE, HOPPER, SMALL_AMPERE, SMALL_HOPPER, TILE, Emulator, Limits
from tests.kernels.row_cases import (
    MARGINS,
    RowCase,
    RowData,
    RowResults,
    make_data,
    pairwise_cases,
    run,
    set_margins,
)
from tests.kernels.test_rows import EXTREMES, OPTIONS, assert_meets_contract, assert_same_bits

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DEVICES = {
    "hopper": HOPPER,
    "ampere": AMPERE,
    "ada": ADA,
    "small-hopper": SMALL_HOPPER,
    "small-ampere": SMALL_AMPERE,
}
# The devices on which a row is spread in different ways, and vocabularies around the edges of groups (8 and
# 256 columns), tiles (512), quarters and slices. The last one of small-hopper and all of small-ampere do not
# fit on chip.
VOCABS = {
    "hopper": (1, 2, 7, 8, 9, 255, 256, 257, 511, 512, 513, 1000, 2048, 2049, 4097),
    "small-hopper": (4097, 8193, 16001, 16385, 40000, 50257),
    "small-ampere": (4097, 4105, 8001, 16896),
}
REAL_VOCABS = (32000, 50257, 128256, 151936, 152064, 256000, 262144, 262208)
ROWS = (1, 9)  # as many as make eager's largest error, the unit of ours, more than an accident
CASES = [
    pytest.param(device, case, id=f"{device}:{case}")
    for device, vocabs in VOCABS.items()
    for case in pairwise_cases({"vocab": vocabs, "rows": ROWS, **OPTIONS})
]
# One vocabulary for a single block with all of the row, a cluster of eight, and a row that does not fit.
SPREADS = [("hopper", 1000), ("small-hopper", 16400), ("small-ampere", 8001)]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return Emulator(folder_of_all_workers(tmp_path_factory))


def results_of(
    emulator: Emulator, device: str, case: RowCase, data: RowData, *, clusters: int = 2, seed: int = 0
) -> RowResults:
    return run(emulator.row_kernel(DEVICES[device], clusters=clusters, seed=seed), case, data)


@pytest.mark.parametrize("device", DEVICES)
def test_plan_covers_the_row_and_fits(emulator: Emulator, device: str) -> None:
    limits: Limits = DEVICES[device]
    for vocab in (*range(1, 3000, 7), *range(3000, 300_000, 1237), *REAL_VOCABS, 1_000_003, 2**28):
        plan = emulator.plan(vocab, limits)
        row_tiles = -(-vocab // TILE)
        assert plan.cluster in (1, 2, 4, 8) and plan.cluster <= limits.max_cluster
        assert 1 <= plan.warps <= 16 and plan.ahead in (1, 2) and plan.tiles_per_quarter >= 1
        assert row_tiles <= plan.cluster * plan.tiles < row_tiles + plan.cluster
        assert plan.shared_bytes <= limits.shared_per_block
        # D in the place of the logits relies on this: a row that is read twice has one block.
        assert plan.cluster == 1 or plan.tiles <= plan.resident_tiles
        assert plan.warps == 1 or plan.tiles > (plan.warps - 1) * 4 * plan.tiles_per_quarter, "an idle warp"


def test_plan_of_real_vocabularies(emulator: Emulator) -> None:
    """On a Hopper GPU all are read once, and up to 152 thousand two blocks share a multiprocessor."""
    for vocab in REAL_VOCABS:
        plan = emulator.plan(vocab, HOPPER)
        assert plan.tiles <= plan.resident_tiles
        blocks = HOPPER.shared_per_sm // (plan.shared_bytes + HOPPER.reserved_per_block)
        assert blocks >= 2 or (blocks == 1 and vocab > 160_000)


@pytest.mark.promise(46)
@pytest.mark.parametrize(("device", "case"), CASES)
def test_contract(emulator: Emulator, device: str, case: RowCase) -> None:
    data = make_data(case)
    results = results_of(emulator, device, case, data)
    assert_meets_contract(results, case, data)
    for clusters, seed in ((1, 1), (3, 2)):
        assert_same_bits(results, results_of(emulator, device, case, data, clusters=clusters, seed=seed))


@pytest.mark.parametrize("vocab", [50257, 128256, 262208])
def test_contract_at_real_sizes(emulator: Emulator, vocab: int) -> None:
    case = RowCase(
        vocab, 3, d_dtype=BF16, in_place=True, statistics=TOKEN_STATISTICS, row_padding=-vocab % 64
    )
    data = make_data(case)
    assert_meets_contract(results_of(emulator, "hopper", case, data), case, data)


@pytest.mark.parametrize(("device", "vocab"), SPREADS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(emulator: Emulator, device: str, vocab: int, name: str) -> None:
    for has_coeffs in (False, True):
        case = RowCase(vocab, 5, has_coeffs=has_coeffs, statistics=TOKEN_STATISTICS)
        data = make_data(case)
        EXTREMES[name](data.logits, data.labels)
        results = results_of(emulator, device, case, data)
        assert_meets_contract(results, case, data)
        assert not (results.statistics["logps"] > 0).any()


@pytest.mark.parametrize(("device", "vocab"), SPREADS)
@pytest.mark.parametrize("has_coeffs", [False, True], ids=["D", "coefficients"])
def test_bad_labels_and_rows_stay_alone(
    emulator: Emulator, device: str, vocab: int, has_coeffs: bool
) -> None:
    case = RowCase(vocab, 9, d_dtype=BF16, in_place=True, has_coeffs=has_coeffs, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    clean = results_of(emulator, device, case, data)
    data.labels[:4] = torch.tensor([-1, vocab, 1 << 40, -(1 << 62)])
    results = results_of(emulator, device, case, data)
    assert_meets_contract(results, case, data)
    assert results.statistics["logps"][:4].isnan().all()

    data = make_data(case)
    data.logits[4] = -torch.inf
    data.logits[5, vocab // 2] = torch.nan
    data.logits[6] = -torch.inf
    data.logits[6, -1] = torch.nan
    data.logits[7, 3] = torch.inf
    results = results_of(emulator, device, case, data)
    bad = slice(4, 8)
    assert results.statistics["logps"][bad].isnan().all() and results.d[bad].isnan().all()
    assert results.statistics["lse"][4] == -torch.inf and results.statistics["lse"][5:8].isnan().all()
    assert_same_bits(results, clean, slice(8, 9))


def test_a_softcap_makes_infinite_logits_finite(emulator: Emulator) -> None:
    case = RowCase(16400, 3, softcap=10.0, statistics=TOKEN_STATISTICS)
    data = make_data(case)
    data.logits[1, 5000], data.logits[1, 10] = torch.inf, -torch.inf
    results = results_of(emulator, "small-hopper", case, data)
    assert results.statistics["logps"].isfinite().all()
    assert (results.d[1, [5000, 10]] == 0).all()
    data.logits[1, 5000], data.logits[1, 10] = 1e30, -1e30
    assert_same_bits(results, results_of(emulator, "small-hopper", case, data))


@pytest.mark.parametrize(("device", "vocab"), SPREADS)
@pytest.mark.parametrize("logits_dtype", [FP32, BF16], ids=str)
def test_logsumexp_has_the_same_bits_in_every_use(
    emulator: Emulator, device: str, vocab: int, logits_dtype: torch.dtype
) -> None:
    """Modes differ in what they ask a kernel for, and chunks in their rows and their place in memory."""
    plain = RowCase(vocab, 5, logits_dtype, None, has_bias=True, scale=0.7, softcap=20.0)
    data = make_data(plain)
    want = results_of(emulator, device, plain, data)
    coeffs = torch.ones(3, 5)
    for seed, (case, used) in enumerate(
        (
            (replace(plain, statistics=TOKEN_STATISTICS), data),
            (replace(plain, d_dtype=FP32), data),
            (replace(plain, d_dtype=logits_dtype, in_place=True), data),
            (replace(plain, d_dtype=FP16, has_coeffs=True), replace(data, coeffs=coeffs)),
            (replace(plain, row_padding=3, offset=1), data),
        )
    ):
        got = results_of(emulator, device, case, used, clusters=seed + 1, seed=seed)
        for name in ("logps", "lse"):
            assert torch.equal(got.statistics[name], want.statistics[name]), (case, name)
    alone = RowData(data.logits[3:4], data.labels[3:4], data.bias, None, None)
    assert_same_bits(results_of(emulator, device, replace(plain, rows=1), alone), _row(want, 3))


def _row(results: RowResults, row: int) -> RowResults:
    return RowResults({name: value[row : row + 1] for name, value in results.statistics.items()}, None)


@pytest.mark.parametrize(
    ("device", "vocab"), [("hopper", 1004), ("small-hopper", 16404), ("small-ampere", 8004)]
)
@pytest.mark.parametrize("logits_dtype", [FP32, BF16], ids=str)
def test_reads_nothing_behind_the_last_row(
    emulator: Emulator, device: str, vocab: int, logits_dtype: torch.dtype
) -> None:
    """The last row ends where a page of memory does, and the next page traps."""
    data = make_data(RowCase(vocab, 3, logits_dtype))
    flat, memory = _at_end_of_page(data.logits.flatten())
    outputs = RowOutputs(torch.empty(3), torch.empty(3))
    kernel = emulator.row_kernel(DEVICES[device])
    kernel(flat.view(3, vocab), data.labels, LogitTransform(), outputs, d_out=torch.empty(3, vocab))
    assert (outputs.lse - data.logits.double().logsumexp(1)).abs().max() < 1e-5
    del flat, memory


def _at_end_of_page(flat: Tensor) -> tuple[Tensor, mmap.mmap]:
    size = flat.numel() * flat.element_size()
    guard = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, guard + mmap.PAGESIZE)
    view = torch.frombuffer(memory, dtype=torch.uint8)
    copy = view[guard - size : guard].view(flat.dtype)
    copy.copy_(flat)
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(view.data_ptr() + guard), mmap.PAGESIZE, no_access) == 0
    return copy, memory


@pytest.mark.parametrize("seed", range(4))
def test_the_labels_logit_is_here_before_d_may_lie_over_it(emulator: Emulator, seed: int) -> None:
    """Another block may write D there as soon as it has the sums of all: they must hang on that load."""
    case = RowCase(8193, 5, d_dtype=BF16, in_place=True)
    data = make_data(case)
    data.labels[:] = torch.arange(5) * 700 + 60  # D of the next blocks comes to lie over these
    assert emulator.plan(case.vocab, SMALL_HOPPER).cluster > 1
    results = results_of(emulator, "small-hopper", case, data, clusters=1, seed=seed)
    assert_meets_contract(results, case, data)


@pytest.mark.parametrize(("device", "vocab"), SPREADS)
def test_the_labels_gradient_where_p_rounds_to_one(emulator: Emulator, device: str, vocab: int) -> None:
    for logits_dtype, has_coeffs in ((FP32, False), (FP32, True), (BF16, False)):
        case = RowCase(vocab, len(MARGINS), logits_dtype, has_coeffs=has_coeffs)
        data = make_data(case)
        exact = data.logits.float()
        set_margins(exact, data.labels)
        data.logits = exact.to(logits_dtype)
        z = data.logits.double()
        rest = z.scatter(1, data.labels[:, None], -torch.inf).logsumexp(1)
        others = (rest - z.logsumexp(1)).exp()
        if data.coeffs is not None:
            data.coeffs = torch.tensor([[1.0], [0.0], [0.0]]).expand(3, len(MARGINS)).contiguous()
        d = results_of(emulator, device, case, data).d
        assert d is not None
        got = d.gather(1, data.labels[:, None])[:, 0].double()
        assert ((got - others).abs() <= 1e-5 * others).all(), (device, got, others)
