"""How one call of the head will run: mode, chunks, what is kept, matrix products and bytes.

Pure arithmetic: no tensor, no torch, nothing of ours. The ops follow the `Plan` they get from here,
and `explain_plan` prints the same object, so what is printed is what runs.

Chunk boundaries depend on (N, V, logits dtype, workspace) and on nothing else, in particular not on
the mode or on who needs gradients: a policy that equals its reference, or a forward pass repeated by
activation checkpointing, gets logits of the same bits (DESIGN section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdpo.plan_lean import make_lean_plan

MIB = 1024 * 1024
# Rows of the workspace start at multiples of this many elements: 128 bytes or more in every dtype, so
# that an odd vocabulary still gets aligned, vectorised loads.
LEADING_DIM_MULTIPLE = 64
CHUNK_ROWS_MULTIPLE = 128
# Below this a product no longer hides the reading of W on an H200 (DESIGN section 3); smaller still works.
WANTED_CHUNK_ROWS = 512
# Up to this many products may be summed in a 16-bit gradient: measured error 2.2 to 2.6e-3, against
# 1.7e-3 for a single rounding; more than that and the sum is fp32 (DESIGN section 3).
MAX_LOW_PRECISION_GROUPS = 4

UNSUPPORTED_MODES = ("pairs",)


@dataclass(frozen=True)
class Plan:
    """What one call does. Bytes are predictions of what is allocated beyond inputs and outputs."""

    mode: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    chunk_rows: int
    leading_dim: int
    cached_rows: int
    gemm_passes_forward: float
    gemm_passes_backward: float
    weight_grad_groups: int
    workspace_bytes: int
    kept_bytes: int

    @property
    def gemm_passes(self) -> float:
        """Matrix products of 2 N H V FLOP, forward and backward together."""
        return self.gemm_passes_forward + self.gemm_passes_backward

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges ``[start, stop)`` of the chunks, in order."""
        step = max(self.chunk_rows, 1)
        return [(start, min(start + step, self.num_tokens)) for start in range(0, self.num_tokens, step)]

    def __str__(self) -> str:
        kept = {"stash": "D W for the backward pass", "cache": "D for the backward pass"}.get(
            self.mode, "nothing"
        )
        lines = [
            f"mode          {self.mode}",
            f"tokens        {self.num_tokens} labelled",
            f"head          hidden {self.hidden_size}, vocabulary {self.vocab_size}",
            f"chunks        {len(self.chunks())} of up to {self.chunk_rows} rows",
            f"GEMM passes   {self.gemm_passes:.2f} (forward {self.gemm_passes_forward:.2f}, "
            f"backward {self.gemm_passes_backward:.2f})",
            f"workspace     {self.workspace_bytes / MIB:.1f} MiB of logits",
            f"kept          {self.kept_bytes / MIB:.1f} MiB ({kept})",
        ]
        if self.mode == "cache":
            lines.append(f"cached rows   {self.cached_rows} of {self.num_tokens}; the rest is recomputed")
        return "\n".join(lines)


