"""Mode ``lean``: the head in vocabulary slabs, when memory is all that counts; no autograd.

The other modes hold whole rows of logits, V wide. Here a block of rows meets one slab of the vocabulary at
a time, so that the workspace is bounded whatever V is. Forward pass: each slab's maximum and sums are
merged in order (``kernels/slab.py``), or, in Triton from 16-bit operands, the logits never leave the
registers. Backward pass: with lse known, a slab's logits are recomputed, become the slab's part of D where
they are, and

    dhidden += D W_slab        dweight[slab] = D^T (g h)        dbias[slab] = sum of g D

so that each row of dweight is one full sum, written once, and dhidden is summed in fp32 over the slabs.

Only the row's coefficients a, b, c of (logp, lse, entropy) are left when there are gradients of lse or
entropy too: D is then the gradient of a logp + b lse + c entropy, with a, b, c divided by the largest of
them, and that takes the place of g. So D stays of order 1 in 16 bits whatever the loss is scaled by.

The plan gives the blocks: ``chunk_rows`` rows, ``leading_dim`` vocabulary entries (`fastdpo.plan_lean`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastdpo import plan_lean
from fastdpo.kernels import slab as torch_slab
from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.matmul import LOW_PRECISION, add_bias_grad
from fastdpo.kernels.slab import SlabGradient, SlabSums
from fastdpo.kernels.topk import merge_top, no_top, top_sums, write_top
from fastdpo.ops.checks import accumulation_dtype, fail
from fastdpo.ops.gradients import TokenGrads, add_rows_in_order
from fastdpo.ops.head_call import HeadCall, TopkOutputs, empty_outputs, empty_topk, slice_outputs
from fastdpo.schedule import MIB


def logit_bytes(backend: str, compute_dtype: torch.dtype) -> int:
    """``logit_bytes`` of `fastdpo.plan_lean.lean_blocks` for a resolved backend."""
    return plan_lean.logit_bytes(_is_store_free(backend, compute_dtype), compute_dtype.itemsize)


def _is_store_free(backend: str, compute_dtype: torch.dtype) -> bool:
    """Whether the passes are those of the Triton kernels.

    fp32 goes through the platform's product, which is faster there than products without tensor cores in
    Triton; and the backward pass, to be right to the last bits of fp32, needs the very logits that lse is of.
    """
    return backend == "triton" and compute_dtype in LOW_PRECISION


def forward_lean(
    call: HeadCall,
    statistics: tuple[str, ...],
    k: int = 0,
    *,
    keeps_entropy: bool = False,
    workspace_mib: int = 512,
) -> tuple[RowOutputs, TopkOutputs | None, Tensor, Tensor | None]:
    """As ``forward_chunks``; what is kept is the entropy ``(N,)`` where it needs a gradient, else nothing.

    The k largest logits of every token are held, within ``workspace_mib`` beside the workspace itself.

    Raises:
        ValueError: logits of another dtype than the sums': there are none to be stored in it; or top-k
            statistics of logits that never leave the registers, or of too many tokens.
    """
    _check_topk(call, k, workspace_mib)
    topk = empty_topk(call, k)
    outputs = _score(call, statistics, topk)
    kept = call.hidden.new_empty(0, dtype=call.operand_dtype)
    if keeps_entropy and outputs.entropy is not None:
        kept = outputs.entropy.clone()  # an op may not return one tensor twice
    if call.ref_hidden is None:
        return outputs, topk, kept, None
    return outputs, topk, kept, _score(replace(call, hidden=call.ref_hidden), ()).logps


def _score(call: HeadCall, statistics: tuple[str, ...], topk: TopkOutputs | None = None) -> RowOutputs:
    """Log-probabilities, lse and the statistics asked for, compact ``(N,)``; no logits in memory, or few."""
    _check_logits_dtype(call)
    outputs = empty_outputs(call, statistics)
    if call.plan.num_tokens == 0:
        return outputs
    if _is_store_free(call.backend, call.compute_dtype):
        from fastdpo.kernels.lean_triton import lean_logprobs

        hidden, weight = (
            matrix.to(call.compute_dtype) if matrix.dtype == torch.float64 else matrix
            for matrix in (call.hidden, call.weight)
        )
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()  # once, and not for every launch
        for start in range(0, call.plan.num_tokens, call.plan.score_rows):
            stop = min(start + call.plan.score_rows, call.plan.num_tokens)
            lean_logprobs(
                hidden if call.index is not None else hidden[start:stop],
                weight,
                None if call.index is None else call.index[start:stop],
                call.labels[start:stop],
                call.transform,
                slice_outputs(outputs, start, stop),
                call.compute_dtype,
            )
        return outputs

    _, slope = torch_slab.value_and_slope(call.transform)
    blocks = call.plan.chunks()
    sums = [torch_slab.no_sums(outputs.lse, stop - start, statistics) for start, stop in blocks]
    top = None if topk is None else no_top(outputs.lse, call.plan.num_tokens, topk.k, call.transform)
    workspace = _Workspace(call)
    for first, last in _slabs(call):
        weight = _slab_weight(call, first, last)
        for i, (start, stop) in enumerate(blocks):
            logits = workspace.logits(call.rows(start, stop), weight)
            if top is not None:
                merge_top(top[start:stop], logits, call.transform, first)
            labels = call.labels[start:stop]
            part = torch_slab.slab_sums(logits, labels, call.transform, first, statistics)
            sums[i] = torch_slab.merged(sums[i], part, slope)
    whole = _concatenated(sums)
    torch_slab.write_outputs(whole, call.labels, call.plan.vocab_size, slope, outputs)
    if topk is not None and top is not None:
        for start, stop in blocks:  # one at a time, for what is made of the k values
            part_of, best = topk.slice(start, stop), top_sums(top[start:stop], call.transform)
            write_top(best, outputs.lse[start:stop], part_of.mass, part_of.entropy)
    return outputs


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
        outputs: its lse; its entropy too where ``grads`` has a gradient of it.
        grads: gradients of the labelled tokens' logps, lse and entropy, in the accumulation dtype.
        needs_hidden, needs_weight, needs_bias: which gradients to make.
        grad_weight_out: ``(V, H)``; dweight is added to it and not returned.

    Raises:
        ValueError: a gradient of entropy without the entropy; or as `forward_lean`.
    """
    _check_logits_dtype(call)
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
        self.workspace = _Workspace(call)

    def run(self) -> None:
        """With a frozen head block by block, so that only a block's dhidden is summed at a time."""
        blocks = self.call.plan.chunks()
        trains_head = self.weight is not None or self.bias is not None
        for group in [blocks] if trains_head else [[block] for block in blocks]:
            if self.hidden is not None:
                self.hidden.begin(group[0][0], group[-1][1])
            for first, last in _slabs(self.call):
                self._add_slab(first, last, group)
            if self.hidden is not None:
                self.hidden.finish(self.scale)

    def _add_slab(self, first: int, last: int, blocks: list[tuple[int, int]]) -> None:
        slab_weight = _slab_weight(self.call, first, last)
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
        _add_product(total, d, slab_weight, is_first=start not in self.written)
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
        fits = self.slab.dtype == operand or _sums_wide(self.slab, operand)
        self.is_direct = num_blocks == 1 and fits
        self.sum = self.slab if self.is_direct else self.slab.new_empty(self.slab.shape, dtype=self.acc)
        self.is_first = self.is_new or not self.is_direct

    def add(self, d: Tensor, scaled_rows: Tensor) -> None:
        _add_product(self.sum, d.t(), scaled_rows, is_first=self.is_first)
        self.is_first = False

    def finish(self) -> None:
        if self.is_direct:
            return
        if self.is_new:
            self.slab.copy_(self.sum)
        else:
            self.slab.add_(self.sum)
        del self.sum


