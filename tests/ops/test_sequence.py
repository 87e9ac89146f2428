"""``fastdpo::sequence_sums`` as torch knows it, its checks, and ``sigmoid_pairs`` for a caller."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses.aggregate import sequence_sums as aggregate_sums
from fastdpo.ops.sequence import sequence_sums, sigmoid_pairs, token_sequence_ids
from fastdpo.types import BACKENDS
from tests.ops.common import backend_or_skip

FP32, FP64 = torch.float32, torch.float64
OFFSETS = torch.tensor([0, 3, 3, 10, 11])
NUM_TOKENS = 11


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return backend_or_skip(request.param)


def tokens(dtype: torch.dtype = FP32, *, has_nan: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Values, weights and a mask; what does not count is NaN."""
    values, weights = -torch.rand(NUM_TOKENS, dtype=dtype), torch.rand(NUM_TOKENS, dtype=dtype)
    mask = torch.ones(NUM_TOKENS, dtype=torch.bool)
    mask[[1, 4, 10]] = False
    if has_nan:
        values[~mask] = weights[~mask] = math.nan
    return values, weights, mask


@pytest.mark.parametrize(
    ("dtype", "name", "has_weights", "has_mask"),
    [
        (FP32, "cpu", False, False),
        (FP32, "cpu", True, True),
        (FP32, "reference", False, True),
        (FP32, "reference", True, False),
        (FP64, "auto", False, True),
        (FP64, "auto", True, False),
    ],
)
def test_opcheck(dtype: torch.dtype, name: str, has_weights: bool, has_mask: bool) -> None:
    name = backend_or_skip(name, dtype)
    # NaN is not equal to itself, as opcheck would have it.
    values, weights, mask = tokens(dtype, has_nan=False)
    args = (
        values.requires_grad_(),
        weights if has_weights else None,
        mask if has_mask else None,
        OFFSETS,
        token_sequence_ids(OFFSETS, NUM_TOKENS),
        name,
    )
    torch.library.opcheck(torch.ops.fastdpo.sequence_sums.default, args)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_weights", [False, True])
def test_gradcheck(has_weights: bool, has_mask: bool) -> None:
    """First and second derivatives, in fp64."""
    values, weights, mask = tokens(FP64, has_nan=False)

    def op(x: Tensor) -> Tensor:
        return sequence_sums(
            x, OFFSETS, weights=weights if has_weights else None, mask=mask if has_mask else None
        )

    values.requires_grad_()
    assert torch.autograd.gradcheck(op, values)
    assert torch.autograd.gradgradcheck(op, values)


def test_gradient_is_the_weight_of_what_counts(backend: str) -> None:
    values, weights, mask = tokens()
    values.requires_grad_()
    sums = sequence_sums(values, OFFSETS, weights=weights, mask=mask, backend=backend)
    upstream = torch.tensor([2.0, 100.0, -3.0, 5.0])
    (gradient,) = torch.autograd.grad(sums, values, upstream)
    of_sequence = torch.tensor([2.0] * 3 + [-3.0] * 7 + [5.0])
    assert torch.equal(gradient, (of_sequence * weights).where(mask, 0))


def test_same_as_the_sums_of_the_losses(backend: str) -> None:
    """Without weights nothing is rounded in between: both add in fp64 and round once, each in its order."""
    values, _, mask = tokens()
    ours = sequence_sums(values, OFFSETS, mask=mask, backend=backend)
    torch.testing.assert_close(ours, aggregate_sums(values, mask, OFFSETS), rtol=2**-23, atol=0)
    same = sequence_sums(values, OFFSETS.int(), mask=mask, backend=backend)
    given = token_sequence_ids(OFFSETS, NUM_TOKENS)
    also = sequence_sums(values, OFFSETS, mask=mask, sequence_ids=given, backend=backend)
    assert torch.equal(ours, same) and torch.equal(ours, also)


def test_inputs_need_not_be_contiguous(backend: str) -> None:
    values, weights, mask = tokens()
    plain = sequence_sums(values, OFFSETS, weights=weights, mask=mask, backend=backend)
    strided = [torch.stack([t, t], dim=1)[:, 0] for t in (values, OFFSETS, weights, mask)]
    assert not any(t.is_contiguous() for t in strided)
    x, offsets, w, m = strided
    assert torch.equal(sequence_sums(x, offsets, weights=w, mask=m, backend=backend), plain)
    terms = {"divisor": 2.0, "beta": 0.1, "backend": backend}
    ours = sigmoid_pairs(x, offsets, weights=w, mask=m, **terms)
    same = sigmoid_pairs(values, OFFSETS, weights=weights, mask=mask, **terms)
    assert all(map(torch.equal, ours, same))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP64], ids=str)
def test_weights_are_converted(backend: str, dtype: torch.dtype) -> None:
    values, weights, mask = tokens()
    ours = sequence_sums(values, OFFSETS, weights=weights.to(dtype), mask=mask, backend=backend)
    rounded = weights.to(dtype).float()
    assert torch.equal(ours, sequence_sums(values, OFFSETS, weights=rounded, mask=mask, backend=backend))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 4, 0, 1, 0)], ids=str)
