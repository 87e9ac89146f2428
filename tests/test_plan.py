"""The plan is arithmetic: modes, chunks and bytes, and the promise that chunks do not depend on the mode."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastdpo.plan
from fastdpo import explain_plan
from fastdpo.plan import MIB, chunk_rows, leading_dim, make_plan, resolve_mode


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
    rows = chunk_rows(limit + 1, 128256, 4, 512)
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


def test_the_plan_imports_nothing_of_ours_and_no_torch() -> None:
    tree = ast.parse(Path(fastdpo.plan.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert modules <= {"__future__", "dataclasses", "fastdpo.plan_lean"}
