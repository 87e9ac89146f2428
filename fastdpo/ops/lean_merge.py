"""What slabs of the vocabulary give, merged: a block's results, and its sum of D W.

Every number is relative to the slab's own logsumexp first; the weight of a slab in the whole is
w = e^(lse_slab - lse). A running lse takes the place of lse, so that a new slab scales both what is there
and what it brings. A slab of nothing but masked logits (lse = -inf) has the weight 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fastdpo.kernels import slab as torch_slab
from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.matmul import SlabbedWeight, hidden_grad_into, sum_dtype
from fastdpo.kernels.topk import merge_top, no_top
from fastdpo.ops.backends import load_row_kernel
from fastdpo.ops.checks import accumulation_dtype
from fastdpo.ops.gradients import cap_factor
from fastdpo.ops.head_call import HeadCall
from fastdpo.ops.lean_slabs import lean_kernel


class SlabLabels:
    """Which slabs of the forward pass have the labels of a block's C rows."""

    def __init__(self, call: HeadCall, labels: Tensor, starts: Tensor) -> None:
        """``starts (K,)``: the first token of every slab, from `slab_starts`."""
        self.local = labels - starts[:, None]  # (K, C), in each slab's own count
        last = self.local[-1] < call.plan.vocab_size - (len(starts) - 1) * call.plan.score_slab
        self.is_own = (self.local >= 0) & (self.local < call.plan.score_slab)  # (K, C)
        self.is_own[-1] &= last
        self.is_elsewhere = ~self.is_own
        self.is_none = self.is_elsewhere.all(0)  # (C,) a label outside of the vocabulary


def slab_starts(call: HeadCall) -> Tensor:
    """``(K,)`` the first token of every slab of the forward pass."""
    return torch.arange(0, call.plan.vocab_size, call.plan.score_slab, device=call.hidden.device)


class Block(Protocol):
    """The results of a block's C rows, slab by slab, in order."""

    def add(self, logits: Tensor, first: int, d: Tensor | None) -> Tensor:
        """Take in the raw products ``(C, S)`` of tokens from ``first`` on; writes their D, if asked for,
        relative to their own logsumexp, which it returns ``(C,)``."""
        ...

    def write(self, outputs: RowOutputs) -> None:
        """The results of the whole vocabulary."""
        ...


def load_block(call: HeadCall, labels: Tensor, where: SlabLabels, statistics: tuple[str, ...]) -> Block:
    """An empty one for the rows of some labels, of the kernel that the call runs on."""
    if lean_kernel(call.backend, call.compute_dtype) == "torch":
        return TorchBlock(call, labels, statistics)
    return KernelBlock(call, where, statistics)


class TorchBlock:
    """By plain torch: the sums and D of ``kernels/slab.py``, whose backward pass has the same tanh."""

    def __init__(self, call: HeadCall, labels: Tensor, statistics: tuple[str, ...]) -> None:
        self.call, self.labels, self.statistics = call, labels, statistics
        _, self.slope = torch_slab.value_and_slope(call.transform)
        like = call.hidden.new_empty(0, dtype=accumulation_dtype(call.compute_dtype))
        self.sums = torch_slab.no_sums(like, len(labels), statistics)

    def add(self, logits: Tensor, first: int, d: Tensor | None) -> Tensor:
        transform = self.call.transform
        part = torch_slab.slab_sums(logits, self.labels, transform, first, self.statistics)
        self.sums = torch_slab.merged(self.sums, part, self.slope)
        is_here = (self.labels >= first) & (self.labels < first + logits.shape[1])
        part, logps, _ = torch_slab.with_labels(part, is_here, self.slope)
        lse = torch_slab.logsumexp(part, self.slope)
        if d is not None:
            base = lse.masked_fill(lse == -torch.inf, 0.0)  # p of nothing but masked logits is 0
            torch_slab.slab_gradient(logits, self.labels, logps, base, transform, first, d)
        return lse

    def write(self, outputs: RowOutputs) -> None:
        vocab_size = self.call.plan.vocab_size
        torch_slab.write_outputs(self.sums, self.labels, vocab_size, self.slope, outputs)


