"""Shapes, memory layouts, masks and bad values: what the op does with inputs that are legal but awkward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo import Execution, LMHead, linear_logprob
from fastdpo.definitions.logprob import linear_logprob_reference
from fastdpo.testing import assert_close_to_fp64, assert_logps_close, eager_results, fp64_results, make_case
from tests.ops.common import backend_or_skip, leaves, op_results, run_op

SMALL = Execution(workspace_mib=1)


@pytest.mark.promise(12)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("vocab", [2, 65])
@pytest.mark.parametrize("hidden_size", [1, 9])
def test_every_rank_and_size(shape: tuple[int, ...], vocab: int, hidden_size: int) -> None:
    hidden = torch.randn(*shape, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    labels = torch.randint(vocab, shape)
    out = linear_logprob(hidden, weight, labels, outputs=("lse",))
    assert out.logps.shape == shape and out.lse is not None and out.lse.shape == shape
    dhidden, dweight = torch.autograd.grad(out.logps.sum(), (hidden, weight))
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    truth = linear_logprob_reference(h, w, labels)
    dh, dw = torch.autograd.grad(truth.logps.sum(), (h, w))
    assert_logps_close(out.logps.detach(), truth.logps.detach(), torch.float32, hidden_size=hidden.shape[-1])
    assert dhidden.shape == hidden.shape and dweight.shape == weight.shape
    torch.testing.assert_close(dhidden.double(), dh, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dweight.double(), dw, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 40),
    hidden_size=st.integers(1, 24),
    vocab=st.integers(2, 300),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    logit_scale=st.sampled_from([-1.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
    ignored=st.floats(0, 1),
)
def test_any_shape_and_mask(
    num_tokens: int,
    hidden_size: int,
    vocab: int,
    softcap: float | None,
    temperature: float,
    logit_scale: float,
    seed: int,
    ignored: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab, hidden_size, generator=generator)
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = -100
    options = {"softcap": softcap, "temperature": temperature, "logit_scale": logit_scale}
    out = linear_logprob(hidden, LMHead(weight, **options), labels)  # type: ignore[arg-type]
    truth = linear_logprob_reference(hidden.double(), weight.double(), labels, **options)  # type: ignore[arg-type]
    assert_logps_close(out.logps, truth.logps, torch.float32, hidden_size=hidden_size)
    assert (out.logps[labels == -100] == 0).all()


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def _sliced(t: Tensor) -> Tensor:
    return torch.cat((t, torch.full_like(t, float("nan"))), -1)[..., : t.shape[-1]]


def _misaligned(t: Tensor) -> Tensor:
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


@pytest.mark.promise(16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [_sliced, _misaligned])
def test_awkward_layouts_of_hidden_and_labels(layout: object, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    expected = run_op(case, *leaves(case), execution=SMALL).logps
    labels = _misaligned(case.labels)
    out = linear_logprob(layout(case.hidden), case.lm_head, labels, execution=SMALL)  # type: ignore[operator]
    assert torch.equal(out.logps, expected)


@pytest.mark.promise(16)
@pytest.mark.parametrize("layout", [_transposed, _sliced, _misaligned])
def test_awkward_layouts_of_the_weight(layout: object) -> None:
    """BLAS may sum in another order for another layout, so values are held to the rule, not to the bit."""
    case = make_case(dtype=torch.float32, has_bias=False)
    truth, eager = fp64_results(case), eager_results(case)
    h, w = case.hidden.clone().requires_grad_(), layout(case.weight).requires_grad_()  # type: ignore[operator]
    out = linear_logprob(h, w, case.labels, execution=SMALL)
    dhidden, dweight = torch.autograd.grad(out.logps, (h, w), case.upstream)
    assert_logps_close(out.logps.detach(), truth.logps, torch.float32, hidden_size=case.hidden.shape[-1])
    assert_close_to_fp64(dweight, truth.dweight, eager.dweight)
    assert_close_to_fp64(dhidden.flatten(0, 1), truth.dhidden.flatten(0, 1), eager.dhidden.flatten(0, 1))


@pytest.mark.promise(16)
def test_integer_and_stride_zero_inputs() -> None:
    case = make_case(dtype=torch.float32)
    h, w, b = leaves(case)
    out = run_op(case, h, w, b)
    dense = torch.autograd.grad(out.logps, h, torch.ones_like(out.logps), retain_graph=True)
    expanded = torch.autograd.grad(out.logps, h, torch.ones(()).expand_as(out.logps))
    assert torch.equal(dense[0], expanded[0])
    as_int32 = linear_logprob(case.hidden, case.lm_head, case.labels.int())
    assert torch.equal(as_int32.logps, out.logps)


@pytest.mark.promise(18)
def test_all_ignored_is_zero_with_a_connected_graph() -> None:
    case = make_case(dtype=torch.bfloat16)
    case.labels.fill_(case.ignore_index)
    results = op_results(case)
    for value in results:
        assert value is not None and (value == 0).all()


@pytest.mark.promise(20)
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_any_ignore_index(ignore_index: int) -> None:
    case = make_case(dtype=torch.float32, has_bias=False)
    labels = torch.where(case.labels == 3, 4, case.labels)
    expected = linear_logprob(case.hidden, case.weight, labels).logps
    labels = torch.where(labels == -100, ignore_index, labels)
    out = linear_logprob(case.hidden, case.weight, labels, ignore_index=ignore_index)
    assert torch.equal(out.logps, expected)


@pytest.mark.promise(7)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_in_an_ignored_row_change_nothing(value: float) -> None:
    case = make_case(dtype=torch.float32)
    clean = op_results(case)
    case.hidden[case.labels == case.ignore_index] = value
    dirty = op_results(case)
    for one, two in zip(clean, dirty, strict=True):
        assert one is not None and two is not None and torch.equal(one, two)


@pytest.mark.promise(6)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_bad_row_stays_alone(value: float, backend: str) -> None:
    backend_or_skip(backend)
    case = make_case(dtype=torch.float32)
    execution = Execution(backend=backend)
    row = tuple((case.labels != case.ignore_index).nonzero()[5].tolist())
    clean = op_results(case, execution)
    case.hidden[row] = value
    dirty = op_results(case, execution)
    others = torch.ones_like(case.labels, dtype=torch.bool)
    others[row] = False
    assert dirty.logps[row].isnan()
    assert torch.equal(dirty.logps[others], clean.logps[others])
    assert torch.equal(dirty.dhidden[others], clean.dhidden[others])


@pytest.mark.parametrize("shuffled", [False, True])
def test_token_index_is_the_same_as_finding_it(shuffled: bool) -> None:
    case = make_case(dtype=torch.float32, has_bias=False)
    index = (case.labels != case.ignore_index).flatten().nonzero().squeeze(1)
    if shuffled:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    results = []
    for token_index in (None, index):
        h, w, _ = leaves(case)
        out = run_op(case, h, w, None, token_index=token_index)
        results.append((out.logps.detach(), *torch.autograd.grad(out.logps, (h, w), case.upstream)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(
            one, two, rtol=0 if not shuffled else 1e-5, atol=0 if not shuffled else 1e-5
        )


def test_positions_outside_token_index_count_as_ignored() -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(5, 4)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    out = linear_logprob(hidden, weight, labels, token_index=torch.tensor([4, 1]))
    whole = linear_logprob(hidden, weight, labels)
    torch.testing.assert_close(out.logps[[1, 4]], whole.logps[[1, 4]])  # products of other shapes: other bits
    assert (out.logps[[0, 2, 3, 5]] == 0).all()


@pytest.mark.promise(5)
def test_a_vocabulary_masked_with_minus_infinity() -> None:
    weight, hidden = torch.randn(40, 8), torch.randn(5, 8)
    bias = torch.zeros(40)
    bias[:17] = float("-inf")
    labels = torch.tensor([20, 30, 3, 39, 17])
    out = linear_logprob(hidden, LMHead(weight, bias=bias), labels, outputs=("lse",))
    logits = (hidden.double() @ weight.double().T + bias.double()).log_softmax(-1)
    expected = logits.gather(1, labels[:, None])[:, 0]
    assert out.logps[2] == float("-inf")
    kept = [0, 1, 3, 4]
    assert_logps_close(out.logps[kept], expected[kept], torch.float32, hidden_size=hidden.shape[-1])