def resolve_mode(
    mode: str,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool = False,
    entropy_requires_grad: bool = False,
    cache_mib: int = 1024,
    holds_a_row: bool = True,
) -> str:
    """The mode that runs, from the one asked for and what needs a gradient.

    Without any gradient to compute every mode is ``score``: the modes differ in the backward pass only.

    Raises:
        ValueError: the mode asked for cannot give the gradients needed, or is not supported.
    """
    if mode in UNSUPPORTED_MODES:
        raise ValueError(
            f"mode: {mode!r} is not supported by this version; use 'auto', 'cache' or 'recompute'"
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
        return "cache" if trains_head else "stash"
    if mode == "score":
        raise ValueError("mode: got 'score', which has no backward pass, but an input requires a gradient")
    if mode == "stash" and trains_head:
        raise ValueError(
            "mode: got 'stash', which has no gradient for the head, but its weight or bias requires one"
        )
    if entropy_requires_grad and mode != "recompute":
        raise ValueError(f"mode: a differentiable entropy needs 'recompute' (or 'auto'), got {mode!r}")
    return mode


def leading_dim(vocab_size: int) -> int:
    """Elements from one row of the logits workspace to the next."""
    return -(-vocab_size // LEADING_DIM_MULTIPLE) * LEADING_DIM_MULTIPLE


def chunk_rows(num_tokens: int, vocab_size: int, logits_bytes: int, workspace_mib: int) -> int:
    """Rows per chunk: what the workspace holds, spread evenly over the chunks that takes.

    Raises:
        ValueError: the workspace does not hold a single row.
    """
    row_bytes = leading_dim(vocab_size) * logits_bytes
    limit = workspace_mib * MIB // row_bytes
    if limit < 1:
        raise ValueError(
            f"workspace_mib: one row of {vocab_size} logits needs {row_bytes} bytes, got {workspace_mib} MiB"
        )
    if num_tokens <= limit:
        return num_tokens
    if limit >= CHUNK_ROWS_MULTIPLE:
        limit -= limit % CHUNK_ROWS_MULTIPLE
    num_chunks = -(-num_tokens // limit)
    even = -(-num_tokens // num_chunks)
    multiple = CHUNK_ROWS_MULTIPLE if limit >= CHUNK_ROWS_MULTIPLE else 1
    return min(limit, -(-even // multiple) * multiple)


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
    needs_bias: bool = False,
    lean_logit_bytes: int = 4,
) -> Plan:
    """The plan for a mode that ``resolve_mode`` has settled; sizes in elements, budgets in MiB."""
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
            leading_dim=lean.slab,
            cached_rows=0,
            gemm_passes_forward=lean.gemm_passes_forward,
            gemm_passes_backward=lean.gemm_passes_backward,
            weight_grad_groups=1,
            workspace_bytes=lean.workspace_bytes,
            kept_bytes=0,
        )
    rows = chunk_rows(num_tokens, vocab_size, logits_bytes, workspace_mib)
    ld = leading_dim(vocab_size)
    cached = _cached_rows(num_tokens, rows, vocab_size * operand_bytes, cache_mib) if mode == "cache" else 0
    recomputed = num_tokens - cached if mode in ("cache", "recompute") else 0

    backward = 0.0
    if mode in ("cache", "recompute"):
        share = recomputed / num_tokens if num_tokens else 0.0
        backward = needs_hidden + needs_weight + share
    kept = {"stash": num_tokens * hidden_size * operand_bytes, "cache": cached * vocab_size * operand_bytes}
    return Plan(
        mode=mode,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        chunk_rows=rows,
        leading_dim=ld,
        cached_rows=cached,
        gemm_passes_forward=2.0 if mode == "stash" else 1.0,
        gemm_passes_backward=backward,
        weight_grad_groups=(cached > 0) + (-(-recomputed // rows) if recomputed else 0),
        workspace_bytes=rows * ld * logits_bytes,
        kept_bytes=kept.get(mode, 0),
    )


def _cached_rows(num_tokens: int, rows: int, d_row_bytes: int, cache_mib: int) -> int:
    """Rows of D kept: all that fit, in whole chunks, so that the rest is recomputed as it was computed."""
    fit = cache_mib * MIB // d_row_bytes
    return num_tokens if fit >= num_tokens else fit // rows * rows


def explain_plan(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    mode: str = "auto",
    hidden_requires_grad: bool = True,
    weight_requires_grad: bool = False,
    entropy_requires_grad: bool = False,
    logits_bytes: int = 4,
    operand_bytes: int = 2,
    workspace_mib: int = 512,
    cache_mib: int = 1024,
) -> Plan:
    """Print and return what ``linear_logprob`` will do for N labelled tokens.

    Args:
        num_tokens: N, labelled tokens only.
        hidden_size: H.
        vocab_size: V.
        mode: as in ``Execution``.
        hidden_requires_grad, weight_requires_grad, entropy_requires_grad: what needs a gradient.
        logits_bytes: 4 for fp32 logits, 2 with ``logits_dtype="bf16"``.
        operand_bytes: bytes of one element of the products' operands: 2 for bf16 and fp16 on a GPU; 4
            for fp32, and for 16-bit inputs on a CPU, which are upcast.
        workspace_mib, cache_mib: as in ``Execution``.

    Raises:
        ValueError: the mode does not fit the gradients, or the workspace does not hold one row.

    Example:
        >>> plan = explain_plan(4096, 4096, 128256, weight_requires_grad=True)  # doctest: +SKIP
    """
    settled = resolve_mode(
        mode,
        needs_hidden=hidden_requires_grad,
        needs_weight=weight_requires_grad,
        entropy_requires_grad=entropy_requires_grad,
        cache_mib=cache_mib,
    )
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
    )
    print(plan)
    return plan
