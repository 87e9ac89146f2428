"""Mistakes that libraries have shipped, each planted in an otherwise correct fused head.

``tests/testing/test_tolerances_have_teeth.py`` demands that the rule finds every one of them and raises no
alarm on the correct head: a tolerance is worth what it catches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.kernels.reference import row_kernel
from fastdpo.testing.cases import Case, HeadResults, make_case, same_sign_case

_TILE = 64  # columns per tile and rows per chunk of the bugs that have tiles or chunks


class _HeadPass(NamedTuple):
    """A correct fused head in low precision, between its forward and its backward pass."""

    rows: Tensor  # (N,) positions of the labelled tokens
    labels: Tensor  # (N,)
    products: Tensor  # (N, V) fp32 raw logits
    logps: Tensor  # (N,) fp32
    d: Tensor  # (N, V) in the inputs' dtype


def emulated_results(case: Case) -> HeadResults:
    """A correct fused head: fp32 logits, softmax and sums; D and the results rounded once."""
    return _backward(case, _forward(case))


def _forward(case: Case, products: Tensor | None = None, labels: Tensor | None = None) -> _HeadPass:
    rows = (case.labels.flatten() != case.ignore_index).nonzero()[:, 0]
    labels = case.labels.flatten()[rows] if labels is None else labels
    if products is None:
        products = case.hidden.flatten(0, 1)[rows].float() @ case.weight.float().T
    logps, lse = products.new_empty(2, len(rows))
    d = torch.empty_like(products, dtype=case.hidden.dtype)
    bias = None if case.bias is None else case.bias.float()
    transform = LogitTransform(bias, case.logit_scale, case.softcap, case.temperature)
    row_kernel(products, labels, transform, RowOutputs(logps, lse), d_out=d)
    return _HeadPass(rows, labels, products, logps, d)


def _backward(case: Case, head: _HeadPass) -> HeadResults:
    g = (case.logit_scale / case.temperature) * case.upstream.flatten()[head.rows, None]  # (N, 1)
    d, dtype = head.d.float(), case.hidden.dtype
    dhidden = torch.zeros_like(case.hidden).flatten(0, 1)
    dhidden[head.rows] = (g * (d @ case.weight.float())).to(dtype)
    scaled_hidden = (g * case.hidden.flatten(0, 1)[head.rows].float()).to(dtype)
    dweight = (d.T @ scaled_hidden.float()).to(dtype)
    dbias = None if case.bias is None else (g * d).sum(0).to(dtype)
    logps = case.upstream.new_zeros(case.labels.numel())
    logps[head.rows] = head.logps
    return HeadResults(logps.view_as(case.labels), dhidden.view_as(case.hidden), dweight, dbias)


def _scaled_gradients(factor: float) -> Callable[[Case], HeadResults]:
    def bug(case: Case) -> HeadResults:
        right = emulated_results(case)
        dbias = None if right.dbias is None else right.dbias * factor
        return HeadResults(right.logps, right.dhidden * factor, right.dweight * factor, dbias)

    return bug


def _mean_over_all_tokens(case: Case) -> HeadResults:
    return _scaled_gradients((case.labels != case.ignore_index).double().mean().item())(case)


def _label_off_by_one(case: Case) -> HeadResults:
    """Only in the backward pass, and only in one row of a hundred."""
    right = _forward(case)
    labels = right.labels.clone()
    labels[1::100] = (labels[1::100] + 1) % case.weight.shape[0]
    return _backward(case, _forward(case, labels=labels)._replace(logps=right.logps))


def _ignored_unmasked(case: Case) -> HeadResults:
    """Ignored tokens are clamped to label 0 and get a gradient; their log-probability is hidden."""
    unmasked = replace(case, labels=case.labels.clamp(min=0))
    return emulated_results(unmasked)._replace(logps=emulated_results(case).logps)


def _bias_per_chunk(case: Case) -> HeadResults:
    """The product is summed in two chunks of H, and each adds the bias."""
    assert case.bias is not None
    return emulated_results(replace(case, bias=2 * case.bias))


def _tail_columns_unwritten(case: Case) -> HeadResults:
    """The gradient stops at the last full tile."""
    right = _forward(case)
    d = right.d.clone()
    d[:, d.shape[1] // _TILE * _TILE :] = 0
    return _backward(case, right._replace(d=d))


def _bf16_accumulate(case: Case) -> HeadResults:
    """The weight gradient is summed over chunks of tokens in bf16."""
    right = _forward(case)
    dweight = torch.zeros_like(case.weight, dtype=torch.bfloat16)
    for start in range(0, len(right.rows), _TILE):
        chunk = _HeadPass(*(t[start : start + _TILE] for t in right))
        dweight += _backward(case, chunk).dweight.bfloat16()
    return _backward(case, right)._replace(dweight=dweight.to(case.weight.dtype))


def _stale_lse(case: Case) -> HeadResults:
    """Each tile is normalised by the logsumexp of the tiles so far, not by the final one."""
    right = _forward(case)
    z = right.products if case.bias is None else right.products + case.bias.float()
    last_of_tile = (torch.arange(z.shape[1]) // _TILE * _TILE + _TILE - 1).clamp(max=z.shape[1] - 1)
    p = torch.exp(z - z.logcumsumexp(1)[:, last_of_tile])
    d = F.one_hot(right.labels, z.shape[1]) - p
    return _backward(case, right._replace(d=d.to(right.d.dtype)))


def _dropped_last_tile(case: Case) -> HeadResults:
    """The last tile takes no part in the logsumexp and gets no gradient; a label there is still read."""
    right = _forward(case)
    columns = torch.arange(case.weight.shape[0])
    dropped = (columns >= (len(columns) - 1) // _TILE * _TILE) & (columns != right.labels[:, None])
    return _backward(case, _forward(case, right.products.masked_fill(dropped, -torch.inf)))


class PlantedBug(NamedTuple):
    """A mistake that libraries have shipped, in an otherwise correct head, and data that shows it."""

    make_case: Callable[..., Case]  # called with seed=
    results: Callable[[Case], HeadResults]


PLANTED_BUGS: dict[str, PlantedBug] = {
    "zero": PlantedBug(make_case, _scaled_gradients(0.0)),
    "sign": PlantedBug(make_case, _scaled_gradients(-1.0)),
    "x1.02": PlantedBug(make_case, _scaled_gradients(1.02)),
    "x1.05": PlantedBug(make_case, _scaled_gradients(1.05)),
    "all-token mean": PlantedBug(make_case, _mean_over_all_tokens),
    "label +1": PlantedBug(make_case, _label_off_by_one),
    "ignored unmasked": PlantedBug(make_case, _ignored_unmasked),
    "bias per chunk": PlantedBug(make_case, _bias_per_chunk),
    "tail columns": PlantedBug(make_case, _tail_columns_unwritten),
    "bf16 accumulate": PlantedBug(same_sign_case, _bf16_accumulate),
    "stale lse": PlantedBug(make_case, _stale_lse),
    "dropped last tile": PlantedBug(make_case, _dropped_last_tile),
}
