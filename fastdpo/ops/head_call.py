"""One call of the head: what is the same for all its chunks, and the workspace that they go through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.kernels.contract import LogitTransform, RowKernel, RowOutputs
from fastdpo.kernels.matmul import LOW_PRECISION, SlabbedWeight, add_logits, logits_into
from fastdpo.kernels.topk import chunk_top_sums, write_top
from fastdpo.ops.backends import load_row_kernel
from fastdpo.ops.checks import accumulation_dtype
from fastdpo.plan.plan import Plan
from fastdpo.plan.schedule import leading_dim


@dataclass(frozen=True, eq=False)
class LowRank:
    """A narrow product that is added to the logits: LoRA's, whose states are scale * dropout(h) A^T."""

    states: Tensor  # (M, r) in the logits' dtype; on a GPU that product's operands of 16 bits, (M, K)
    weight: SlabbedWeight  # (V, r) or (V, K), likewise

    def rows(self, index: Tensor | None, start: int, stop: int) -> Tensor:
        """States of labelled rows ``[start, stop)``."""
        if index is None:
            return self.states[start:stop]
        return self.states.index_select(0, index[start:stop])


@dataclass(frozen=True, eq=False)
class TopkOutputs:
    """``topk_mass`` and ``topk_entropy`` of N labelled tokens, ``(N,)`` each, of k tokens."""

    k: int
    mass: Tensor
    entropy: Tensor

    def slice(self, start: int, stop: int) -> TopkOutputs:
        """Those of labelled rows ``[start, stop)``."""
        return TopkOutputs(self.k, self.mass[start:stop], self.entropy[start:stop])


