"""From D, the unscaled gradient of a group of rows, to dhidden, dweight and dbias.

With g = (s / tau) dL/dlogp of a token,

    dhidden = g (D W)        dweight = sum of D^T (g h)        dbias = sum of g D

so that g scales (C, H) matrices and never a (C, V) one. A gradient of lse adds g_lse p cf to the row, and
p cf = onehot cf - D: hence (g - g_lse) D + g_lse cf_y onehot, whose last term is a row of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.matmul import (
    LOW_PRECISION,
    SlabbedWeight,
    add_bias_grad,
    add_in_slabs,
    add_weight_grad,
    hidden_grad_into,
    sum_dtype,
)
from fastdpo.ops.checks import accumulation_dtype
from fastdpo.ops.head_call import HeadCall, slice_outputs
from fastdpo.plan.call import MAX_LOW_PRECISION_GROUPS


@dataclass(frozen=True, eq=False)
class TokenGrads:
    """Upstream gradients of the labelled tokens, ``(N,)`` in the accumulation dtype; None for none."""

    logps: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DGroup:
    """Labelled rows ``[start, stop)`` whose D is at hand: kept ones, or a recomputed chunk."""

    start: int
    stop: int
    d: Tensor  # (stop - start, V); the full gradient of the products when `is_scaled`
    rows: Tensor | None = None  # (stop - start, H), where the recomputation has them already
    is_scaled: bool = False


class Gradients:
    """Where the gradients of one call are summed, group by group."""

    def __init__(
        self,
        call: HeadCall,
        weight: SlabbedWeight,
        *,
        hidden: bool,
        bias: bool,
        dweight: bool,
        weight_out: Tensor | None = None,
        adds_label_rows: bool = False,
    ) -> None:
        self.call = call
        self.weight = weight
        acc = accumulation_dtype(call.compute_dtype)
        # Rows without a label get no gradient, and repeated rows add theirs up.
        make = torch.empty_like if call.index is None else torch.zeros_like
        self.dhidden = make(call.hidden, memory_format=torch.contiguous_format) if hidden else None
        self.dbias = call.hidden.new_zeros(call.plan.vocab_size, dtype=acc) if bias else None
        self.dweight = weight_out
        self._weight_out = weight_out
        self._is_first_product = False
        # Rows added one by one are many roundings too: an lse gradient also sums in fp32.
        num_groups = call.plan.weight_grad_groups
        many = adds_label_rows or num_groups > MAX_LOW_PRECISION_GROUPS
        into = call.weight if weight_out is None else weight_out
        if dweight and (weight_out is None or (many and weight_out.dtype in LOW_PRECISION)):
            dtype = acc if many and into.dtype in LOW_PRECISION else into.dtype
            make = torch.empty_like if num_groups else torch.zeros_like
            self.dweight = make(into, dtype=dtype, memory_format=torch.contiguous_format)
            self._is_first_product = True

    def add_group(self, group: DGroup, outputs: RowOutputs, grads: TokenGrads) -> None:
        """All that a group gives: one product for dhidden, one for dweight."""
        call = self.call
        coeff = None if group.is_scaled else row_coeff(call, grads, group.start, group.stop)
        adds_label_rows = grads.lse is not None and not group.is_scaled
        if self.dhidden is not None:
            self._add_hidden(group, coeff, outputs, grads if adds_label_rows else None)
        if self.dweight is not None:
            rows = call.rows(group.start, group.stop) if group.rows is None else group.rows
            # In place only where rows are no view of the caller's; one rounding, no wider copy on the way.
            is_own = group.rows is None and call.index is not None
            if coeff is not None:
                rows = torch.mul(rows, coeff[:, None], out=rows if is_own else torch.empty_like(rows))
            add_weight_grad(self.dweight, group.d, rows, is_first=self._is_first_product)
            self._is_first_product = False
        if self.dbias is not None:
            ones = torch.ones_like(grads.logps[group.start : group.stop]) if coeff is None else coeff
            add_bias_grad(self.dbias, group.d, ones)
        if adds_label_rows and (self.dweight is not None or self.dbias is not None):
            label_coeff = label_row_coeff(call, outputs, grads, group.start, group.stop)
            self._add_label_rows(group.start, group.stop, label_coeff)

    def _add_hidden(
        self, group: DGroup, coeff: Tensor | None, outputs: RowOutputs, lse_grads: TokenGrads | None
    ) -> None:
        """dhidden of a group, in pieces so that a large cache needs no (N, H) scratch."""
        call, plan = self.call, self.call.plan
        step = plan.hidden_piece(group.stop - group.start)
        for start in range(group.start, group.stop, step):
            stop = min(start + step, group.stop)
            local = slice(start - group.start, stop - group.start)
            d = group.d[local]
            product = call.hidden.new_empty((stop - start, plan.hidden_size), dtype=sum_dtype(d))
            hidden_grad_into(product, d, self.weight, plan.hidden_parts(stop - start))
            self.put_scaled(
                start,
                stop,
                product,
                None if coeff is None else coeff[local],
                None if lse_grads is None else label_row_coeff(call, outputs, lse_grads, start, stop),
            )

    def put_scaled(
        self, start: int, stop: int, product: Tensor, coeff: Tensor | None, label_coeff: Tensor | None
    ) -> None:
        """dhidden of labelled rows from their D W ``(stop - start, H)``: scaled, and rounded once.

        ``coeff``: of each row, None for 1; ``label_coeff``: of the label's row of W, None for 0.
        """
        assert self.dhidden is not None
        if label_coeff is not None:
            label_rows = self.weight.rows(self.call.safe_labels(start, stop))
            scaled = product if coeff is None else product * coeff[:, None]
            self.put_hidden(start, stop, scaled.add_(label_coeff[:, None] * label_rows))
        elif coeff is None:
            self.put_hidden(start, stop, product)
        elif self.call.index is None:
            torch.mul(product, coeff[:, None], out=self.dhidden[start:stop])
        else:
            scaled = product.new_empty(product.shape, dtype=self.dhidden.dtype)
            self.put_hidden(start, stop, torch.mul(product, coeff[:, None], out=scaled))

    def put_hidden(self, start: int, stop: int, dhidden: Tensor) -> None:
        """``dhidden (stop - start, H)`` of labelled rows to where these are in the batch."""
        assert self.dhidden is not None
        dhidden = dhidden.to(self.dhidden.dtype)
        if self.call.index is None:
            self.dhidden[start:stop] = dhidden
        elif self.call.has_repeats:
            add_rows_in_order(self.dhidden, self.call.index[start:stop], dhidden)
        else:
            self.dhidden.index_copy_(0, self.call.index[start:stop], dhidden)

    def _add_label_rows(self, start: int, stop: int, coeff: Tensor) -> None:
        """Adds ``coeff * row`` to row ``label`` of dweight and ``coeff`` to dbias, in a fixed order."""
        labels = self.call.safe_labels(start, stop)
        if self.dweight is not None:
            rows = self.call.rows(start, stop) * coeff[:, None]
            add_rows_in_order(self.dweight, labels, rows.to(self.dweight.dtype))
        if self.dbias is not None:
            add_rows_in_order(self.dbias, labels, coeff.to(self.dbias.dtype))

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``(dhidden, dweight, dbias)`` in their inputs' dtypes; None where there is none."""
        dweight = None
        if self.dweight is not None and self._weight_out is None:
            dweight = self.dweight.to(self.call.weight.dtype)
        elif (
            self.dweight is not None and self._weight_out is not None and self.dweight is not self._weight_out
        ):
            add_in_slabs(self._weight_out, self.dweight)
        dbias = self.dbias
        if dbias is not None and self.call.bias is not None:
            dbias = dbias.to(self.call.bias.dtype)
        return self.dhidden, dweight, dbias