class _Workspace:
    """The one buffer that the logits of every block and slab are made in."""

    def __init__(self, call: HeadCall) -> None:
        plan = call.plan
        self._operand_dtype = call.operand_dtype
        shape = (plan.chunk_rows, min(plan.leading_dim, plan.vocab_size))
        # Rows of 16-bit D in place lie 4 bytes an element apart: aligned as rows of logits are.
        self._stride = -(-shape[1] // 16) * 16 if plan.chunk_rows else 0
        self._logits = call.hidden.new_empty((shape[0], self._stride), dtype=call.logits_dtype)

    def logits(self, rows: Tensor, slab_weight: Tensor) -> Tensor:
        out = self._logits[: len(rows), : len(slab_weight)]
        _add_product(out, rows, slab_weight.t(), is_first=True)
        return out

    def d_in_place(self, logits: Tensor) -> Tensor:
        """D's place: the front of each row of logits, in the operands' dtype."""
        flat = self._logits.view(-1).view(self._operand_dtype)
        stride = self._stride * logits.element_size() // flat.element_size()
        return flat.as_strided(tuple(logits.shape), (stride, 1))


def _slabs(call: HeadCall) -> Iterator[tuple[int, int]]:
    vocab_size, step = call.plan.vocab_size, call.plan.leading_dim
    for first in range(0, vocab_size, step):
        yield first, min(first + step, vocab_size)


def _slab_weight(call: HeadCall, first: int, last: int) -> Tensor:
    # Rounded to the compute dtype first: under autocast an fp32 weight counts as bf16.
    return call.weight[first:last].to(call.compute_dtype).to(call.operand_dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """``total (+)= left @ right``, in ``total``'s dtype: the operands', or fp32 over 16 bits on a GPU."""
    if total.dtype == left.dtype:
        if is_first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif is_first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _sums_wide(total: Tensor, operand: torch.dtype) -> bool:
    """Whether this device's GEMM sums 16-bit operands into ``total``."""
    return total.device.type == "cuda" and total.dtype == torch.float32 and operand in LOW_PRECISION


def _concatenated(sums: list[SlabSums]) -> SlabSums:
    columns = zip(*sums, strict=True)
    whole = (None if column[0] is None else torch.cat(column) for column in columns)
    return SlabSums(*whole)  # type: ignore[arg-type]


def _load_slab_gradient(call: HeadCall) -> SlabGradient:
    # Always the one that goes with the forward pass: another tanh would cost fp32 its last bits.
    if _is_store_free(call.backend, call.compute_dtype):
        from fastdpo.kernels.slab_triton import slab_gradient

        return slab_gradient
    return torch_slab.slab_gradient


def _check_topk(call: HeadCall, k: int, workspace_mib: int) -> None:
    if k == 0:
        return
    if _is_store_free(call.backend, call.compute_dtype):
        wanted = "another mode, or backend 'reference': the kernel of mode 'lean' stores no logits to look at"
        raise fail("outputs", "a top-k statistic", wanted)
    num_bytes = call.plan.num_tokens * k * accumulation_dtype(call.compute_dtype).itemsize
    if num_bytes > workspace_mib * MIB:
        got = f"{k}, the logits of which are {num_bytes} bytes for all tokens in mode 'lean'"
        raise fail("topk", got, f"no more than workspace_mib holds, {workspace_mib} MiB")


def _check_logits_dtype(call: HeadCall) -> None:
    wanted = accumulation_dtype(call.compute_dtype)
    if call.logits_dtype != wanted:
        raise fail("execution.logits_dtype", call.logits_dtype, "None with mode 'lean': it stores no logits")
