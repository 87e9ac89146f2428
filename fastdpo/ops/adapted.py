"""LoRA on the head, fused: neither W + s B A nor the logits of the batch are ever made.

    logits  x = h W^T + u B^T        u = s dropout(h) A^T  (M, r)

The chunks are those of the plain head, each with a narrow product added (``head_call.LowRank``). With D as
everywhere (DESIGN section 2), u and B are to the narrow product what h and W are to the wide one,

    du = g (D B)        dB = sum of D^T (g u)

so the same `Gradients` sum both, from one D. autograd takes du on to A and h. B needs g before the sum over
tokens, as dW does: D is kept or recomputed, never only D W. Hence the modes ``score``, ``cache`` and
``recompute``; with W frozen ``cache`` costs two wide products, as ``stash`` does for a frozen head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.matmul import (
    SlabbedWeight,
    bf16_parts,
    exact_operands,
    operand_dtype,
    sums_16_bits,
)
from fastdpo.ops.checks import accumulation_dtype, fail, resolve_dtypes
from fastdpo.ops.chunked import d_groups, forward_chunks
from fastdpo.ops.gradients import DGroup, Gradients, TokenGrads
from fastdpo.ops.head_call import HeadCall, LowRank
from fastdpo.ops.library import (
    OPTIONS_SCHEMA,
    PER_TOKEN,
    CallOptions,
    empty_output,
    fake_cache,
    head_call,
    raise_on_bad_labels,
    topk_results,
)
from fastdpo.plan.modes import resolve_mode
from fastdpo.plan.schedule import holds_a_chunk_row
from fastdpo.types import TOPK_STATISTICS, Execution, HeadAdapter, LMHead

ADAPTED_MODES = ("auto", "score", "cache", "recompute")

# As `forward_op` returns them: these, the reference's (none here), the index and what is kept.
_RESULTS = (*RowOutputs._fields, *TOPK_STATISTICS)


def settle_adapted_mode(
    hidden: Tensor, head: LMHead, run: Execution, *, entropy_requires_grad: bool = False
) -> str:
    """As ``settle_mode``, for a head with an adapter.

    Raises:
        ValueError: a mode that it does not run in, or a workspace that holds no row of logits.
    """
    assert isinstance(head.adapter, HeadAdapter)
    wanted = f"one of {ADAPTED_MODES} with an adapter on the head"
    if run.mode not in ADAPTED_MODES:
        raise fail("execution.mode", repr(run.mode), wanted)
    _, logits_dtype = resolve_dtypes(hidden, head.weight, run)
    if logits_dtype == torch.bfloat16:
        raise fail("execution.logits_dtype", "'bf16' with an adapter on the head", "None")
    vocab_size = head.weight.shape[0]
    if not holds_a_chunk_row(vocab_size, logits_dtype.itemsize, run.workspace_mib):
        got = f"{run.workspace_mib}, less than one row of logits"
        raise fail("execution.workspace_mib", got, "more: mode 'lean' takes no adapter on the head")
    trained = [hidden, head.weight, head.bias, head.adapter.lora_a, head.adapter.lora_b]
    needs_any = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
    return resolve_mode(
        run.mode,
        needs_hidden=needs_any,
        needs_weight=needs_any,
        entropy_requires_grad=entropy_requires_grad,
        cache_mib=run.cache_mib,
    )


def adapted_results(
    hidden: Tensor,  # (M, H)
    head: LMHead,
    labels: Tensor,
    token_index: Tensor | None,
    index_kind: str,
    run: Execution,
    grad_weight_out: Tensor | None,
    *scalars: Any,  # ignore_index, statistics, topk, entropy_requires_grad, check_labels, CallOptions
) -> tuple[Tensor, ...]:
    """What ``forward_op`` returns, for a head with an adapter."""
    assert isinstance(head.adapter, HeadAdapter)
    if grad_weight_out is not None:
        raise fail("grad_weight_out", "a tensor with an adapter on the head", "None")
    is_cast = run.compute_dtype is not None or torch.is_autocast_enabled(hidden.device.type)
    compute_dtype, _ = resolve_dtypes(hidden, head.weight, run)
    dtype = compute_dtype if is_cast else head.adapter.lora_b.dtype
    states = _low_rank_states(hidden, head.adapter, dtype, accumulation_dtype(compute_dtype))
    results: tuple[Tensor, ...] = adapted_op(
        hidden,
        head.weight,
        head.bias,
        states,
        head.adapter.lora_b,
        labels,
        token_index,
        index_kind,
        dtype,
        *scalars,
    )
    return results


def _low_rank_states(hidden: Tensor, adapter: HeadAdapter, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """u ``(M, r)`` in fp32 or fp64 from operands of ``dtype``: 16 bits of u would cost the logits theirs."""
    with torch.amp.autocast(hidden.device.type, enabled=False):
        rows = F.dropout(hidden, adapter.dropout) if adapter.dropout else hidden
        # The operands' rounding comes first: under autocast an fp32 A counts as bf16.
        low, down = (value.to(dtype).to(wide) for value in (rows, adapter.lora_a))
        if dtype == torch.float32 and sums_16_bits(hidden.dtype, hidden.device):
            # TF32 keeps 11 bits of A, and all of hidden's: by itself each of three parts of A is exact. The
            # last one is a difference, through which the gradient of the sum is A's.
            high, middle = (part.float() for part in bf16_parts(down.detach(), 2))
            parts = F.linear(low, torch.cat((high, middle, down - high - middle)))
            return parts.unflatten(-1, (3, -1)).sum(-2) * adapter.scale
        return F.linear(low, down) * adapter.scale


@torch.library.custom_op(
    "fastdpo::adapted_logprob",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor states, Tensor up, Tensor labels, "
    "Tensor? token_index, str index_kind, ScalarType adapter_dtype, SymInt ignore_index, str statistics, "
    f"int topk, bool entropy_requires_grad, bool check_labels, {OPTIONS_SCHEMA}) "
    f"-> ({', '.join(['Tensor'] * (len(_RESULTS) + 3))})",
)
def adapted_op(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    states: Tensor,  # (M, r)
    up: Tensor,  # (V, r)
    labels: Tensor,  # (M,) or (N,)
    token_index: Tensor | None,  # (N,)
    index_kind: str,
    adapter_dtype: torch.dtype,  # that `up` is rounded to
    ignore_index: int,
    statistics: str,  # names joined by commas
    topk: int,  # k of the top-k statistics; 0 for none
    entropy_requires_grad: bool,
    check_labels: bool,
    *options: Any,  # CallOptions
) -> tuple[Tensor, ...]:
    """As ``library.forward_op``, without a reference."""
    index = token_index
    if index is None:
        index = (labels != ignore_index).nonzero().squeeze(1)
    run = CallOptions(*options)
    call, _ = _calls(hidden, weight, bias, states, up, adapter_dtype, labels, index, index_kind, run)
    if check_labels:
        raise_on_bad_labels(call.labels, index, weight.shape[0])
    with torch.amp.autocast(hidden.device.type, enabled=False):
        compact, top, kept, _ = forward_chunks(call, tuple(filter(None, statistics.split(","))), topk)

    def full(name: str, value: Tensor | None) -> Tensor:
        if value is None:
            return empty_output(hidden, name, run.compute_dtype, 0)
        if call.index is None or index_kind in PER_TOKEN:
            return value
        return value.new_zeros(labels.shape[0]).index_copy_(0, call.index, value)

    results = [full(name, value) for name, value in zip(RowOutputs._fields, compact, strict=True)]
    results += [full(name, value) for name, value in topk_results(top).items()]
    # An op may not return its input: the caller's index is not repeated.
    made_index = index if token_index is None else index.new_empty(0)
    return (*results, full("logps", None), made_index, kept)


@adapted_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight = arguments[:2]
    labels, token_index = arguments[5:7]
    statistics, topk = arguments[10:12]
    run = CallOptions(*arguments[14:])
    wanted = ("logps", "lse", *statistics.split(","), *(TOPK_STATISTICS if topk else ()))
    results = [
        empty_output(hidden, name, run.compute_dtype, labels.shape[0] if name in wanted else 0)
        for name in (*_RESULTS, "")
    ]
    num_tokens = 0 if token_index is not None else torch.library.get_ctx().new_dynamic_size()
    index = labels.new_empty(num_tokens, dtype=torch.int64)
    dtype = operand_dtype(run.compute_dtype, run.logits_dtype, hidden.device)
    kept = hidden.new_empty(0, dtype=dtype)
    if run.run_mode == "cache":
        kept = fake_cache(hidden, weight.shape[0], dtype)
    return (*results, index, kept)


@torch.library.custom_op(
    "fastdpo::adapted_logprob_backward",
    mutates_args=(),
    schema="(Tensor? grad_logps, Tensor? grad_lse, Tensor? grad_entropy, Tensor hidden, Tensor weight, "
    "Tensor? bias, Tensor states, Tensor up, Tensor labels, Tensor index, str index_kind, "
    "ScalarType adapter_dtype, Tensor logps, Tensor lse, Tensor kept, bool[] needs, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def adapted_backward_op(
    grad_logps: Tensor | None,  # of the labels' shape, each
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    up: Tensor,
    labels: Tensor,
    index: Tensor,
    index_kind: str,
    adapter_dtype: torch.dtype,
    logps: Tensor,
    lse: Tensor,
    kept: Tensor,
    needs: list[bool],  # of hidden, weight, bias, states and up
    *options: Any,  # CallOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs that ``needs`` speaks of; one not needed has shape ``(0,)``."""
    run = CallOptions(*options)
    call, narrow = _calls(hidden, weight, bias, states, up, adapter_dtype, labels, index, index_kind, run)

    def compact(value: Tensor | None) -> Tensor | None:
        if value is None or call.index is None or index_kind in PER_TOKEN:
            return value
        return value.index_select(0, call.index)

    upstream = compact(grad_logps)
    if upstream is None:
        upstream = logps.new_zeros(call.plan.num_tokens)
    outputs = RowOutputs(compact(logps), compact(lse))  # type: ignore[arg-type]
    grads = TokenGrads(upstream, compact(grad_lse), compact(grad_entropy))
    has_lse = grads.lse is not None
    with torch.amp.autocast(hidden.device.type, enabled=False):
        weight_slabs = call.slabbed_weight()
        up_slabs = SlabbedWeight(up, adapter_dtype, call.operand_dtype)
        wide = Gradients(
            call, weight_slabs, hidden=needs[0], dweight=needs[1], bias=needs[2], adds_label_rows=has_lse
        )
        low = Gradients(
            narrow, up_slabs, hidden=needs[3], dweight=needs[4], bias=False, adds_label_rows=has_lse
        )
        _add_groups(wide, low, d_groups(call, weight_slabs, kept, grads), outputs, grads)
    dhidden, dweight, dbias = wide.results()
    dstates, dup, _ = low.results()
    found = (dhidden, dweight, dbias, dstates, dup)
    results = tuple(hidden.new_empty(0) if grad is None else grad for grad in found)
    return results  # type: ignore[return-value]


