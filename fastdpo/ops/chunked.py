"""The chunk loops of the head: labelled rows in, log-probabilities and gradients out, no autograd.

One chunk goes  h (C, H) --GEMM--> x (C, V) --row kernel--> logp, lse, D  and, when asked for,  D W (C, H).
The logits live in one workspace that every chunk reuses. D stays there (``stash``, recomputation) or is
written into the cache. The algebra is in DESIGN section 2; with g = (s / tau) dL/dlogp

    dhidden = g (D W)        dweight = sum of D^T (g h)        dbias = sum of g D

so that g scales (C, H) matrices and never a (C, V) one. A gradient of lse adds g_lse p cf to the row, and
p cf = onehot cf - D: hence (g - g_lse) D + g_lse cf_y onehot, whose last term is a row of W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.kernels.contract import LogitTransform, RowKernel, RowOutputs
from fastdpo.kernels.matmul import (
    LOW_PRECISION,
    SlabbedWeight,
    add_bias_grad,
    add_weight_grad,
    hidden_grad_into,
    logits_into,
)
from fastdpo.ops.backends import load_row_kernel
from fastdpo.ops.checks import accumulation_dtype
from fastdpo.plan import MAX_LOW_PRECISION_GROUPS, Plan


@dataclass(frozen=True, eq=False)
class HeadCall:
    """Everything that is the same for every chunk of one call."""

    hidden: Tensor  # (M, H) all positions
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    index: Tensor | None  # (N,) rows of hidden that are labelled; None when all are
    labels: Tensor  # (N,) int64
    transform: LogitTransform
    plan: Plan
    backend: str
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    operand_dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Labelled rows ``[start, stop)`` of hidden in the operands' dtype; a view where it can be."""
        if self.index is None:
            rows = self.hidden[start:stop]
        else:
            rows = self.hidden.index_select(0, self.index[start:stop])
        return rows.to(self.compute_dtype).to(self.operand_dtype)

    def slabbed_weight(self) -> SlabbedWeight:
        return SlabbedWeight(self.weight, self.compute_dtype, self.operand_dtype)

    def safe_labels(self, start: int, stop: int) -> Tensor:
        """Labels usable as an index; an out-of-range one already made its log-probability NaN."""
        return self.labels[start:stop].clamp(0, self.plan.vocab_size - 1)


class _LogitChunks:
    """Fills the workspace with one chunk of logits after another and runs the row kernel on it."""

    def __init__(self, call: HeadCall) -> None:
        self.call = call
        self.weight = call.slabbed_weight()
        plan = call.plan
        self._kernel: RowKernel = load_row_kernel(call.backend)
        self._logits = call.hidden.new_empty((plan.chunk_rows, plan.leading_dim), dtype=call.logits_dtype)

    def process(
        self,
        start: int,
        stop: int,
        outputs: RowOutputs,
        *,
        d_out: Tensor | None = None,
        grad_coeffs: Tensor | None = None,
    ) -> Tensor:
        """Rows ``[start, stop)`` through the product and the kernel; returns the rows of hidden."""
        call = self.call
        rows = call.rows(start, stop)
        logits = self._logits[: stop - start, : call.plan.vocab_size]
        logits_into(logits, rows, self.weight)
        target = None
        if call.logits_dtype == torch.bfloat16:
            target_rows = self.weight.rows(call.safe_labels(start, stop))
            target = (rows.float() * target_rows.float()).sum(-1)
        self._kernel(
            logits,
            call.labels[start:stop],
            call.transform,
            outputs,
            target_logits=target,
            d_out=d_out,
            grad_coeffs=grad_coeffs,
        )
        return rows

    def d_in_place(self, num_rows: int) -> Tensor:
        """D's place in the workspace: the front of each logits row, in the operands' dtype."""
        flat = self._logits.view(-1).view(self.call.operand_dtype)
        stride = flat.numel() // max(self._logits.shape[0], 1)
        return flat.as_strided((num_rows, self.call.plan.vocab_size), (stride, 1))


def empty_outputs(call: HeadCall, statistics: tuple[str, ...]) -> RowOutputs:
    """Compact ``(N,)`` buffers for the log-probabilities, lse and the statistics asked for."""
    num_tokens = call.plan.num_tokens
    dtype = accumulation_dtype(call.compute_dtype)

    def buffer(name: str) -> Tensor | None:
        wanted = name in ("logps", "lse") or name in statistics
        kind = torch.bool if name == "is_top1" else dtype
        return call.hidden.new_empty(num_tokens, dtype=kind) if wanted else None

    return RowOutputs(*(buffer(name) for name in RowOutputs._fields))  # type: ignore[arg-type]


def _slice(outputs: RowOutputs, start: int, stop: int) -> RowOutputs:
    return RowOutputs(*(None if out is None else out[start:stop] for out in outputs))  # type: ignore[arg-type]


