"""The plan is arithmetic: modes, chunks and bytes, and the promise that chunks do not depend on the mode."""

from __future__ import annotations

import ast
import random
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

import fastdpo.plan.call
from fastdpo import explain_plan
from fastdpo.plan.call import MAX_LOW_PRECISION_GROUPS, make_plan
from fastdpo.plan.modes import resolve_mode
from fastdpo.plan.schedule import MIB, chunk_and_block_rows, group_loss_rows, leading_dim


@pytest.mark.parametrize(
    ("hidden", "weight", "bias", "entropy", "cache_mib", "expected"),
    [
        (False, False, False, False, 1024, "score"),
        (True, False, False, False, 1024, "stash"),
        (True, True, False, False, 1024, "cache"),
        (False, True, False, False, 1024, "cache"),
        (False, False, True, False, 1024, "cache"),
        (True, True, False, False, 0, "recompute"),
        (True, False, False, False, 0, "stash"),
        (True, False, False, True, 1024, "recompute"),
        (False, False, False, True, 1024, "score"),
    ],
)
def test_auto_mode(
    hidden: bool, weight: bool, bias: bool, entropy: bool, cache_mib: int, expected: str
) -> None:
    mode = resolve_mode(
        "auto",
        needs_hidden=hidden,
        needs_weight=weight,
        needs_bias=bias,
        entropy_requires_grad=entropy,
        cache_mib=cache_mib,
    )
    assert mode == expected


@pytest.mark.parametrize("mode", ["stash", "cache", "recompute"])
def test_every_mode_scores_when_nothing_needs_a_gradient(mode: str) -> None:
    assert resolve_mode(mode, needs_hidden=False, needs_weight=False) == "score"


@pytest.mark.parametrize("vocab", [2, 1000, 32000, 50257, 128256, 262208])
@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 129, 1000, 4096, 65536])
@pytest.mark.parametrize("workspace_mib", [2, 64, 512])
def test_chunks_cover_every_row_once_within_the_workspace(
    vocab: int, num_tokens: int, workspace_mib: int
) -> None:
    plan = make_plan("stash", num_tokens, 64, vocab, workspace_mib=workspace_mib)
    covered = [row for start, stop in plan.chunks() for row in range(start, stop)]
    assert covered == list(range(num_tokens))
    assert plan.workspace_bytes <= workspace_mib * MIB
    assert plan.leading_dim >= vocab and plan.leading_dim % 64 == 0


def test_chunks_are_even() -> None:
    """One row more than a chunk holds makes two of about half, not a full one and a sliver."""
    limit = 512 * MIB // (leading_dim(128256) * 4)
    rows, block_rows = chunk_and_block_rows(limit + 1, 128256, 4, 512)
    assert rows == block_rows
    assert limit // 2 <= rows <= limit // 2 + 128


@pytest.mark.parametrize("num_tokens", [100, 5000])
def test_chunks_do_not_depend_on_the_mode_or_the_gradients(num_tokens: int) -> None:
    plans = [
        make_plan(mode, num_tokens, 64, 128256, operand_bytes=operand, needs_weight=weight, cache_mib=cache)
        for mode in ("score", "stash", "cache", "recompute")
        for operand in (2, 4)
        for weight in (False, True)
        for cache in (0, 1024)
    ]
    assert len({tuple(plan.chunks()) for plan in plans}) == 1


@pytest.mark.parametrize(
    ("hidden_size", "vocab", "logits_bytes", "num_tokens", "rows", "block"),
    [
        # 501 x 8 tiles of logits, 8 x 16 of D W for 132 multiprocessors: 98% and 97% busy.
        (4096, 128256, 4, 16384, 1024, 1024),
        # 11 x 12 tiles: every multiprocessor has one.
        (3072, 128256, 2, 11 * 1408, 1408, 1408),
        (2048, 128256, 4, 16384, 1024, 1024),
        # Half of the workspace is as good for the logits: 594 x 4 tiles are 18 waves to the last tile.
        (3584, 152064, 2, 16384, 512, 1024),
        (3584, 152064, 4, 16384, 512, 512),
        (3584, 256000, 4, 16384, 512, 512),  # all that the workspace holds
        (4096, 128256, 4, 1000, 1000, 1000),  # one chunk holds all
    ],
)
def test_chunks_and_blocks_of_a_gpu(
    hidden_size: int, vocab: int, logits_bytes: int, num_tokens: int, rows: int, block: int
) -> None:
    sizes = (num_tokens, vocab, logits_bytes, 512)
    got = chunk_and_block_rows(*sizes, hidden_size=hidden_size, num_multiprocessors=132)
    assert got == (rows, block)
    assert block * leading_dim(vocab) * logits_bytes <= 512 * MIB
    rows, block = chunk_and_block_rows(*sizes, hidden_size=hidden_size)
    assert rows == block  # on a CPU