def _add_groups(
    wide: Gradients, low: Gradients, groups: Iterable[DGroup], outputs: RowOutputs, grads: TokenGrads
) -> None:
    """All groups, for both products. On return nothing refers to their D: its memory is free."""
    for group in groups:
        wide.add_group(group, outputs, grads)
        low.add_group(replace(group, rows=None), outputs, grads)


@adapted_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, needs = arguments[3], arguments[15]
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for tensor, needed in zip(arguments[3:8], needs, strict=True)
    )


def _calls(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    up: Tensor,
    adapter_dtype: torch.dtype,
    labels: Tensor,
    index: Tensor,
    index_kind: str,
    run: CallOptions,
) -> tuple[HeadCall, HeadCall]:
    """The head's call, and the narrow product's own over the same rows, for its gradients."""
    call = head_call(hidden, weight, bias, labels, index, index_kind, run)
    low_rank = LowRank(states, SlabbedWeight(up, adapter_dtype, call.logits_dtype))
    if sums_16_bits(call.operand_dtype, call.hidden.device):
        rows, weight = exact_operands(states, up.to(adapter_dtype))
        low_rank = LowRank(rows, SlabbedWeight(weight, weight.dtype, weight.dtype))
    narrow = replace(
        call,
        hidden=states,
        weight=up,
        bias=None,
        plan=replace(call.plan, hidden_size=up.shape[1]),
        compute_dtype=accumulation_dtype(run.compute_dtype),
    )
    return replace(call, low_rank=low_rank), narrow


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *differentiable, labels, token_index, index_kind, adapter_dtype = inputs[:9]
    entropy_requires_grad = inputs[12]
    logps, lse, entropy, *rest, index, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*rest, index, kept, *(() if entropy_requires_grad else (entropy,)))
    saved_index = index if token_index is None else token_index
    ctx.save_for_backward(*differentiable, labels, saved_index, logps, lse, kept)
    ctx.kinds = (index_kind, adapter_dtype)
    ctx.options = CallOptions(*inputs[14:])
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = grads[:3]  # of logps, lse and entropy; nothing else is differentiable
    *tensors, logps, lse, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    found: tuple[Tensor | None, ...] = (None,) * 5
    if any(grad is not None for grad in upstream):
        computed = adapted_backward_op(*upstream, *tensors, *ctx.kinds, logps, lse, kept, needs, *ctx.options)
        found = tuple(grad if needed else None for grad, needed in zip(computed, needs, strict=True))
    return (*found, *(None,) * (ctx.num_inputs - 5))


adapted_op.register_autograd(_backward, setup_context=_setup_context)