def forward_chunks(call: HeadCall, statistics: tuple[str, ...]) -> tuple[RowOutputs, Tensor]:
    """All chunks of the forward pass.

    Returns:
        The compact outputs, and what the mode keeps for the backward pass: ``stash`` D W ``(N, H)``,
        ``cache`` the D of the first rows ``(cached, V)``, else an empty tensor.
    """
    plan = call.plan
    outputs = empty_outputs(call, statistics)
    chunks = _LogitChunks(call)
    kept = call.hidden.new_empty(kept_shape(plan), dtype=call.operand_dtype)
    for start, stop in plan.chunks():
        d_out = None
        if plan.mode == "stash":
            d_out = chunks.d_in_place(stop - start)
        elif stop <= plan.cached_rows:
            d_out = kept[start:stop]
        chunks.process(start, stop, _slice(outputs, start, stop), d_out=d_out)
        if plan.mode == "stash" and d_out is not None:
            hidden_grad_into(kept[start:stop], d_out, chunks.weight)
    return outputs, kept


def kept_shape(plan: Plan) -> tuple[int, ...]:
    """Shape of what ``forward_chunks`` keeps for the backward pass."""
    if plan.mode == "stash":
        return (plan.num_tokens, plan.hidden_size)
    return (plan.cached_rows, plan.vocab_size) if plan.mode == "cache" else (0,)


@dataclass(frozen=True, eq=False)
class TokenGrads:
    """Upstream gradients of the labelled tokens, ``(N,)`` in the accumulation dtype; None for none."""

    logps: Tensor
    lse: Tensor | None
    entropy: Tensor | None


class _Gradients:
    """Where the gradients of one backward pass are summed."""

    def __init__(
        self,
        call: HeadCall,
        *,
        hidden: bool,
        bias: bool,
        weight: bool,
        weight_out: Tensor | None,
        adds_label_rows: bool,
    ) -> None:
        self.call = call
        self.num_groups = 0
        acc = accumulation_dtype(call.compute_dtype)
        make = torch.zeros_like if call.index is not None else torch.empty_like
        self.hidden = make(call.hidden, memory_format=torch.contiguous_format) if hidden else None
        self.bias = call.hidden.new_zeros(call.plan.vocab_size, dtype=acc) if bias else None
        self.weight = weight_out
        if weight and weight_out is None:
            # Rows added one by one are many roundings too: an lse gradient also sums in fp32.
            many = adds_label_rows or call.plan.weight_grad_groups > MAX_LOW_PRECISION_GROUPS
            dtype = acc if many and call.weight.dtype in LOW_PRECISION else call.weight.dtype
            make = torch.empty_like if call.plan.weight_grad_groups else torch.zeros_like
            self.weight = make(call.weight, dtype=dtype, memory_format=torch.contiguous_format)
        self._first_writes = weight_out is None

    def put_hidden(self, start: int, stop: int, grad: Tensor) -> None:
        assert self.hidden is not None
        grad = grad.to(self.hidden.dtype)
        if self.call.index is None:
            self.hidden[start:stop] = grad
        else:
            self.hidden.index_copy_(0, self.call.index[start:stop], grad)

    def add_weight(self, d: Tensor, scaled_rows: Tensor) -> None:
        if self.weight is not None:
            is_first = self._first_writes and self.num_groups == 0
            add_weight_grad(self.weight, d, scaled_rows, is_first=is_first)
            self.num_groups += 1

    def add_label_rows(self, labels: Tensor, rows: Tensor, coeff: Tensor) -> None:
        """Adds ``coeff * row`` to row ``label`` of dweight and ``coeff`` to dbias, in a fixed order."""
        if self.weight is not None:
            _add_rows_in_order(self.weight, labels, (rows * coeff[:, None]).to(self.weight.dtype))
        if self.bias is not None:
            _add_rows_in_order(self.bias, labels, coeff.to(self.bias.dtype))


def _add_rows_in_order(total: Tensor, index: Tensor, rows: Tensor) -> None:
    # Atomics would make the sum depend on timing. On a GPU `index_put_` sorts when it accumulates; on a
    # CPU it does not, but `index_add_` goes row by row.
    if total.device.type == "cuda":
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


def backward_chunks(
    call: HeadCall,
    kept: Tensor,
    outputs: RowOutputs,
    grads: TokenGrads,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    grad_weight_out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dhidden (M, H), dweight (V, H), dbias (V,))`` in their inputs' dtypes; None where not needed.

    ``kept`` is read, never written: a second backward pass finds it as the first did.
    """
    total = _Gradients(
        call,
        hidden=needs_hidden,
        bias=needs_bias,
        weight=needs_weight,
        weight_out=grad_weight_out,
        adds_label_rows=grads.lse is not None,
    )
    if call.plan.mode == "stash":
        _backward_stash(call, kept, outputs, grads, total)
    else:
        for group in _d_groups(call, kept, grads):
            _backward_group(call, group, outputs, grads, total)
    dweight = (
        None if grad_weight_out is not None or total.weight is None else total.weight.to(call.weight.dtype)
    )
    dbias = None if total.bias is None or call.bias is None else total.bias.to(call.bias.dtype)
    return total.hidden, dweight, dbias


def _row_coeff(call: HeadCall, grads: TokenGrads, start: int, stop: int) -> Tensor:
    """The factor of D in each row: (s / tau) (dL/dlogp - dL/dlse)."""
    coeff = grads.logps[start:stop]
    if grads.lse is not None:
        coeff = coeff - grads.lse[start:stop]
    return coeff * call.transform.grad_scale


def _label_coeff(call: HeadCall, outputs: RowOutputs, grads: TokenGrads, start: int, stop: int) -> Tensor:
    """The factor of the label's one-hot that a gradient of lse brings: (s / tau) g_lse cf_y."""
    assert grads.lse is not None
    coeff = grads.lse[start:stop] * call.transform.grad_scale
    cap = call.transform.softcap
    if cap is not None:
        capped = (outputs.logps[start:stop] + outputs.lse[start:stop]) * call.transform.temperature
        coeff = coeff * (1 - (capped / cap).square())
    return coeff