def test_sequence_ids(lengths: tuple[int, ...]) -> None:
    for dtype in (torch.int64, torch.int32):
        offsets = torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)
        ids = token_sequence_ids(offsets, sum(lengths))
        wanted = [number for number, length in enumerate(lengths) for _ in range(length)]
        assert ids.dtype == torch.int64 and ids.tolist() == wanted


# Inductor alone checks the strides that fake kernels promise, and compiles for seconds.
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_a_graph_break(compiler: str) -> None:
    """Whole graph, forward and backward, for batches of any size; the same numbers as eager."""
    torch._dynamo.reset()

    def loss(values: Tensor, offsets: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        return sequence_sums(2 * values, offsets, weights=weights, mask=mask).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for lengths in ((3, 0, 5), (30, 1, 7, 8, 0)):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        values, weights = torch.randn(2, sum(lengths))
        mask = torch.rand(sum(lengths)) < 0.5
        results = []
        for function in (loss, compiled):
            leaf = values.clone().requires_grad_()
            value = function(leaf, offsets, weights, mask)
            value.backward()
            results.append((value.detach(), leaf.grad))
        for eager, ours in zip(*results, strict=True):
            # Inductor may reorder the outer sums.
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def test_compile_does_not_recompile_for_every_batch() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, o: sequence_sums(x, o).sum(), backend=counter, fullgraph=True)
    for length in range(5, 25):
        compiled(torch.randn(length), torch.tensor([0] * (length - 3) + [length]))
    assert counter.frame_count <= 2  # the first, and one with dynamic shapes


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_takes_part_in_a_loss(compiler: str) -> None:
    """The gradient reaches what the values were made of, with NaN outside the mask kept out of it."""
    torch._dynamo.reset()
    values, _, mask = tokens(has_nan=False)
    scale = torch.tensor(1.5, requires_grad=True)

    def loss(s: Tensor) -> Tensor:
        return sequence_sums((s * values).where(mask, math.nan), OFFSETS, mask=mask).sum()

    torch.compile(loss, fullgraph=True, backend=compiler)(scale).backward()
    torch.testing.assert_close(scale.grad, values.where(mask, 0).sum(), rtol=1e-6, atol=0)


def test_sigmoid_pairs_of_the_docs_example(backend: str) -> None:
    """log(1 + e^-0.2) = 0.5981388694: log-ratios of 1 and -1 at beta 0.1."""
    values = torch.tensor([-5.0, -7.0, -15.0], requires_grad=True)
    offsets, ref_sums = torch.tensor([0, 2, 3]), torch.tensor([-13.0, -14.0])
    results = sigmoid_pairs(values, offsets, divisor=1, ref_sums=ref_sums, backend=backend)
    assert results.loss.float().item() == torch.tensor(0.5981388693815918).item()
    g = 0.1 / (1 + math.exp(0.2))
    torch.testing.assert_close(results.g, torch.tensor([-g, -g, g]), rtol=2**-23, atol=0)
    assert results.sums.tolist() == [-12.0, -15.0]
    assert not any(result.requires_grad for result in results)


def test_sigmoid_pairs_converts_what_it_is_given(backend: str) -> None:
    """0-d tensors, other dtypes, an integer divisor: the same as plain fp32 tensors of one number a pair."""
    values, weights, mask = tokens()
    plain = sigmoid_pairs(
        values, OFFSETS, divisor=torch.tensor(2.0), beta=torch.full((2,), 0.25), margin=torch.full((2,), 0.5),
        soft_labels=torch.full((2,), 0.75), pair_weights=torch.full((2,), 1.5), ref_sums=torch.zeros(4),
        weights=weights, mask=mask, backend=backend,
    )  # fmt: skip
    other = sigmoid_pairs(
        values, OFFSETS.int(), divisor=torch.tensor(2), beta=torch.tensor(0.25),
        margin=torch.tensor(0.5).bfloat16(), soft_labels=torch.full((2,), 0.75).double(),
        pair_weights=1.5, ref_sums=torch.zeros(4).double(),
        weights=weights.double(), mask=mask, backend=backend,
    )  # fmt: skip
    assert all(map(torch.equal, plain, other))


def test_sigmoid_pairs_in_fp64() -> None:
    values, weights, mask = tokens(FP64)
    results = sigmoid_pairs(values, OFFSETS, divisor=2.0, label_smoothing=0.2, weights=weights, mask=mask)
    assert all(result.dtype == FP64 for result in results)
    single = sigmoid_pairs(
        values.float(), OFFSETS, divisor=2.0, label_smoothing=0.2, weights=weights.float(), mask=mask
    )
    torch.testing.assert_close(results.loss, single.loss, rtol=1e-6, atol=0)
    for name in ("cpu", "triton", "cuda"):
        with pytest.raises(TypeError, match="float64 runs on the 'reference' backend only"):
            sigmoid_pairs(values, OFFSETS, divisor=2.0, backend=name)


