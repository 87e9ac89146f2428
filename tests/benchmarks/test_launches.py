"""Kernel launches of the head, counted on meta tensors: few, and as many as the page says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.launches import LaunchCount, launch_rows
from benchmarks.pretended import make_call, pretended_gpu, run_backward, run_forward


@pytest.fixture(autouse=True)
def _no_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of uninitialised memory is an operation of its own."""
    monkeypatch.undo()


def test_launches_at_4096_tokens() -> None:
    """Llama-3-8B, 132 multiprocessors, rows picked by an index: 4 chunks, 8 pairs in one group."""
    rows = {(row.mode, row.direction): row for row in launch_rows()}
    assert {key: (row.products, row.row_kernels, row.total) for key, row in rows.items()} == {
        # A chunk: its rows, their product, the kernel.
        ("score", "forward"): (4, 4, 12),
        # And D W, rounded to where it is kept.
        ("stash", "forward"): (8, 4, 20),
        # A gradient of zeros, the rows times their coefficients, put where they belong.
        ("stash", "backward"): (0, 0, 3),
        ("pairs", "forward"): (9, 4, 35),
        # Of both gradients, which are there: kernels that leave at once where the incoming one is 1.
        ("pairs", "backward"): (0, 0, 2),
        # Two slabs of the vocabulary for every chunk.
        ("lean", "forward"): (16, 8, 165),
        ("lean", "backward"): (0, 0, 3),
    }


@pytest.mark.parametrize("has_lse", [False, True])
def test_a_stash_is_scaled_in_few_launches_whatever_the_chunks(has_lse: bool) -> None:
    """Not some for every chunk: 3 of 16384 tokens as of 1024, and 2 more for every 64 MiB of them."""
    for num_tokens in (1024, 16384):
        count = LaunchCount()
        with pretended_gpu(seen=count.seen), count:
            call = make_call("stash", num_tokens, 4096, 128256, needs_weight=False)
            forward = run_forward(call)
            count.row("stash", "forward")
            run_backward(call, forward, has_lse=has_lse)
        pieces = -(-num_tokens * 8192 // 2**26)
        of_lse = 5 + 5 * pieces  # the labels' coefficients, 0 outside the vocabulary, and their rows of W
        assert count.row("stash", "backward").total == 1 + 2 * pieces + has_lse * of_lse


def test_what_is_a_launch() -> None:
    value = torch.empty(4, 4, device="meta")
    with LaunchCount() as count:
        value.t()[1:].reshape(-1).view(3, 4).expand(2, 3, 4)
        torch.empty_like(value).new_empty(3)
    assert count.launches == {"clone": 1}  # the reshape of a transposed tensor
    with LaunchCount() as count:
        value.mul_(2).add(value)
        torch.mm(value, value, out=torch.empty_like(value))
        value.new_empty(0).add_(1)  # of nothing, nothing is launched
    assert count.launches == {"mul_": 1, "add": 1, "mm": 1}
