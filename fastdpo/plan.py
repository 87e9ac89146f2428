"""How one call of the head will run: mode, chunks, what is kept, matrix products and bytes.

Pure arithmetic: no tensor, no torch. The ops follow the `Plan` they get from here, and `explain_plan`
prints the same object, so what is printed is what runs. The chunks themselves come from ``schedule.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from fastdpo.plan_lean import logit_bytes, make_lean_plan
from fastdpo.plan_memory import peak_bytes
from fastdpo.schedule import (
    GROUP_ROWS,
    MIB,
    PairGroup,
    chunk_and_block_rows,
    chunk_rows,
    group_pairs,
    holds_a_chunk_row,
    leading_dim,
)

# Up to this many products may be summed in a 16-bit gradient: measured error 2.4 to 2.9e-3, against
# 1.7e-3 for a single rounding; more than that and the sum is fp32 (DESIGN section 3).
MAX_LOW_PRECISION_GROUPS = 5


@dataclass(frozen=True)
class Plan:
    """What one call does. Bytes are predictions of what is allocated beyond inputs and outputs."""

    mode: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    chunk_rows: int
    block_rows: int  # of the chunks whose D, where it stays in the workspace, is one product's operand
    leading_dim: int
    cached_rows: int
    gemm_passes_forward: float
    gemm_passes_backward: float
    weight_grad_groups: int
    workspace_bytes: int
    kept_bytes: int
    weight_copy_bytes: int  # of the weight in the operands' dtype, on a GPU: made forward and again backward
    weight_sum_bytes: int  # of dW in the dtype it is summed in, where that is not the dtype it is returned in
    score_rows: int  # of `lean` with a kernel that stores no logits: rows of one launch; else 0
    peak_bytes: int  # the most that is allocated at once, gradients included: see `fastdpo.plan_memory`
    groups: tuple[PairGroup, ...]  # of mode `pairs`
    group_rows: int  # of the longest of them that is not recomputed: the buffer for its D

    @property
    def gemm_passes(self) -> float:
        """Matrix products of 2 N H V FLOP, forward and backward together."""
        return self.gemm_passes_forward + self.gemm_passes_backward

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges ``[start, stop)`` of the chunks, in order."""
        step = max(self.chunk_rows, 1)
        return [(start, min(start + step, self.num_tokens)) for start in range(0, self.num_tokens, step)]

    def blocks(self, start: int = 0, stop: int | None = None) -> list[list[tuple[int, int]]]:
        """Row ranges of the chunks of ``[start, stop)``, block by block; by default of all rows."""
        stop = self.num_tokens if stop is None else stop
        step = max(self.chunk_rows, 1)
        chunks = [(first, min(first + step, stop)) for first in range(start, stop, step)]
        joined = max(self.block_rows // step, 1)
        return [chunks[i : i + joined] for i in range(0, len(chunks), joined)]

    def __str__(self) -> str:
        kept = {
            "stash": "D W for the backward pass",
            "cache": "D for the backward pass",
            "pairs": "D of one group of pairs, until its gradient is known",
            "lean": "the fp32 sum of dhidden in the backward pass",
        }.get(self.mode, "nothing")
        lines = [
            f"mode          {self.mode}",
            f"tokens        {self.num_tokens} labelled",
            f"head          hidden {self.hidden_size}, vocabulary {self.vocab_size}",
            f"chunks        {len(self.chunks())} of up to {self.chunk_rows} rows"
            + (f", {self.leading_dim} vocabulary entries at a time" if self.mode == "lean" else "")
            + (f"; forward {self.score_rows} rows" if self.score_rows else ""),
            f"GEMM passes   {self.gemm_passes:.2f} (forward {self.gemm_passes_forward:.2f}, "
            f"backward {self.gemm_passes_backward:.2f})",
            f"workspace     {self.workspace_bytes / MIB:.1f} MiB of logits",
            f"kept          {self.kept_bytes / MIB:.1f} MiB ({kept})",
        ]
        if self.weight_copy_bytes:
            lines.append(f"weight copy   {self.weight_copy_bytes / MIB:.1f} MiB, in the products' dtype")
        if self.weight_sum_bytes:
            lines.append(f"fp32 sum      {self.weight_sum_bytes / MIB:.1f} MiB of dweight, cast at the end")
        lines.append(f"peak          {self.peak_bytes / MIB:.1f} MiB at once, gradients included")
        if self.mode == "cache":
            lines.append(f"cached rows   {self.cached_rows} of {self.num_tokens}; the rest is recomputed")
        if self.mode == "pairs":
            again = sum(group.is_recomputed for group in self.groups)
            lines.append(
                f"groups        {len(self.groups)} of whole pairs, up to {self.group_rows} rows; "
                f"{again} pairs too long for that are recomputed"
            )
        return "\n".join(lines)


def resolve_mode(
    mode: str,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool = False,
    entropy_requires_grad: bool = False,
    cache_mib: int = 1024,
    has_pair_loss: bool = False,
    holds_a_row: bool = True,
) -> str:
    """The mode that runs, from the one asked for and what needs a gradient.

    Without any gradient to compute every mode is ``score``: the modes differ in the backward pass only.
    ``has_pair_loss``: the loss is known to the call and each pair's share of it depends on that pair alone.

    Raises:
        ValueError: the mode asked for cannot give the gradients needed, or is not supported.
    """
    if mode == "pairs" and not has_pair_loss:
        raise ValueError(
            "mode: 'pairs' needs fused_dpo_loss, losses of scope 'pair' or 'token' that pass no gradient to "
            "their own arguments, and operands other than float16; use 'auto' or 'cache'"
        )
    # Not `score` without gradients: a reference must get the bits of its policy, and as little memory.
    if mode == "lean" or (mode == "auto" and not holds_a_row):
        return "lean"
    trains_head = needs_weight or needs_bias
    if not (needs_hidden or trains_head):
        return "score"
    if mode == "auto":
        if entropy_requires_grad or (trains_head and cache_mib == 0):
            return "recompute"
        if trains_head:
            return "pairs" if has_pair_loss else "cache"
        return "stash"
    if mode == "score":
        raise ValueError("mode: got 'score', which has no backward pass, but an input requires a gradient")
    if mode == "stash" and trains_head:
        raise ValueError(
            "mode: got 'stash', which has no gradient for the head, but its weight or bias requires one"
        )
    if entropy_requires_grad and mode != "recompute":
        raise ValueError(f"mode: a differentiable entropy needs 'recompute' (or 'auto'), got {mode!r}")
    return mode


def make_plan(
    mode: str,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    logits_bytes: int = 4,
    operand_bytes: int = 2,
    needs_hidden: bool = True,
    needs_weight: bool = False,
    workspace_mib: int = 512,
    cache_mib: int = 1024,
    num_multiprocessors: int = 0,
    pair_rows: Sequence[int] = (0,),
    needs_bias: bool = False,
    lean_logit_bytes: int = 4,
    joins_chunks: bool = False,
    hidden_bytes: int | None = None,
    weight_bytes: int | None = None,
    copies_weight: bool = False,
) -> Plan:
    """The plan for a mode that ``resolve_mode`` has settled; sizes in elements, budgets in MiB.

    ``num_multiprocessors``: of the GPU, 0 for a CPU. ``pair_rows``: for ``pairs``, pair p fills labelled rows
    ``[pair_rows[p], pair_rows[p + 1])``. ``lean_logit_bytes``: see ``plan_lean.lean_blocks``.
    ``joins_chunks``: whether D may stay in the workspace for several chunks. ``hidden_bytes`` and
    ``weight_bytes``: of an element of these and of their gradients; None: as of the operands.
    ``copies_weight``: whether products need the weight in another dtype, and all of it at once.
    """
    hidden_bytes, weight_bytes = hidden_bytes or operand_bytes, weight_bytes or operand_bytes
    gradient_bytes = needs_hidden * num_tokens * hidden_size * hidden_bytes
    gradient_bytes += needs_weight * vocab_size * hidden_size * weight_bytes
    if mode == "lean":
        lean = make_lean_plan(
            num_tokens,
            hidden_size,
            vocab_size,
            logit_bytes=lean_logit_bytes,
            operand_bytes=operand_bytes,
            needs_hidden=needs_hidden,
            needs_weight=needs_weight,
            needs_bias=needs_bias,
            workspace_mib=workspace_mib,
        )
        return Plan(
            mode=mode,
            num_tokens=num_tokens,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            chunk_rows=lean.row_block,
            block_rows=lean.row_block,
            leading_dim=lean.slab,
            cached_rows=0,
            gemm_passes_forward=lean.gemm_passes_forward,
            gemm_passes_backward=lean.gemm_passes_backward,
            weight_grad_groups=1,
            workspace_bytes=lean.workspace_bytes,
            kept_bytes=lean.sum_bytes,
            weight_copy_bytes=0,  # its slabs are converted within the workspace
            weight_sum_bytes=0,
            score_rows=lean.score_rows,
            peak_bytes=lean.workspace_bytes + lean.sum_bytes + gradient_bytes,
            groups=(),
            group_rows=0,
        )
    sizes = (num_tokens, vocab_size, logits_bytes, workspace_mib)
    device = {"hidden_size": hidden_size, "num_multiprocessors": num_multiprocessors}
    if joins_chunks:
        rows, block_rows = chunk_and_block_rows(*sizes, **device)
    else:
        rows = block_rows = chunk_rows(*sizes, **device)
    d_row_bytes = leading_dim(vocab_size) * operand_bytes  # padded, as rows of logits are
    cached = _cached_rows(num_tokens, rows, d_row_bytes, cache_mib) if mode == "cache" else 0
    groups: tuple[PairGroup, ...] = ()
    if mode == "pairs":
        groups = group_pairs(pair_rows, min(GROUP_ROWS, cache_mib * MIB // d_row_bytes))
    group_rows = max((group.stop - group.start for group in groups if not group.is_recomputed), default=0)
    # In pieces of what is recomputed at a time: the rest of a batch, or a pair that is too long.
    again = [group.stop - group.start for group in groups if group.is_recomputed]
    if mode in ("cache", "recompute") and cached < num_tokens:
        again = [num_tokens - cached]
    share = sum(again) / num_tokens if num_tokens else 0.0

    forward, backward = 1.0, 0.0
    if mode == "stash":
        forward = 2.0
    elif mode == "pairs" and num_tokens:
        forward += needs_hidden + needs_weight + share
    elif mode in ("cache", "recompute") and num_tokens:
        backward = needs_hidden + needs_weight + share
    num_groups = (
        (cached > 0)
        + sum(not group.is_recomputed and group.stop > group.start for group in groups)
        + sum(-(-piece // block_rows) for piece in again)
    )
    kept_bytes = {
        "stash": num_tokens * hidden_size * operand_bytes,
        "cache": cached * d_row_bytes,
        "pairs": group_rows * d_row_bytes,
    }.get(mode, 0)
    workspace_rows = block_rows if mode == "stash" or again else rows
    workspace_bytes = workspace_rows * leading_dim(vocab_size) * logits_bytes
    weight_copy_bytes = copies_weight * vocab_size * hidden_size * operand_bytes
    weight_sum_bytes = 0
    if needs_weight and sums_in_fp32(num_groups, weight_bytes):
        weight_sum_bytes = vocab_size * hidden_size * 4
    return Plan(
        mode=mode,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        chunk_rows=rows,
        block_rows=block_rows,
        leading_dim=leading_dim(vocab_size),
        cached_rows=cached,
        gemm_passes_forward=forward,
        gemm_passes_backward=backward,
        weight_grad_groups=num_groups,
        workspace_bytes=workspace_bytes,
        kept_bytes=kept_bytes,
        weight_copy_bytes=weight_copy_bytes,
        weight_sum_bytes=weight_sum_bytes,
        score_rows=0,
        peak_bytes=peak_bytes(
            mode,
            workspace_bytes=workspace_bytes,
            kept_bytes=kept_bytes,
            row_bytes=hidden_size * operand_bytes,
            chunk_rows=rows,
            # A group of D, or of recomputed rows, as many as there are.
            group_rows=max(cached, group_rows, min(block_rows, max(again, default=0))),
            hidden_grad_bytes=needs_hidden * num_tokens * hidden_size * hidden_bytes,
            weight_grad_bytes=needs_weight * vocab_size * hidden_size * weight_bytes,
            weight_sum_bytes=weight_sum_bytes,
            recomputes=bool(again),
            weight_copy_bytes=weight_copy_bytes,
        ),
        groups=groups,
        group_rows=group_rows,
    )


def sums_in_fp32(num_groups: int, weight_bytes: int) -> bool:
    """Whether dW of a 16-bit weight is summed in fp32: more roundings than its accuracy allows."""
    return weight_bytes == 2 and num_groups > MAX_LOW_PRECISION_GROUPS


def _cached_rows(num_tokens: int, rows: int, d_row_bytes: int, cache_mib: int) -> int:
    """Rows of D kept: all that fit, in whole chunks, so that the rest is recomputed as it was computed."""
    fit = cache_mib * MIB // d_row_bytes
    return num_tokens if fit >= num_tokens else fit // rows * rows


# Those of `fastdpo.types`, which a plan does not import.
_MODES = ("auto", "score", "stash", "cache", "pairs", "recompute", "lean")
_BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


def explain_plan(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    mode: str = "auto",
    backend: str = "auto",
    hidden_requires_grad: bool = True,
    weight_requires_grad: bool = False,
    bias_requires_grad: bool = False,
    entropy_requires_grad: bool = False,
    pair_lengths: Sequence[int] | None = None,
    logits_bytes: int = 4,
    operand_bytes: int = 2,
    hidden_bytes: int | None = None,
    weight_bytes: int | None = None,
    workspace_mib: int = 512,
    cache_mib: int = 1024,
    num_multiprocessors: int = 0,
) -> Plan:
    """Print and return what ``linear_logprob``, or ``fused_dpo_loss``, will do for N labelled tokens.

    Args:
        num_tokens: N, labelled tokens only.
        hidden_size: H.
        vocab_size: V.
        mode, backend: as in ``Execution``; only mode ``lean`` depends on the backend, and takes ``auto`` on a
            GPU to be Triton.
        hidden_requires_grad, weight_requires_grad, bias_requires_grad, entropy_requires_grad: what needs a
            gradient.
        pair_lengths: for ``fused_dpo_loss`` with a loss per pair: the labelled tokens of each pair, both
            answers together, N in all. None: for ``linear_logprob``.
        logits_bytes: 4 for fp32 logits, 2 with ``logits_dtype="bf16"``, 8 for fp64.
        operand_bytes: bytes of one element of the products' operands: 2 for bf16 and fp16 on a GPU; 4
            for fp32, and for 16-bit inputs on a CPU, which are upcast; 8 for fp64.
        hidden_bytes, weight_bytes: the same of hidden and of the weight, where they are not the operands: 2
            for 16-bit ones on a CPU, 4 for fp32 ones under autocast. None: as ``operand_bytes``.
        workspace_mib, cache_mib: as in ``Execution``.
        num_multiprocessors: of the GPU (132 for an H100 or H200), which sets the rows of a chunk; 0: a CPU.

    Raises:
        ValueError: an unknown mode or backend; the mode does not fit the gradients, the logits or the
            workspace, or the pairs do not have N tokens.

    Example:
        >>> plan = explain_plan(4096, 4096, 128256, weight_requires_grad=True)  # doctest: +SKIP
    """
    for name, value, known in (("mode", mode, _MODES), ("backend", backend, _BACKENDS)):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(known)}")
    if pair_lengths is not None and sum(pair_lengths) != num_tokens:
        raise ValueError(f"pair_lengths: got {sum(pair_lengths)} tokens in all, wanted {num_tokens}")
    settled = resolve_mode(
        mode,
        needs_hidden=hidden_requires_grad,
        needs_weight=weight_requires_grad,
        needs_bias=bias_requires_grad,
        entropy_requires_grad=entropy_requires_grad,
        cache_mib=cache_mib,
        has_pair_loss=pair_lengths is not None,
        holds_a_row=holds_a_chunk_row(vocab_size, logits_bytes, workspace_mib),
    )
    if settled == "lean" and logits_bytes == 2:
        raise ValueError("logits_bytes: got 2 with mode 'lean', which stores no logits, wanted 4")
    is_store_free = backend in ("auto", "triton") and num_multiprocessors > 0 and operand_bytes == 2
    plan = make_plan(
        settled,
        num_tokens,
        hidden_size,
        vocab_size,
        logits_bytes=logits_bytes,
        operand_bytes=operand_bytes,
        needs_hidden=hidden_requires_grad,
        needs_weight=weight_requires_grad,
        workspace_mib=workspace_mib,
        cache_mib=cache_mib,
        num_multiprocessors=num_multiprocessors,
        pair_rows=tuple(accumulate(pair_lengths or (), initial=0)),
        needs_bias=bias_requires_grad,
        lean_logit_bytes=logit_bytes(is_store_free, operand_bytes),
        joins_chunks=True,
        hidden_bytes=hidden_bytes,
        weight_bytes=weight_bytes,
        # On a CPU, slab by slab.
        copies_weight=num_multiprocessors > 0 and weight_bytes not in (None, operand_bytes),
    )
    print(plan)
    return plan