def test_backends_by_name() -> None:
    """One asked for by name runs or raises, as for the head."""
    values, _, _ = tokens(has_nan=False)
    for name in BACKENDS:
        try:
            sequence_sums(values, OFFSETS, backend=name)
        except ValueError as error:
            assert str(error).startswith(f"backend: {name!r} does not run on cpu")
            assert name not in ("auto", "reference")


VALUES = torch.zeros(NUM_TOKENS)
BAD_TOKENS: dict[str, list[dict[str, Any]]] = {
    "values": [{"values": VALUES[None]}, {"values": VALUES.bfloat16()}, {"values": VALUES.long()}],
    "offsets": [
        {"offsets": OFFSETS.float()},
        {"offsets": OFFSETS[None]},
        {"offsets": OFFSETS[:0]},
        {"offsets": OFFSETS[1:]},
        {"offsets": OFFSETS[:-1]},
        {"offsets": OFFSETS.flip(0)},
        {"offsets": torch.tensor([0, 5, 3, 11])},
        {"offsets": OFFSETS.to("meta")},
    ],
    "weights": [
        {"weights": VALUES[1:]},
        {"weights": VALUES.long()},
        {"weights": torch.ones(NUM_TOKENS, requires_grad=True)},
    ],
    "mask": [{"mask": VALUES}, {"mask": torch.ones(3, dtype=torch.bool)}],
    "backend": [{"backend": "gpu"}],
}
BAD_PAIRS: dict[str, list[dict[str, Any]]] = {
    "offsets": [{"offsets": torch.tensor([0, 3, 4, 11])}],
    "beta": [{"beta": x} for x in (0.0, -1.0, math.inf, math.nan, True, "0.1", torch.ones(3), OFFSETS[:2])],
    "margin": [{"margin": x} for x in (math.nan, math.inf, torch.ones(1), torch.ones(2, device="meta"))],
    "soft_labels": [{"soft_labels": x} for x in (-0.1, 1.1, math.nan, torch.ones(2, 1))],
    "label_smoothing": [{"label_smoothing": x} for x in (0.5, -0.1, math.nan, torch.tensor(0.1))],
    "pair_weights": [{"pair_weights": x} for x in (-1.0, math.inf, torch.ones(4))],
    "divisor": [{"divisor": x} for x in (0, -1.0, math.nan, None, torch.ones(2), torch.ones(1))],
    "ref_sums": [{"ref_sums": x} for x in (torch.zeros(2), OFFSETS[:4], torch.zeros(4, device="meta"))],
}  # fmt: skip


def flat(table: dict[str, list[dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(name, bad, id=f"{name}{i}") for name, bads in table.items() for i, bad in enumerate(bads)
    ]


@pytest.mark.parametrize(("name", "bad"), flat(BAD_TOKENS))
def test_bad_tokens_are_refused(name: str, bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {"values": VALUES, "offsets": OFFSETS}
    with pytest.raises(ValueError, match=f"^{name}: got"):
        sequence_sums(**(good | bad))
    with pytest.raises(ValueError, match=f"^{name}: got"):
        sigmoid_pairs(**(good | {"divisor": 2.0} | bad))


@pytest.mark.parametrize(("name", "bad"), flat(BAD_PAIRS))
def test_bad_terms_are_refused(name: str, bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {"values": VALUES, "offsets": OFFSETS, "divisor": 2.0}
    sigmoid_pairs(**good)
    with pytest.raises(ValueError, match=f"^{name}: got"):
        sigmoid_pairs(**(good | bad))


def test_what_is_no_tensor_is_refused() -> None:
    for name in ("values", "offsets", "weights", "mask", "sequence_ids"):
        good: dict[str, Any] = {"values": VALUES, "offsets": OFFSETS}
        with pytest.raises(TypeError, match=f"^{name}: got list"):
            sequence_sums(**(good | {name: [1.0]}))


def test_two_ways_to_say_one_thing_are_refused() -> None:
    with pytest.raises(ValueError, match="^label_smoothing: got 0.1 together with soft_labels"):
        sigmoid_pairs(VALUES, OFFSETS, divisor=1.0, label_smoothing=0.1, soft_labels=0.9)


@pytest.mark.parametrize(
    "ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(NUM_TOKENS, dtype=torch.int32)]
)
def test_bad_sequence_ids_are_refused(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="^sequence_ids: got"):
        sequence_sums(VALUES, OFFSETS, sequence_ids=ids)


def test_the_op_refuses_weights_that_want_a_gradient() -> None:
    """Who calls the op itself gets an error, not a gradient of zero."""
    values, weights, _ = tokens(has_nan=False)
    ids = token_sequence_ids(OFFSETS, NUM_TOKENS)
    leaves = values.requires_grad_(), weights.requires_grad_()
    sums = torch.ops.fastdpo.sequence_sums(*leaves, None, OFFSETS, ids, "auto")
    with pytest.raises(RuntimeError, match="weights: .* no gradient"):
        sums.sum().backward()
