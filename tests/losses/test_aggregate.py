"""Per token -> per sequence: padded and packed, empty sequences, precision, determinism."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.losses.aggregate import check_cu_seqlens, sequence_sums


def packed(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_packed_equals_a_loop_over_sequences(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(sum(lengths), generator=generator) < 0.7
    upstream = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    got = sequence_sums(values, mask, packed(lengths))
    want = torch.stack(
        [(part * keep).sum() for part, keep in zip(values.split(lengths), mask.split(lengths), strict=True)]
    )
    torch.testing.assert_close(got, want)
    got_grad, want_grad = (torch.autograd.grad(x, values, upstream)[0] for x in (got, want))
    assert torch.equal(got_grad, want_grad)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_padded_equals_packed_bit_for_bit(index_dtype: torch.dtype) -> None:
    lengths = [5, 0, 7, 1, 7, 3]
    padded, mask = torch.zeros(6, 7), torch.arange(7) < torch.tensor(lengths)[:, None]
    padded[mask] = torch.randn(sum(lengths)) * 30
    got = sequence_sums(
        padded[mask], torch.ones(sum(lengths), dtype=torch.bool), packed(lengths).to(index_dtype)
    )
    assert torch.equal(got, sequence_sums(padded, mask))
    assert got[1] == 0.0


@pytest.mark.parametrize("is_packed", [False, True])
def test_long_sequences_lose_nothing(is_packed: bool) -> None:
    """100,000 tokens of -0.1: added one by one in fp32 they would be off by more than a nat."""
    values = torch.full((1, 100_000), -0.1)
    mask = torch.ones_like(values, dtype=torch.bool)
    if is_packed:
        got = sequence_sums(values[0], mask[0], torch.tensor([0, 100_000]))
    else:
        got = sequence_sums(values, mask)
    assert got.dtype == torch.float32
    assert got.item() == values.double().sum().float().item()


@pytest.mark.parametrize("is_packed", [False, True])
def test_nan_stays_in_its_sequence_and_out_of_masked_positions(is_packed: bool) -> None:
    values = torch.randn(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    clean = sequence_sums(values, mask)
    values[1, 2] = float("nan")
    shape, bounds = ((12,), torch.tensor([0, 4, 8, 12])) if is_packed else ((3, 4), None)
    got = sequence_sums(values.view(shape), mask.view(shape), bounds)
    assert got[1].isnan() and torch.equal(got[[0, 2]], clean[[0, 2]])

    mask[1, 2] = False
    leaf = values.clone().view(shape).requires_grad_()
    masked = sequence_sums(leaf, mask.view(shape), bounds)
    assert masked.isfinite().all()
    (grad,) = torch.autograd.grad(masked.sum(), leaf)
    assert torch.equal(grad, mask.view(shape).float())


def test_no_tokens_and_no_sequences() -> None:
    none = torch.zeros(0, requires_grad=True)
    got = sequence_sums(none, torch.zeros(0, dtype=torch.bool), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(got, torch.zeros(3))
    got.sum().backward()
    assert none.grad is not None
    assert sequence_sums(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).tolist() == [0.0, 0.0]
    assert sequence_sums(none, torch.zeros(0, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)).shape == (
        0,
    )


@pytest.mark.parametrize(
    ("cu_seqlens", "lengths", "message"),
    [
        (torch.tensor([[0, 6]]), None, r"layout.cu_seqlens: got shape \(1, 2\)"),
        (torch.tensor([0.0, 6.0]), None, "layout.cu_seqlens: got torch.float32, wanted int32 or int64"),
        (torch.tensor([0, 5]), None, r"layout.cu_seqlens: got \[0, 5\], wanted it to rise from 0 to 6"),
        (torch.tensor([1, 6]), None, "wanted it to rise from 0 to 6"),
        (torch.tensor([0, 4, 2, 6]), None, "wanted it to rise from 0 to 6"),
        (torch.tensor([0, 6], device="meta"), None, "layout.cu_seqlens: got meta, wanted cpu"),
        (torch.tensor([0, 6]), (3, 3), r"layout.lengths: got \(count, sum\) \(2, 6\), wanted \(1, 6\)"),
        (torch.tensor([0, 3, 6]), (3, 4), r"layout.lengths: got \(count, sum\) \(2, 7\)"),
        (torch.tensor([0, 3, 6]), (7, -1), "none negative"),
    ],
)
def test_bad_bounds(cu_seqlens: torch.Tensor, lengths: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(cu_seqlens, lengths, torch.zeros(6))