@dataclass(frozen=True, eq=False)
class HeadCall:
    """Everything that is the same for every chunk of one call."""

    hidden: Tensor  # (M, H) all positions
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    index: Tensor | None  # (N,) rows of hidden that are labelled; None when all are, in order
    has_repeats: bool  # whether a row may be in the index more than once
    labels: Tensor  # (N,) int64
    ref_hidden: Tensor | None  # (M, H) the reference's states, scored with the same head, chunk by chunk
    transform: LogitTransform
    plan: Plan
    backend: str
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    operand_dtype: torch.dtype
    low_rank: LowRank | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Labelled rows ``[start, stop)`` of hidden in the operands' dtype; a view where it can be."""
        return self._rows_of(self.hidden, start, stop)

    def ref_rows(self, start: int, stop: int) -> Tensor:
        """The same rows of the reference's hidden states."""
        assert self.ref_hidden is not None
        return self._rows_of(self.ref_hidden, start, stop)

    def _rows_of(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        if self.index is None:
            rows = hidden[start:stop]
        else:
            rows = hidden.index_select(0, self.index[start:stop])
        rows = rows.to(self.compute_dtype).to(self.operand_dtype)
        return rows.contiguous() if reads_padding(rows) else rows

    def slabbed_weight(self) -> SlabbedWeight:
        return SlabbedWeight(self.weight, self.compute_dtype, self.operand_dtype)

    def safe_labels(self, start: int, stop: int) -> Tensor:
        """Labels usable as an index; an out-of-range one already made its log-probability NaN."""
        return self.labels[start:stop].clamp(0, self.plan.vocab_size - 1)


class LogitChunks:
    """One workspace that every chunk of logits goes through: ``fill`` it, then run the kernel on its rows."""

    def __init__(self, call: HeadCall, weight: SlabbedWeight | None = None, *, keeps_d: bool = False) -> None:
        """``keeps_d``: D stays in the workspace, which then holds a block of chunks and not one chunk."""
        self.call = call
        self.weight = call.slabbed_weight() if weight is None else weight
        plan = call.plan
        self._kernel: RowKernel = load_row_kernel(call.backend)
        num_rows = plan.block_rows if keeps_d else plan.chunk_rows
        self._logits = row_buffer(call, num_rows, dtype=call.logits_dtype)
        self._start = 0  # the labelled row that row 0 of the workspace is for
        self._first = 0  # the labelled row that the last product began with
        self._rows: Tensor | None = None  # of hidden, where the label's logit is to be made of them

    def process(
        self,
        start: int,
        stop: int,
        outputs: RowOutputs,
        *,
        d_out: Tensor | None = None,
        grad_coeffs: Tensor | None = None,
        topk: TopkOutputs | None = None,
        at: int = 0,
    ) -> None:
        """Rows ``[start, stop)`` through the product and the kernel.

        ``at``: where in the workspace, behind the D of a block's earlier chunks.
        """
        self.fill(start, stop, at)
        self.run_kernel(start, stop, outputs, d_out=d_out, grad_coeffs=grad_coeffs, topk=topk)

    def score_reference(self, start: int, stop: int, outputs: RowOutputs) -> None:
        """The reference's rows ``[start, stop)``: a product of the same shape as the policy's.

        Not one product for both: GEMM libraries do not give a row the same bits at every place (seen with
        MKL for small odd row counts), and policy == reference has to give exactly 0.
        """
        self.fill(start, stop, of_reference=True)
        self.run_kernel(start, stop, outputs)

    def fill(self, start: int, stop: int, at: int = 0, *, of_reference: bool = False) -> None:
        """The logits of labelled rows ``[start, stop)``, from row ``at`` of the workspace on."""
        self._rows = None  # those of the chunk before are given back first
        rows = self.call.ref_rows(start, stop) if of_reference else self.call.rows(start, stop)
        self._start, self._first = start - at, start
        if self.call.logits_dtype == torch.bfloat16:
            self._rows = rows
        logits = self._logits[at : at + len(rows), : self.call.plan.vocab_size]
        logits_into(logits, rows, self.weight)
        if (low_rank := self.call.low_rank) is not None:
            # Second, so that an adapter whose B is still 0 adds exact zeros to the bits of the plain head.
            states = low_rank.rows(self.call.index, start, stop)
            add_logits(logits, states, low_rank.weight)

    def run_kernel(
        self,
        start: int,
        stop: int,
        outputs: RowOutputs,
        *,
        d_out: Tensor | None = None,
        grad_coeffs: Tensor | None = None,
        topk: TopkOutputs | None = None,
    ) -> None:
        """The row kernel on labelled rows ``[start, stop)`` of those that ``fill`` brought; once for each."""
        call = self.call
        local = slice(start - self._start, stop - self._start)
        target = None
        if self._rows is not None:
            target_rows = self.weight.rows(call.safe_labels(start, stop))
            rows = self._rows[start - self._first : stop - self._first]
            target = (rows.float() * target_rows.float()).sum(-1)
        logits, labels = self._logits[local, : call.plan.vocab_size], call.labels[start:stop]
        top_sums = None
        if topk is not None:  # first: the kernel may overwrite the logits
            top_sums = chunk_top_sums(logits, labels, call.transform, topk.k, target_logits=target)
        self._kernel(
            logits,
            labels,
            call.transform,
            outputs,
            target_logits=target,
            d_out=d_out,
            grad_coeffs=grad_coeffs,
        )
        if topk is not None and top_sums is not None:
            write_top(top_sums, outputs.lse, topk.mass, topk.entropy)

    def gradient_block(
        self,
        block: list[tuple[int, int]],
        outputs: RowOutputs,
        *,
        grad_coeffs: Tensor | None = None,
        topk: TopkOutputs | None = None,
    ) -> Tensor:
        """D ``(R, V)`` of a block's R rows, in the workspace; ``block`` are the row ranges of its chunks.

        ``outputs``, ``grad_coeffs (3, N)`` and ``topk`` are those of all N rows.
        """
        first = block[0][0]
        d = self.d_in_place(block[-1][1] - first)
        for start, stop in block:
            self.process(
                start,
                stop,
                slice_outputs(outputs, start, stop),
                d_out=d[start - first : stop - first],
                grad_coeffs=None if grad_coeffs is None else grad_coeffs[:, start:stop].contiguous(),
                topk=None if topk is None else topk.slice(start, stop),
                at=start - first,
            )
        return d

    def d_in_place(self, num_rows: int) -> Tensor:
        """D's place in the workspace: the front of each logits row, in the operands' dtype."""
        return front_of_rows(self._logits, num_rows, self.call)


def front_of_rows(logits: Tensor, num_rows: int, call: HeadCall) -> Tensor:
    """``(num_rows, V)`` in the operands' dtype, over the front of each row of a workspace."""
    flat = logits.view(-1).view(call.operand_dtype)
    stride = flat.numel() // max(logits.shape[0], 1)
    return flat.as_strided((num_rows, call.plan.vocab_size), (stride, 1))


def empty_d(call: HeadCall, *num_rows: int) -> Tensor:
    """``(*num_rows, V)`` for a compact D; its rows start where wide accesses can, also if V is odd."""
    return row_buffer(call, *num_rows, dtype=call.operand_dtype)[..., : call.plan.vocab_size]


def row_buffer(call: HeadCall, *num_rows: int, dtype: torch.dtype) -> Tensor:
    """``(*num_rows, leading_dim)``: rows of V numbers, and of what is behind them."""
    vocab_size = call.plan.vocab_size
    buffer = call.hidden.new_empty((*num_rows, leading_dim(vocab_size)), dtype=dtype)
    if reads_padding(buffer):
        buffer[..., vocab_size:] = 0
    return buffer


def reads_padding(operand: Tensor) -> bool:
    """Whether a product of such operands reads what lies behind their rows too: a NaN there is in its sums.

    Seen with oneDNN's products of bf16 on CPUs with AMX, whose tiles have rows of 64 bytes.
    """
    return operand.dtype in LOW_PRECISION and operand.device.type == "cpu"


def empty_outputs(call: HeadCall, statistics: tuple[str, ...]) -> RowOutputs:
    """Compact ``(N,)`` buffers for the log-probabilities, lse and the statistics asked for."""
    num_tokens = call.plan.num_tokens
    dtype = accumulation_dtype(call.compute_dtype)

    def buffer(name: str) -> Tensor | None:
        wanted = name in ("logps", "lse") or name in statistics
        kind = torch.bool if name == "is_top1" else dtype
        return call.hidden.new_empty(num_tokens, dtype=kind) if wanted else None

    return RowOutputs(*(buffer(name) for name in RowOutputs._fields))  # type: ignore[arg-type]


def empty_topk(call: HeadCall, k: int) -> TopkOutputs | None:
    """Compact ``(N,)`` buffers for the statistics of the k most likely tokens; None where k is 0."""
    if k == 0:
        return None
    size, dtype = call.plan.num_tokens, accumulation_dtype(call.compute_dtype)
    return TopkOutputs(k, *(call.hidden.new_empty(size, dtype=dtype) for _ in range(2)))


def slice_outputs(outputs: RowOutputs, start: int, stop: int) -> RowOutputs:
    return RowOutputs(*(None if out is None else out[start:stop] for out in outputs))  # type: ignore[arg-type]