def _backward_stash(
    call: HeadCall, kept: Tensor, outputs: RowOutputs, grads: TokenGrads, total: _Gradients
) -> None:
    """dhidden = g (D W), with D W from the forward pass: no product at all."""
    weight = call.slabbed_weight() if grads.lse is not None else None
    for start, stop in call.plan.chunks():
        dhidden = kept[start:stop] * _row_coeff(call, grads, start, stop)[:, None]
        if weight is not None:
            label_coeff = _label_coeff(call, outputs, grads, start, stop)
            dhidden += label_coeff[:, None] * weight.rows(call.safe_labels(start, stop))
        total.put_hidden(start, stop, dhidden)


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows whose D is at hand: the cached ones, or a recomputed chunk."""

    start: int
    stop: int
    d: Tensor  # (stop - start, V); the full gradient of the products when `is_scaled`
    rows: Tensor | None  # (stop - start, H), where the recomputation has them already
    is_scaled: bool


def _d_groups(call: HeadCall, kept: Tensor, grads: TokenGrads) -> Iterator[_Group]:
    plan = call.plan
    if plan.cached_rows:
        yield _Group(0, plan.cached_rows, kept, None, False)
    if plan.cached_rows == plan.num_tokens:
        return
    chunks = _LogitChunks(call)
    scratch = empty_outputs(call, ("entropy",) if grads.entropy is not None else ())
    for start, stop in plan.chunks():
        if start < plan.cached_rows:
            continue
        coeffs = None
        if grads.entropy is not None:
            lse = torch.zeros_like(grads.logps) if grads.lse is None else grads.lse
            stacked = torch.stack((grads.logps[start:stop], lse[start:stop], grads.entropy[start:stop]))
            coeffs = stacked * call.transform.grad_scale
        d = chunks.d_in_place(stop - start)
        rows = chunks.process(start, stop, _slice(scratch, start, stop), d_out=d, grad_coeffs=coeffs)
        yield _Group(start, stop, d, rows, coeffs is not None)


def _backward_group(
    call: HeadCall, group: _Group, outputs: RowOutputs, grads: TokenGrads, total: _Gradients
) -> None:
    coeff = torch.ones_like(grads.logps[group.start : group.stop])
    if not group.is_scaled:
        coeff = _row_coeff(call, grads, group.start, group.stop)
    weight = call.slabbed_weight()
    if total.hidden is not None:
        _put_hidden_chunks(call, group, coeff, outputs, grads, weight, total)
    if total.weight is not None:
        rows = call.rows(group.start, group.stop) if group.rows is None else group.rows
        scaled = rows if group.is_scaled else (rows * coeff[:, None]).to(call.operand_dtype)
        total.add_weight(group.d, scaled)
    if total.bias is not None:
        add_bias_grad(total.bias, group.d, coeff)
    if grads.lse is not None and not group.is_scaled and (total.weight is not None or total.bias is not None):
        rows = call.rows(group.start, group.stop)
        label_coeff = _label_coeff(call, outputs, grads, group.start, group.stop)
        total.add_label_rows(call.safe_labels(group.start, group.stop), rows, label_coeff)


def _put_hidden_chunks(
    call: HeadCall,
    group: _Group,
    coeff: Tensor,
    outputs: RowOutputs,
    grads: TokenGrads,
    weight: SlabbedWeight,
    total: _Gradients,
) -> None:
    """dhidden of a group, a chunk at a time so that a large cache needs no (N, H) scratch."""
    step = max(call.plan.chunk_rows, 1)
    for start in range(group.start, group.stop, step):
        stop = min(start + step, group.stop)
        local = slice(start - group.start, stop - group.start)
        product = call.hidden.new_empty((stop - start, call.plan.hidden_size), dtype=call.operand_dtype)
        hidden_grad_into(product, group.d[local], weight)
        dhidden = product if group.is_scaled else product * coeff[local, None]
        if grads.lse is not None and not group.is_scaled:
            label_coeff = _label_coeff(call, outputs, grads, start, stop)
            dhidden = dhidden + label_coeff[:, None] * weight.rows(call.safe_labels(start, stop))
        total.put_hidden(start, stop, dhidden)
