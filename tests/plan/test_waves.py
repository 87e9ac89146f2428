"""The model of a GPU's waves: enough tiles for every multiprocessor at every size that is benchmarked."""

from __future__ import annotations

import re

import pytest

from benchmarks.problem import Size
from benchmarks.sizes import IGNORED_PERCENT, REAL_MODELS, TARGET_MODELS, TOKENS
from fastdpo import explain_plan
from fastdpo.plan.call import make_plan
from fastdpo.plan.plan import Plan
from fastdpo.plan.waves import WANTED_BUSY, part_size, tile_count

MODES = ("score", "stash", "pairs", "recompute")
SIZES = [
    Size(model, n, ignored_percent=share)
    for model in REAL_MODELS
    for n in TOKENS
    for share in IGNORED_PERCENT
]


def plan_of(size: Size, mode: str, num_multiprocessors: int) -> Plan:
    needs = {"needs_hidden": mode != "score", "needs_weight": mode in ("pairs", "recompute")}
    loss_rows = range(0, size.num_labelled + 1, 2 * size.answer_length) if mode == "pairs" else (0,)
    return make_plan(
        mode, size.num_labelled, size.hidden_size, size.vocab_size, loss_rows=loss_rows,
        num_multiprocessors=num_multiprocessors, joins_chunks=True, **needs,
    )  # fmt: skip


@pytest.mark.parametrize("num_multiprocessors", [108, 132, 148, 170])
@pytest.mark.parametrize("mode", MODES)
def test_products_fill_the_waves_or_say_why_not(mode: str, num_multiprocessors: int) -> None:
    """Of all sizes of the benchmarks: 95 % of all waves' room is work, or the plan has the reason."""
    for size in SIZES:
        plan = plan_of(size, mode, num_multiprocessors)
        assert [product.product for product in plan.waves] == ["logits", "D W"][: 1 + (mode != "score")]
        for product in plan.waves:
            assert (product.busy >= WANTED_BUSY) == (product.reason == ""), (size, product)
            assert 0 < product.busy <= 1 + 1e-12 and product.time >= 1 / product.busy - 1e-12
            assert str(product) in str(plan)


@pytest.mark.parametrize("mode", MODES)
def test_an_h200_is_busy_at_the_sizes_with_a_target(mode: str) -> None:
    """With no excuse, from 1024 rows on: the plan of the table of targets."""
    for model in TARGET_MODELS:
        for num_tokens in (4096, 16384, 65536):
            for product in plan_of(Size(model, num_tokens), mode, 132).waves:
                assert product.busy >= WANTED_BUSY and product.time < 1.07, (model, num_tokens, product)


@pytest.mark.parametrize("num_multiprocessors", [108, 132, 148, 170])
def test_the_excuses_are_true(num_multiprocessors: int) -> None:
    """What the numbers say of each: edges of tiles, few rows, memory, or partial sums that cost more."""
    for size in SIZES:
        plan = plan_of(size, "stash", num_multiprocessors)
        for product in plan.waves:
            if "columns fill" in product.reason:
                assert size.hidden_size / (-(-size.hidden_size // 256) * 256) < WANTED_BUSY
            elif "reading W" in product.reason:
                assert min(plan.num_tokens % plan.chunk_rows or plan.chunk_rows, plan.num_tokens) < 512
            elif "MiB of sums" in product.reason:
                more, mib = (int(word) for word in re.findall(r"\d+", product.reason)[:2])
                rows = next(rows for rows, parts in plan.hidden_products if parts < more)
                assert mib > 128 and abs(mib - 4 * more * rows * size.hidden_size / 2**20) < 0.15 * mib
            elif "one chunk" in product.reason:
                assert len(plan.chunks()) == 1


def test_few_tiles_are_summed_in_parts() -> None:
    """Gemma-2-9B: 4 x 14 tiles of D W would be 42 % of an H200; 7 parts of the vocabulary fill 3 waves."""
    plan = make_plan("stash", 16384, 3584, 256000, num_multiprocessors=132, joins_chunks=True)
    assert tile_count(512, 3584) == 56
    assert plan.hidden_products == ((512, 7),) * 32
    d_w = plan.waves[1]
    assert (d_w.tiles, d_w.waves) == (392, 3) and d_w.busy > 0.98
    assert "D W of 512 rows in 7 parts of the vocabulary: 392 tiles, 3 waves, 99.0% busy" in str(plan)


@pytest.mark.parametrize("vocab", [1000, 128256, 256000, 262145])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 31])
def test_parts_are_aligned_and_leave_little_over(vocab: int, parts: int) -> None:
    size = part_size(vocab, parts)
    assert parts == 1 or size % 8 == 0
    assert 0 <= vocab - parts * size < 8 * parts


def test_partial_sums_stay_in_a_quarter_of_the_workspace() -> None:
    for mib in (16, 64, 512):
        plan = make_plan(
            "stash", 16384, 3584, 256000, num_multiprocessors=132, joins_chunks=True, workspace_mib=mib
        )
        assert all(
            rows * parts * 3584 * 4 <= mib * 2**20 // 4 for rows, parts in plan.hidden_products if parts > 1
        )


def test_wider_operands_are_left_to_the_library() -> None:
    """The model is of tensor cores, and an fp32 sum that a library splits stays one of fp32."""
    plan = explain_plan(16384, 3584, 256000, operand_bytes=4, num_multiprocessors=132)
    assert plan.waves == () and "predicted" not in str(plan)
    assert {parts for _, parts in plan.hidden_products} == {1}


def test_a_cpu_has_no_waves() -> None:
    plan = explain_plan(16384, 4096, 128256)
    assert plan.waves == () and "waves" not in str(plan) and "predicted" not in str(plan)
    assert {parts for _, parts in plan.hidden_products} == {1}