@pytest.mark.parametrize("num_tokens", [1047, 1100, 2049, 5000, 16384, 65536])
@pytest.mark.parametrize("num_multiprocessors", [108, 132, 148])
@pytest.mark.parametrize("joins_chunks", [False, True])
def test_chunks_of_a_gpu_are_no_sliver(num_tokens: int, num_multiprocessors: int, joins_chunks: bool) -> None:
    """Reading W for a few rows costs what 500 rows do: a last chunk of 1 to 127 rows is never the choice."""
    rows, block = chunk_and_block_rows(
        num_tokens, 128256, 4, 512, hidden_size=4096, num_multiprocessors=num_multiprocessors,
        joins_chunks=joins_chunks,
    )  # fmt: skip
    assert 512 <= rows <= 1046 and block % rows == 0 and block <= 1046
    assert joins_chunks or block == rows
    assert num_tokens % rows == 0 or num_tokens % rows >= 128


def test_a_longer_chunk_has_to_be_worth_its_memory() -> None:
    """On 148 multiprocessors 14 waves of 512 rows are 28 of 1024: the longer chunk gains nothing."""
    sizes = (16384, 128256, 4, 512)
    rows, block = chunk_and_block_rows(*sizes, hidden_size=8192, num_multiprocessors=148)
    assert (rows, block) == (512, 1024)
    plan = explain_plan(16384, 8192, 128256, num_multiprocessors=148, hidden_requires_grad=False)
    assert plan.workspace_bytes == 512 * 4 * 128256
    assert "of 1024 rows: 0.2% faster, 250 MiB more (predicted)" in str(plan)


def test_half_the_budget_is_half_the_chunk() -> None:
    """What a chunk of 1024 rows takes more, a smaller budget takes back."""
    pairs = {"pair_lengths": [512] * 32, "weight_requires_grad": True, "num_multiprocessors": 132}
    whole, half = (explain_plan(16384, 4096, 128256, workspace_mib=mib, **pairs) for mib in (512, 256))
    assert (whole.chunk_rows, half.chunk_rows) == (1024, 512)
    assert whole.peak_bytes - half.peak_bytes >= 512 * 4 * 128256
    assert half.peak_bytes <= 2.4 * 1024 * MIB
    assert "of 512 rows: 1.9% slower, 250 MiB less (predicted)" in str(whole)


@pytest.mark.parametrize("num_tokens", [0, 5, 3000, 4096])
def test_blocks_are_chunks_in_order(num_tokens: int) -> None:
    plan = make_plan("stash", num_tokens, 16, 250, workspace_mib=1, joins_chunks=True)
    plan = replace(plan, chunk_rows=min(num_tokens, 512), block_rows=min(num_tokens, 1024))
    assert [chunk for block in plan.blocks() for chunk in block] == plan.chunks()
    assert all(block[-1][1] - block[0][0] <= plan.block_rows for block in plan.blocks())
    first = plan.chunk_rows
    assert [chunk for block in plan.blocks(first) for chunk in block] == plan.chunks()[1:]


@pytest.mark.parametrize("seed", range(20))
def test_groups_hold_whole_rows_in_order(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.choice([0, generator.randint(1, 90)]) for _ in range(generator.randint(0, 40))]
    capacity = generator.randint(0, 80)
    bounds = list(accumulate(lengths, initial=0))
    groups = group_loss_rows(bounds, capacity)
    assert [row for group in groups for row in range(group.first_row, group.last_row)] == [
        *range(len(lengths))
    ]
    for group in groups:
        assert (group.start, group.stop) == (bounds[group.first_row], bounds[group.last_row])
        length = group.stop - group.start
        assert group.is_recomputed == (length > capacity)
        assert not group.is_recomputed or group.last_row == group.first_row + 1
    # No more of them than one after the other, each as full as can be.
    kept, room, wanted = 0, -1, 0
    for length in lengths:
        kept, room = (kept + 1, -1) if length > capacity else (kept, room)
        if length <= capacity and room < length:
            wanted, room = wanted + 1, capacity
        room -= length if length <= capacity else 0
    assert len(groups) == wanted + kept


