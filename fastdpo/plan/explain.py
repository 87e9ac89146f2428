"""``explain_plan``: what a call will do, printed before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from fastdpo.plan.call import make_plan
from fastdpo.plan.modes import resolve_mode, settled_run
from fastdpo.plan.plan import Plan
from fastdpo.plan.schedule import holds_a_chunk_row
from fastdpo.plan.traffic import head_traffic

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
    num_ranks: int = 1,
) -> Plan:
    """Print and return what ``linear_logprob``, or a function with a loss, will do for N labelled tokens.

    Args:
        num_tokens: N, labelled tokens only.
        hidden_size: H.
        vocab_size: V.
        mode, backend: as in ``Execution``; only mode ``lean`` depends on the backend, and takes ``auto`` on a
            GPU to be Triton.
        hidden_requires_grad, weight_requires_grad, bias_requires_grad, entropy_requires_grad: what needs a
            gradient.
        pair_lengths: for ``fused_dpo_loss`` and ``fused_preference_loss`` with a loss that is a sum over
            pairs, answers, lists or steps: the labelled tokens of each of these, N in all, a pair's both
            answers together. None: for ``linear_logprob``.
        logits_bytes: 4 for fp32 logits, 2 with ``logits_dtype="bf16"``, 8 for fp64.
        operand_bytes: bytes of one element of the products' operands: 2 for bf16 and fp16 on a GPU; 4
            for fp32, and for 16-bit inputs on a CPU, which are upcast; 8 for fp64.
        hidden_bytes, weight_bytes: the same of hidden and of the weight, where they are not the operands: 2
            for 16-bit ones on a CPU, 4 for fp32 ones under autocast. None: as ``operand_bytes``.
        workspace_mib, cache_mib: as in ``Execution``.
        num_multiprocessors: of the GPU (132 for an H100 or H200), which sets the rows of a chunk; 0: a CPU.
        num_ranks: of several, each with N tokens of its own and a part of the head (FSDP2), what moves
            between them is printed too, and which way is less.

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
        has_row_loss=pair_lengths is not None,
        holds_a_row=holds_a_chunk_row(vocab_size, logits_bytes, workspace_mib),
    )
    if settled == "lean" and logits_bytes == 2:
        raise ValueError("logits_bytes: got 2 with mode 'lean', which stores no logits, wanted 4")
    kernel = "torch"
    if num_multiprocessors > 0 and operand_bytes == 2:
        kernel = {"auto": "triton", "triton": "triton", "cuda": "rows"}.get(backend, "torch")
    run = settled_run(
        settled,
        needs_hidden=hidden_requires_grad,
        trains_head=weight_requires_grad or bias_requires_grad,
        entropy_requires_grad=entropy_requires_grad,
    )
    plan = make_plan(
        run,
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
        loss_rows=tuple(accumulate(pair_lengths or (), initial=0)),
        needs_bias=bias_requires_grad,
        lean_kernel=kernel,
        joins_chunks=True,
        hidden_bytes=hidden_bytes,
        weight_bytes=weight_bytes,
        # On a CPU, slab by slab.
        copies_weight=num_multiprocessors > 0 and weight_bytes not in (None, operand_bytes),
    )
    print(plan)
    if num_ranks > 1:
        traffic = head_traffic(
            *(num_tokens, hidden_size, vocab_size, num_ranks),
            weight_bytes=weight_bytes or operand_bytes,
            states_bytes=hidden_bytes or operand_bytes,
            needs_hidden=hidden_requires_grad,
            needs_weight=weight_requires_grad,
        )
        print(traffic)
    return plan