class KernelBlock:
    """By a row kernel, for which a slab is a vocabulary of its own; a label elsewhere is no label of it.

    What K slabs give is held ``(K, C)`` and merged at the end, in as many launches as one slab would take.
    """

    def __init__(self, call: HeadCall, where: SlabLabels, statistics: tuple[str, ...]) -> None:
        self.call, self.where = call, where
        self.kernel = load_row_kernel(call.backend)
        shape, dtype = where.local.shape, accumulation_dtype(call.compute_dtype)
        wanted = ("logps", "lse", *(name for name in statistics if name not in ("lse", "is_top1")))
        values = call.hidden.new_empty((len(wanted), *shape), dtype=dtype)
        self.of_labels = values[:2]  # log-probabilities and logsumexp
        parts = dict(zip(wanted, values, strict=True))
        self.parts = RowOutputs(*(parts.get(name) for name in RowOutputs._fields))  # type: ignore[arg-type]
        self.lse: list[Tensor] = []  # of the slabs so far
        # The foremost raw product so far ``(C, 1)``, bias included, and the label's in every slab.
        self.top: Tensor | None = None
        self.label_values: list[Tensor] = []
        if "is_top1" in statistics:
            self.top = no_top(values, shape[1], 1, call.transform)

    def add(self, logits: Tensor, first: int, d: Tensor | None) -> Tensor:
        width, at = logits.shape[1], len(self.lse)
        bias = self.call.transform.bias
        transform = replace(self.call.transform, bias=None if bias is None else bias[first : first + width])
        labels = self.where.local[at]
        if self.top is not None:
            merge_top(self.top, logits, self.call.transform, first)
            column = labels.clamp(0, width - 1)
            value = logits.gather(1, column[:, None])[:, 0]
            self.label_values.append(value if transform.bias is None else value + transform.bias[column])
        part = RowOutputs(*(None if out is None else out[at] for out in self.parts))  # type: ignore[arg-type]
        self.kernel(logits, labels, transform, part, d_out=d)
        self.lse.append(torch.logaddexp(self.lse[-1], part.lse) if self.lse else part.lse)
        return part.lse

    def write(self, outputs: RowOutputs) -> None:
        lse = self.lse[-1]
        outputs.lse.copy_(lse)
        own_logp, own_lse = self.of_labels.masked_fill(self.where.is_elsewhere, 0.0).sum(1)
        logp = own_logp.add_(own_lse - lse)
        if self.call.transform.bias is not None:
            # A masked label in a slab of masked ones, which has no log-probability of its own.
            logp.masked_fill_((own_lse == -torch.inf) & (lse != -torch.inf), -torch.inf)
        outputs.logps.copy_(logp.masked_fill_(self.where.is_none, torch.nan))
        if any(out is not None for out in outputs[2:]):
            self._write_statistics(outputs, lse)

    def _write_statistics(self, outputs: RowOutputs, lse: Tensor) -> None:
        parts, plan = self.parts, self.call.plan
        log_weights = parts.lse - lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf would be NaN
        weights = log_weights.exp()
        is_empty = weights == 0  # what such a slab has may be NaN
        if outputs.entropy is not None and parts.entropy is not None:
            shares = weights * (parts.entropy - log_weights)
            outputs.entropy.copy_(shares.masked_fill_(is_empty, 0.0).sum(0))
        if outputs.log_sum_sq_probs is not None and parts.log_sum_sq_probs is not None:
            squares = (parts.log_sum_sq_probs + 2 * log_weights).masked_fill_(is_empty, -torch.inf)
            outputs.log_sum_sq_probs.copy_(torch.logsumexp(squares, 0))
        if outputs.mean_logit is not None and parts.mean_logit is not None:
            widths = (plan.vocab_size - slab_starts(self.call)).clamp(max=plan.score_slab)
            outputs.mean_logit.copy_((parts.mean_logit * widths[:, None]).sum(0) / plan.vocab_size)
        if outputs.is_top1 is not None and self.top is not None:
            own = torch.stack(self.label_values).masked_fill_(self.where.is_elsewhere, 0.0).sum(0)
            outputs.is_top1.copy_(~self.where.is_none & (own == self.top[:, 0]) & (lse == lse))


class ProductSum:
    """D W of a block, ``(C, H)``: the slabs' products, each relative to the logsumexp so far."""

    def __init__(self, call: HeadCall, out: Tensor, where: SlabLabels) -> None:
        self.call, self.out, self.where = call, out, where
        self.total = out
        self.has_more = call.plan.score_slab < call.plan.vocab_size
        self.is_masked = self.has_more and call.transform.bias is not None  # logits may be, by a bias of -inf
        self.parts: list[Tensor] = []  # the slabs' logsumexp (C,)
        self.lse: Tensor | None = None  # of them so far
        self.product: Tensor | None = None

    def add(self, d: Tensor, weight: Tensor, lse: Tensor) -> None:
        """A slab's D ``(C, S)``, its rows of W, its logsumexp ``(C,)``."""
        parts = self.call.plan.slab_parts(len(d), d.shape[1])
        whole = SlabbedWeight(weight, weight.dtype, weight.dtype)
        self.parts.append(lse)
        if self.lse is None:
            if sum_dtype(d) != self.out.dtype and self.has_more:
                self.total = self.out.new_empty(self.out.shape, dtype=sum_dtype(d))
            hidden_grad_into(self.total, d, whole, parts)
            self._mask(self.total, lse)
            self.lse = lse
            return
        if self.product is None:
            self.product = torch.empty_like(self.total)
        hidden_grad_into(self.product, d, whole, parts)
        self._mask(self.product, lse)
        both = torch.logaddexp(self.lse, lse)
        base = both.masked_fill(both == -torch.inf, 0.0) if self.is_masked else both
        self.total.mul_((self.lse - base).exp_()[:, None])
        self.total.addcmul_(self.product, (lse - base).exp_()[:, None])
        self.lse = both

    def _mask(self, product: Tensor, lse: Tensor) -> None:
        """A row kernel's D of nothing but masked logits is NaN: 0 where other slabs have more."""
        if self.is_masked:
            product.masked_fill_((lse == -torch.inf)[:, None], 0.0)

    def finish(self, outputs: RowOutputs, safe_labels: Tensor) -> None:
        """Adds the label's share of what the other slabs hold, and rounds the sum to where it is kept."""
        self.product = None
        if self.lse is not None and self.has_more:
            shares = (torch.stack(self.parts) - self.lse).exp_()  # NaN where all logits are masked
            coeff = shares.masked_fill_(self.where.is_own, 0.0).sum(0)
            if self.call.transform.softcap is not None:
                coeff *= cap_factor(self.call, outputs)
            coeff.masked_fill_(self.where.is_none, 0.0)
            rows = self.call.slabbed_weight().rows(safe_labels)
            self.total.addcmul_(rows, coeff[:, None])
        if self.total is not self.out:
            self.out.copy_(self.total)
