"""The definitions against hand numbers, torch.distributions and autograd: nothing checks them but this."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from fastdpo.definitions.logprob import linear_logprob_reference
from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.kernels.reference import row_kernel, unavailable_reason
from fastdpo.types import TOKEN_STATISTICS, TOPK_STATISTICS

HEADS = [
    {},
    {"logit_scale": -0.7},
    {"temperature": 1.7},
    {"softcap": 2.0},
    {"logit_scale": 1.3, "softcap": 2.0, "temperature": 0.6},
]


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 4), (7, 4), (7,)))
    labels = torch.randint(7, (2, 5))
    labels[0, 0] = labels[1, 4] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, head: dict) -> Tensor:
    """Hugging Face's and TRL's order, written a second time."""
    logits = F.linear(hidden, weight, bias) * head.get("logit_scale", 1.0)
    if "softcap" in head:
        logits = torch.tanh(logits / head["softcap"]) * head["softcap"]
    return logits / head.get("temperature", 1.0)


def test_by_hand():
    """Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8."""
    hidden = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    out = linear_logprob_reference(hidden, weight, torch.tensor([1, 2]), outputs=TOKEN_STATISTICS)
    assert out.logps.tolist() == pytest.approx([math.log(2 / 8), math.log(5 / 8)])
    assert out.lse.tolist() == pytest.approx([math.log(8)] * 2)
    entropy = (math.log(8) + 2 * math.log(4) + 5 * math.log(8 / 5)) / 8
    assert out.entropy.tolist() == pytest.approx([entropy] * 2)
    assert out.log_sum_sq_probs.tolist() == pytest.approx([math.log((1 + 4 + 25) / 64)] * 2)
    assert out.mean_logit.tolist() == pytest.approx([math.log(10) / 3] * 2)
    assert out.is_top1.tolist() == [False, True]


def test_softcap_by_hand():
    """cap tanh(u / cap) for u = 0 and u = cap artanh(1/2): logits 0 and cap / 2."""
    cap, tau = 30.0, 3.0
    weight = torch.tensor([[0.0], [cap * math.atanh(0.5)]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    out = linear_logprob_reference(one, weight, torch.tensor([0]), softcap=cap, temperature=tau)
    assert out.logps.item() == pytest.approx(-math.log1p(math.exp(cap / 2 / tau)))


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_statistics_against_torch_distributions(head: dict):
    hidden, weight, bias, labels = _inputs()
    names = (*TOKEN_STATISTICS, *TOPK_STATISTICS)
    out = linear_logprob_reference(hidden, weight, labels, bias=bias, outputs=names, topk=3, **head)
    logits = _logits(hidden, weight, bias, head)
    law, safe = Categorical(logits=logits), labels.clamp(min=0)
    want = {
        "logps": law.log_prob(safe),
        "lse": logits.exp().sum(-1).log(),
        "entropy": law.entropy(),
        "log_sum_sq_probs": law.probs.square().sum(-1).log(),
        "mean_logit": logits.mean(-1),
        "is_top1": law.mode == safe,
        "topk_mass": law.probs.sort(-1).values[..., -3:].sum(-1),
        "topk_entropy": -(law.probs * law.logits).gather(-1, law.probs.argsort(-1)[..., -3:]).sum(-1),
    }
    for name, value in want.items():
        got = getattr(out, name)
        assert got.dtype == value.dtype and got.shape == labels.shape
        torch.testing.assert_close(got, value.masked_fill(labels == -100, 0))
    assert not out.topk_mass.requires_grad


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck(head: dict):
    hidden, weight, bias, labels = _inputs()
    outputs = ("lse", "entropy", "log_sum_sq_probs", "mean_logit")

    def differentiable(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = linear_logprob_reference(hidden, weight, labels, bias=bias, outputs=outputs, **head)
        return tuple(value for value in out if value is not None)

    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(differentiable, leaves)


def test_ignored_tokens_take_no_part():
    hidden, weight, _, labels = _inputs()
    hidden[0, 0] = float("nan")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out = linear_logprob_reference(*leaves, labels, outputs=TOKEN_STATISTICS)
    for value in out[:6]:
        assert not value[0, 0] and not value[1, 4]
    dhidden, dweight = torch.autograd.grad(out.logps.sum(), leaves)
    assert dhidden[0, 0].eq(0).all() and dhidden[1, 4].eq(0).all()
    assert dweight.isfinite().all() and dweight.count_nonzero() > 0


def test_ignore_index_and_all_ignored():
    hidden, weight, _, labels = _inputs()
    renamed = linear_logprob_reference(hidden, weight, labels.where(labels != -100, 3), ignore_index=3)
    assert renamed.logps[labels == 3].eq(0).all() and renamed.logps[labels == -100].eq(0).all()
    hidden.requires_grad_()
    none = linear_logprob_reference(hidden, weight, torch.full((2, 5), -100))
    (dhidden,) = torch.autograd.grad(none.logps.sum(), hidden)
    assert none.logps.eq(0).all() and dhidden.eq(0).all()


def test_label_out_of_range_is_nan():
    hidden, weight, _, labels = _inputs()
    labels[0, 1], labels[0, 2] = 7, -5
    out = linear_logprob_reference(hidden, weight, labels, outputs=("lse", "is_top1"))
    assert out.logps.isnan().nonzero().tolist() == [[0, 1], [0, 2]]
    assert out.lse.isfinite().all() and not out.is_top1[0, 1:3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_inputs_are_converted_first(dtype: torch.dtype):
    hidden, weight, bias, labels = _inputs(dtype)
    out = linear_logprob_reference(hidden, weight, labels, bias=bias)
    want = linear_logprob_reference(hidden.double(), weight.double(), labels, bias=bias.double())
    assert out.logps.dtype == torch.float32
    torch.testing.assert_close(out.logps.double(), want.logps, atol=1e-5, rtol=0)


def test_unknown_output_is_refused():
    hidden, weight, _, labels = _inputs()
    with pytest.raises(ValueError, match="perplexity"):
        linear_logprob_reference(hidden, weight, labels, outputs=("lse", "perplexity"))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("has_target", [False, True])
@pytest.mark.parametrize("has_coeffs", [False, True])
def test_row_kernel_gradient_is_autograds(head: dict, has_target: bool, has_coeffs: bool):
    """D times s / tau is the gradient of logp, or of a logp + b lse + c entropy, with respect to x."""
    raw, bias, target = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 9), (9,), (6,)))
    labels = torch.randint(9, (6,))
    coeffs = torch.randn(3, 6, dtype=torch.float64)

    x = raw.scatter(1, labels[:, None], target[:, None]) if has_target else raw.clone()
    z = _logits(x.requires_grad_(), torch.eye(9, dtype=x.dtype), bias, head)
    law = Categorical(logits=z)
    a, b, c = coeffs if has_coeffs else torch.tensor([1.0, 0.0, 0.0])
    value = a * law.log_prob(labels) + b * z.logsumexp(-1) + c * law.entropy()
    (want,) = torch.autograd.grad(value.sum(), x)

    transform = LogitTransform(
        bias, head.get("logit_scale", 1.0), head.get("softcap"), head.get("temperature", 1.0)
    )
    outputs = RowOutputs(*torch.empty(2, 6, dtype=torch.float64))
    d = torch.empty_like(raw)
    row_kernel(
        raw,
        labels,
        transform,
        outputs,
        target_logits=target if has_target else None,
        d_out=d,
        grad_coeffs=coeffs if has_coeffs else None,
    )
    torch.testing.assert_close(d * transform.grad_scale, want)
    torch.testing.assert_close(outputs.logps, law.log_prob(labels).detach())


def test_reference_backend_runs_anywhere():
    assert unavailable_reason() is None and unavailable_reason(torch.device("cuda")) is None