def row_coeff(call: HeadCall, grads: TokenGrads, start: int, stop: int) -> Tensor:
    """The factor of D in each row: (s / tau) (dL/dlogp - dL/dlse)."""
    coeff = grads.logps[start:stop]
    if grads.lse is not None:
        coeff = coeff - grads.lse[start:stop]
    scale = call.transform.grad_scale
    return coeff if scale == 1 else coeff * scale


def label_row_coeff(call: HeadCall, outputs: RowOutputs, grads: TokenGrads, start: int, stop: int) -> Tensor:
    """The factor of the label's one-hot that a gradient of lse brings: (s / tau) g_lse cf_y."""
    assert grads.lse is not None
    coeff = grads.lse[start:stop] * call.transform.grad_scale
    if call.transform.softcap is not None:
        coeff = coeff * cap_factor(call, slice_outputs(outputs, start, stop))
    # A label outside the vocabulary, as one of another rank's shard is, has no one-hot.
    return coeff.masked_fill_(call.safe_labels(start, stop) != call.labels[start:stop], 0)


def cap_factor(call: HeadCall, outputs: RowOutputs) -> Tensor:
    """cf of the label's logit, of a head with a cap: 1 - (softcap(..) / cap)^2 of the rows of ``outputs``."""
    cap = call.transform.softcap
    assert cap is not None
    capped = (outputs.logps + outputs.lse) * call.transform.temperature
    return 1 - (capped / cap).square()


def add_rows_in_order(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """``total[index[i]] += rows[i]`` for every i, one after the other."""
    # Atomics would make the sum depend on timing. On a GPU `index_put_` sorts when it accumulates; on a
    # CPU it does not, but `index_add_` goes row by row.
    if total.device.type == "cuda":
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)
