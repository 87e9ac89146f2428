"""Mode ``lean``, backward: a slab's logits again, D in their place, and the gradients summed from it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.kernels import slab as torch_slab
from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.matmul import add_bias_grad, add_product, has_wide_sums
from fastdpo.kernels.slab import SlabGradient
from fastdpo.ops.checks import accumulation_dtype, fail
from fastdpo.ops.gradients import TokenGrads, add_rows_in_order
from fastdpo.ops.head_call import HeadCall
from fastdpo.ops.lean_slabs import (
    SlabWorkspace,
    check_logits_dtype,
    lean_kernel,
    slabs,
    weight_slab,
)


def backward_lean(
    call: HeadCall,
    outputs: RowOutputs,
    grads: TokenGrads,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    grad_weight_out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dhidden (M, H), dweight (V, H), dbias (V,))`` in their inputs' dtypes; None where not needed.

    Args:
        call: the call of the forward pass.
        outputs: its logps and lse; its entropy too where ``grads`` has a gradient of it.
        grads: gradients of the labelled tokens' logps, lse and entropy, in the accumulation dtype.
        needs_hidden, needs_weight, needs_bias: which gradients to make.
        grad_weight_out: ``(V, H)``; dweight is added to it and not returned.

    Raises:
        ValueError: a gradient of entropy without the entropy; or as `forward_lean`.
    """
    check_logits_dtype(call)
    if grads.entropy is not None and outputs.entropy is None:
        raise fail("outputs.entropy", "None with a gradient of entropy", "the forward pass's entropy")
    acc = accumulation_dtype(call.compute_dtype)
    hidden = _HiddenGrad(call, acc) if needs_hidden else None
    weight = _WeightGrad(call, acc, grad_weight_out) if needs_weight else None
    bias = call.hidden.new_zeros(call.plan.vocab_size, dtype=acc) if needs_bias else None
    if call.plan.num_tokens:
        _Backward(call, outputs, grads, hidden, weight, bias).run()
    elif weight is not None and grad_weight_out is None:
        weight.total.zero_()
    return (
        None if hidden is None else hidden.out,
        None if weight is None or grad_weight_out is not None else weight.total,
        None if bias is None or call.bias is None else bias.to(call.bias.dtype),
    )


class _Backward:
    """One backward pass: a D for every slab and block of rows, and what is summed from it."""

    def __init__(
        self,
        call: HeadCall,
        outputs: RowOutputs,
        grads: TokenGrads,
        hidden: _HiddenGrad | None,
        weight: _WeightGrad | None,
        bias: Tensor | None,
    ) -> None:
        self.call, self.outputs = call, outputs
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.scale, self.coeffs = _row_scale(call, grads)
        self.gradient = _load_slab_gradient(call)
        self.workspace = SlabWorkspace(call, call.plan.chunk_rows, call.plan.leading_dim)

    def run(self) -> None:
        """With a frozen head block by block, so that only a block's dhidden is summed at a time."""
        blocks = self.call.plan.chunks()
        trains_head = self.weight is not None or self.bias is not None
        for group in [blocks] if trains_head else [[block] for block in blocks]:
            if self.hidden is not None:
                self.hidden.begin(group[0][0], group[-1][1])
            for first, last in slabs(self.call, self.call.plan.leading_dim):
                self._add_slab(first, last, group)
            if self.hidden is not None:
                self.hidden.finish(self.scale)

    def _add_slab(self, first: int, last: int, blocks: list[tuple[int, int]]) -> None:
        slab_weight = weight_slab(self.call, first, last)
        if self.weight is not None:
            self.weight.begin(first, last, len(blocks))
        for start, stop in blocks:
            rows = self.call.rows(start, stop)
            d = self._gradient_of(first, start, stop, rows, slab_weight)
            if self.hidden is not None:
                self.hidden.add(start, stop, d, slab_weight)
            if self.weight is not None:
                # Rounded as it is written: no fp32 copy of the rows.
                self.weight.add(d, torch.mul(rows, self.scale[start:stop, None], out=torch.empty_like(rows)))
            if self.bias is not None:
                add_bias_grad(self.bias[first:last], d, self.scale[start:stop])
        if self.weight is not None:
            self.weight.finish()

    def _gradient_of(self, first: int, start: int, stop: int, rows: Tensor, slab_weight: Tensor) -> Tensor:
        logits = self.workspace.logits(rows, slab_weight)
        d = self.workspace.d_in_place(logits)
        entropy = None if self.coeffs is None or self.outputs.entropy is None else self.outputs.entropy
        self.gradient(
            logits,
            self.call.labels[start:stop],
            self.outputs.logps[start:stop],
            self.outputs.lse[start:stop],
            self.call.transform,
            first,
            d,
            coeffs=None if self.coeffs is None else self.coeffs[:, start:stop].contiguous(),
            entropy=None if entropy is None else entropy[start:stop],
        )
        return d