def test_groups_are_about_equally_long() -> None:
    """20 pairs of 100 rows for a buffer of 1900: two groups of 1000, not 1900 and 100."""
    groups = group_loss_rows(range(0, 2001, 100), 1900)
    assert [group.stop - group.start for group in groups] == [1000, 1000]


@pytest.mark.parametrize("pair_length", [64, 300, 512, 800])
@pytest.mark.parametrize("logits_bytes", [2, 4])
def test_pairs_of_the_headline_size(pair_length: int, logits_bytes: int) -> None:
    """Llama-3-8B, 16384 tokens: three passes, dweight of few enough groups to stay bf16, 2.65 GiB in all."""
    plan = make_plan(
        "pairs", 16384, 4096, 128256, needs_weight=True, num_multiprocessors=132, joins_chunks=True,
        logits_bytes=logits_bytes, loss_rows=[*range(0, 16384, pair_length), 16384],
    )  # fmt: skip
    assert plan.gemm_passes == 3 and plan.gemm_passes_backward == 0
    assert plan.weight_grad_groups == len(plan.groups) <= MAX_LOW_PRECISION_GROUPS
    gradients = 2 * 4096 * (16384 + 128256)
    assert plan.weight_sum_bytes == 0
    assert plan.workspace_bytes + plan.kept_bytes + gradients < plan.peak_bytes <= 2.65 * 1024 * MIB


def test_ranks_with_parts_of_a_vocabulary_meet_as_often() -> None:
    """Shards of unlike size have unlike groups by themselves, and those of the largest where it is named."""
    loss_rows = list(range(0, 16384 + 1, 700))
    sizes = (16033, 16025, 9000, 64125)
    each, alike = (
        [
            make_plan(
                "pairs",
                loss_rows[-1],
                4096,
                size,
                needs_weight=True,
                cache_mib=128,
                loss_rows=loss_rows,
                **options,
            ).groups
            for size in sizes
        ]
        for options in ({}, {"largest_part": max(sizes)})
    )
    assert len({len(groups) for groups in each}) > 1
    assert len(set(alike)) == 1 and alike[-1] == each[-1]


def test_a_smaller_cache_does_not_make_pairs_lighter() -> None:
    """768 MiB of D are 6 groups, one too many for bf16: dweight in fp32, D and logits are 3.3 GiB."""
    plan = make_plan(
        "pairs", 16384, 4096, 128256, needs_weight=True, num_multiprocessors=132, joins_chunks=True,
        loss_rows=range(0, 16385, 512), cache_mib=768,
    )  # fmt: skip
    assert plan.weight_grad_groups == 6 and plan.weight_sum_bytes == 4 * 4096 * 128256
    # Once the sum is whole, D and the logits, 1253 MiB, are given back before it is cast to 1002 MiB.
    assert 3.3 * 1024 * MIB < plan.peak_bytes <= 3.35 * 1024 * MIB
    assert f"peak          {plan.peak_bytes / MIB:.1f} MiB at once" in str(plan)
    assert "fp32 sum      2004.0 MiB" in str(plan)


def test_pairs_must_have_all_tokens() -> None:
    with pytest.raises(ValueError, match="pair_lengths: got 5 tokens in all, wanted 6"):
        explain_plan(6, 8, 11, pair_lengths=[2, 3])


def test_the_headline_sizes() -> None:
    """Llama-3-8B: 4096 tokens of bf16 D fit the default cache, 16384 do not."""
    fits = make_plan("cache", 4096, 4096, 128256, needs_weight=True)
    assert fits.gemm_passes == 3 and fits.cached_rows == 4096 and fits.weight_grad_groups == 1
    too_many = make_plan("cache", 16384, 4096, 128256, needs_weight=True)
    assert 3 < too_many.gemm_passes < 4
    assert too_many.kept_bytes <= 1024 * MIB
    assert make_plan("stash", 16384, 4096, 128256).gemm_passes == 2


def test_explain_plan_prints_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    plan = explain_plan(4096, 4096, 128256, weight_requires_grad=True)
    printed = capsys.readouterr().out
    assert printed.strip() == str(plan)
    for word in ("cache", "3.00", "4096", "workspace"):
        assert word in printed


def test_the_plan_imports_no_torch() -> None:
    tree = ast.parse(Path(fastdpo.plan.call.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    ours = {f"fastdpo.plan.{name}" for name in ("lean", "memory", "modes", "plan", "schedule")}
    assert modules <= {"__future__", "collections.abc", "dataclasses", "itertools"} | ours