def _row_scale(call: HeadCall, grads: TokenGrads) -> tuple[Tensor, Tensor | None]:
    """What multiplies each row of D ``(N,)``, and the coefficients ``(3, N)`` that D is made with, if any."""
    if grads.lse is None and grads.entropy is None:
        return grads.logps * call.transform.grad_scale, None
    zeros = torch.zeros_like(grads.logps)
    coeffs = torch.stack(
        (
            grads.logps,
            zeros if grads.lse is None else grads.lse,
            zeros if grads.entropy is None else grads.entropy,
        )
    )
    largest = coeffs.abs().amax(0)
    coeffs = coeffs / largest.where(largest != 0, 1.0)
    return largest * call.transform.grad_scale, coeffs


class _HiddenGrad:
    """dhidden, summed over the slabs for one range of rows after another."""

    def __init__(self, call: HeadCall, acc: torch.dtype) -> None:
        self.call = call
        make = torch.zeros_like if call.index is not None else torch.empty_like
        self.out = make(call.hidden, memory_format=torch.contiguous_format)
        # One slab is one product, whose own sum is fp32.
        self.dtype = call.operand_dtype if call.plan.leading_dim >= call.plan.vocab_size else acc
        self.start = 0

    def begin(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        if self.call.index is None and self.out.dtype == self.dtype:
            self.total = self.out[start:stop]
        else:
            self.total = self.out.new_empty((stop - start, self.out.shape[1]), dtype=self.dtype)
        self.written: set[int] = set()  # blocks that have their first product

    def add(self, start: int, stop: int, d: Tensor, slab_weight: Tensor) -> None:
        total = self.total[start - self.start : stop - self.start]
        add_product(total, d, slab_weight, is_first=start not in self.written)
        self.written.add(start)

    def finish(self, scale: Tensor) -> None:
        self.total.mul_(scale[self.start : self.stop, None])
        if self.call.index is not None:
            index, dtype = self.call.index[self.start : self.stop], self.out.dtype
            if self.call.has_repeats:
                add_rows_in_order(self.out, index, self.total.to(dtype))
            else:  # in blocks, as there is no room for all rows cast
                step = self.call.plan.chunk_rows
                for rows, part in zip(index.split(step), self.total.split(step), strict=True):
                    self.out.index_copy_(0, rows, part.to(dtype))
        elif self.out.dtype != self.dtype:
            self.out[self.start : self.stop] = self.total
        del self.total


class _WeightGrad:
    """dweight, one slab after another: one product where all rows are one block, else an fp32 sum."""

    def __init__(self, call: HeadCall, acc: torch.dtype, out: Tensor | None) -> None:
        self.call, self.acc = call, acc
        self.is_new = out is None
        self.total = (
            torch.empty_like(call.weight, memory_format=torch.contiguous_format) if out is None else out
        )

    def begin(self, first: int, last: int, num_blocks: int) -> None:
        self.slab = self.total[first:last]
        operand = self.call.operand_dtype
        fits = self.slab.dtype == operand or has_wide_sums(self.slab, operand)
        self.is_direct = num_blocks == 1 and fits
        self.sum = self.slab if self.is_direct else self.slab.new_empty(self.slab.shape, dtype=self.acc)
        self.is_first = self.is_new or not self.is_direct

    def add(self, d: Tensor, scaled_rows: Tensor) -> None:
        add_product(self.sum, d.t(), scaled_rows, is_first=self.is_first)
        self.is_first = False

    def finish(self) -> None:
        if self.is_direct:
            return
        if self.is_new:
            self.slab.copy_(self.sum)
        else:
            self.slab.add_(self.sum)
        del self.sum


def _load_slab_gradient(call: HeadCall) -> SlabGradient:
    # Always the one that goes with the forward pass: another tanh would cost fp32 its last bits.
    if lean_kernel(call.backend, call.compute_dtype) == "triton":
        from fastdpo.kernels.slab_triton import slab_gradient

        return slab_gradient
    return torch_slab.slab_gradient
