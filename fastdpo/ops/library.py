"""The head as torch.library ops: schema, fake, autograd, and the autocast rule's cast.

``fastdpo::linear_logprob`` runs the forward chunks; its autograd formula calls
``fastdpo::linear_logprob_backward``, which has none: a second derivative raises instead of being wrong.
Compaction to the labelled tokens happens inside the op, so that ``torch.compile(fullgraph=True)`` sees
outputs of the labels' shape; what is kept for the backward pass has a data-dependent size. A caller that has
the tokens one by one (``INDEX_KINDS``) gets outputs one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.kernels.matmul import copies_weight, operand_dtype
from fastdpo.ops.backends import num_multiprocessors, resolve_backend
from fastdpo.ops.checks import accumulation_dtype, fail
from fastdpo.ops.chunked import backward_chunks, forward_chunks
from fastdpo.ops.gradients import TokenGrads
from fastdpo.ops.head_call import HeadCall, TopkOutputs
from fastdpo.ops.lean import forward_lean
from fastdpo.ops.lean_backward import backward_lean
from fastdpo.ops.lean_slabs import lean_kernel, makes_product
from fastdpo.plan.call import make_plan
from fastdpo.plan.modes import LEAN_STASH
from fastdpo.plan.schedule import leading_dim
from fastdpo.types import TOPK_STATISTICS

# What the index of labelled rows is, and so which shape labels and outputs have:
#   found      the op looks for labels other than ignore_index;         labels and outputs (M,)
#   given      positions from the caller, none twice;                   labels and outputs (M,)
#   tokens     a row for each label, none twice;                        labels and outputs (N,)
#   repeated   a row for each label, rows may occur more than once;     labels and outputs (N,)
INDEX_KINDS = ("found", "given", "tokens", "repeated")
PER_TOKEN = ("tokens", "repeated")


class CallOptions(NamedTuple):
    """The scalars that both ops take, in this order, after their tensors and flags."""

    logit_scale: float
    softcap: float | None
    temperature: float
    run_mode: str  # not `mode`: torch passes a `mode` of its own by keyword when it functionalises an op
    backend: str
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    workspace_mib: int
    cache_mib: int


OPTIONS_SCHEMA = (
    "float logit_scale, float? softcap, float temperature, str run_mode, str backend, "
    "ScalarType compute_dtype, ScalarType logits_dtype, SymInt workspace_mib, SymInt cache_mib"
)


@torch.library.custom_op(
    "fastdpo::linear_logprob",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? token_index, str index_kind, "
    "Tensor? ref_hidden, Tensor? grad_weight_out, SymInt ignore_index, str statistics, int topk, "
    f"bool entropy_requires_grad, bool check_labels, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward_op(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,) or (N,)
    token_index: Tensor | None,  # (N,)
    index_kind: str,
    ref_hidden: Tensor | None,  # (M, H): also the log-probabilities of these, without a gradient
    grad_weight_out: Tensor | None,  # written by the backward op only
    ignore_index: int,
    statistics: str,  # names joined by commas
    topk: int,  # k of the top-k statistics; 0 for none, else both are made
    entropy_requires_grad: bool,
    check_labels: bool,
    *options: Any,  # CallOptions
) -> tuple[Tensor, ...]:
    """Eight results of the labels' shape (those not asked for ``(0,)``), the reference's log-probabilities
    (likewise), the index of labelled rows, and what is kept for the backward pass."""
    index = token_index
    if index is None:
        index = (labels != ignore_index).nonzero().squeeze(1)
    run = CallOptions(*options)
    call = head_call(hidden, weight, bias, labels, index, index_kind, run, ref_hidden=ref_hidden)
    if check_labels:
        raise_on_bad_labels(call.labels, index, weight.shape[0])
    with torch.amp.autocast(hidden.device.type, enabled=False):
        wanted = tuple(filter(None, statistics.split(",")))
        if call.plan.mode == "lean":
            compact, top, kept, ref_logps = forward_lean(
                call,
                wanted,
                topk,
                keeps_entropy=entropy_requires_grad,
                workspace_mib=run.workspace_mib,
            )
        else:
            compact, top, kept, ref_logps = forward_chunks(call, wanted, topk)

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
    return (*results, full("logps", ref_logps), made_index, kept)


@forward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_index: Tensor | None,
    index_kind: str,
    ref_hidden: Tensor | None,
    grad_weight_out: Tensor | None,
    ignore_index: int,
    statistics: str,
    topk: int,
    entropy_requires_grad: bool,
    check_labels: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    run = CallOptions(*options)
    wanted = ("logps", "lse", *statistics.split(","), *(TOPK_STATISTICS if topk else ()))
    results = [
        empty_output(hidden, name, run.compute_dtype, labels.shape[0] if name in wanted else 0)
        for name in (*RowOutputs._fields, *TOPK_STATISTICS)
    ]
    num_scored = 0 if ref_hidden is None else labels.shape[0]
    results.append(empty_output(hidden, "logps", run.compute_dtype, num_scored))
    num_tokens: int | torch.SymInt
    if token_index is None:
        num_tokens = torch.library.get_ctx().new_dynamic_size()
        index = labels.new_empty(num_tokens, dtype=torch.int64)
    else:
        num_tokens = token_index.shape[0]
        index = labels.new_empty(0, dtype=torch.int64)
    dtype = operand_dtype(run.compute_dtype, run.logits_dtype, hidden.device)
    if run.run_mode == "cache":
        return (*results, index, fake_cache(hidden, weight.shape[0], dtype))
    shape: tuple[Any, ...] = (0,)
    if run.run_mode == "stash" or (run.run_mode == LEAN_STASH and makes_product(hidden, weight, *run[4:8])):
        shape = (num_tokens, hidden.shape[1])
    elif run.run_mode == "lean" and entropy_requires_grad:
        shape, dtype = (num_tokens,), accumulation_dtype(run.compute_dtype)
    return (*results, index, hidden.new_empty(shape, dtype=dtype))


def fake_cache(hidden: Tensor, vocab_size: int, dtype: torch.dtype, count: int = 1) -> Tensor:
    """What ``chunked.empty_kept`` gives in mode ``cache``, of rows that only the call knows the number of."""
    num_rows = torch.library.get_ctx().new_dynamic_size()
    shape = (*((count,) if count > 1 else ()), num_rows, leading_dim(vocab_size))
    return hidden.new_empty(shape, dtype=dtype)[..., :vocab_size]


@torch.library.custom_op(
    "fastdpo::linear_logprob_backward",
    mutates_args=("grad_weight_out",),
    schema="(Tensor? grad_logps, Tensor? grad_lse, Tensor? grad_entropy, Tensor hidden, Tensor weight, "
    "Tensor? bias, Tensor labels, Tensor index, str index_kind, Tensor logps, Tensor lse, Tensor kept, "
    "Tensor(a!)? grad_weight_out, bool needs_hidden, bool needs_weight, bool needs_bias, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def backward_op(
    grad_logps: Tensor | None,  # of the labels' shape, each
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    index_kind: str,
    logps: Tensor,
    lse: Tensor,
    kept: Tensor,
    grad_weight_out: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    *options: Any,  # CallOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dhidden, dweight, dbias)``; one that is not needed, or went elsewhere, has shape ``(0,)``."""
    run = CallOptions(*options)
    call = head_call(
        hidden,
        weight,
        bias,
        labels,
        index,
        index_kind,
        run,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
    )

    def compact(value: Tensor | None) -> Tensor | None:
        if value is None or call.index is None or index_kind in PER_TOKEN:
            return value
        return value.index_select(0, call.index)

    upstream = compact(grad_logps)
    if upstream is None:
        upstream = logps.new_zeros(call.plan.num_tokens)
    outputs = RowOutputs(compact(logps), compact(lse))  # type: ignore[arg-type]
    token_grads = TokenGrads(upstream, compact(grad_lse), compact(grad_entropy))
    needs = {"needs_hidden": needs_hidden, "needs_weight": needs_weight, "needs_bias": needs_bias}
    with torch.amp.autocast(hidden.device.type, enabled=False):
        if call.plan.mode == "lean" and not call.plan.keeps_product:
            if grad_entropy is not None:
                outputs = outputs._replace(entropy=kept)
            grads = backward_lean(call, outputs, token_grads, **needs, grad_weight_out=grad_weight_out)
        else:
            grads = backward_chunks(
                call, kept, outputs, token_grads, **needs, grad_weight_out=grad_weight_out
            )
    dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return dhidden, dweight, dbias


@backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = arguments[3:6]
    grad_weight_out, needs_hidden, needs_weight, needs_bias = arguments[12:16]

    def like(tensor: Tensor, is_returned: bool) -> Tensor:
        if is_returned:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return hidden.new_empty(0)

    return (
        like(hidden, needs_hidden),
        like(weight, needs_weight and grad_weight_out is None),
        like(bias, needs_bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, token_index, index_kind, _, grad_weight_out = inputs[:8]
    entropy_requires_grad = inputs[11]
    logps, lse, entropy, *rest, index, kept = output
    # Unused outputs would otherwise get zero gradients of their size: one of D's, with `cache`.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*rest, index, kept, *(() if entropy_requires_grad else (entropy,)))
    ctx.index_kind = index_kind
    saved_index = index if token_index is None else token_index
    ctx.save_for_backward(hidden, weight, bias, labels, saved_index, logps, lse, kept)
    # Not saved as a tensor: autograd would refuse a second backward pass because the first wrote to it.
    ctx.grad_weight_out = grad_weight_out
    ctx.options = CallOptions(*inputs[13:])
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = grads[:3]  # of logps, lse and entropy; nothing else is differentiable
    hidden, weight, bias, labels, index, logps, lse, kept = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    no_more = (None,) * (ctx.num_inputs - 3)
    if all(grad is None for grad in upstream):
        return (None, None, None, *no_more)
    dhidden, dweight, dbias = backward_op(
        *upstream,
        hidden,
        weight,
        bias,
        labels,
        index,
        ctx.index_kind,
        logps,
        lse,
        kept,
        ctx.grad_weight_out,
        needs_hidden,
        needs_weight,
        needs_bias,
        *ctx.options,
    )
    return (
        dhidden if needs_hidden else None,
        dweight if needs_weight and ctx.grad_weight_out is None else None,
        dbias if needs_bias else None,
        *no_more,
    )


forward_op.register_autograd(_backward, setup_context=_setup_context)


def head_call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    index_kind: str,
    run: CallOptions,
    *,
    needs_hidden: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = False,
    ref_hidden: Tensor | None = None,
    loss_rows: Sequence[int] = (0,),
    largest_part: int = 0,
) -> HeadCall:
    """The call that both passes make the same way, so that they agree on every chunk."""
    num_tokens = index.shape[0]
    # `nonzero` is in order: as many labelled tokens as positions means all of them, and rows are views.
    is_all = index_kind == "found" and num_tokens == hidden.shape[0]
    targets = labels if is_all or index_kind in PER_TOKEN else labels.index_select(0, index)
    operands = operand_dtype(run.compute_dtype, run.logits_dtype, hidden.device)
    acc = accumulation_dtype(run.compute_dtype)
    backend = resolve_backend(run.backend, hidden.device, run.logits_dtype, run.run_mode)
    plan = make_plan(
        run.run_mode,
        num_tokens,
        hidden.shape[1],
        weight.shape[0],
        logits_bytes=run.logits_dtype.itemsize,
        operand_bytes=operands.itemsize,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        workspace_mib=run.workspace_mib,
        cache_mib=run.cache_mib,
        num_multiprocessors=num_multiprocessors(hidden.device),
        loss_rows=loss_rows,
        needs_bias=needs_bias,
        lean_kernel=lean_kernel(backend, run.compute_dtype),
        joins_chunks=True,
        hidden_bytes=hidden.element_size(),
        weight_bytes=weight.element_size(),
        copies_weight=copies_weight(weight, run.compute_dtype, operands),
        largest_part=largest_part,
    )
    return HeadCall(
        hidden=hidden,
        weight=weight,
        bias=bias,
        index=None if is_all else index,
        has_repeats=index_kind == "repeated",
        labels=targets.long().contiguous(),
        ref_hidden=ref_hidden,
        transform=LogitTransform(
            bias=None if bias is None else bias.to(acc).contiguous(),
            scale=run.logit_scale,
            softcap=run.softcap,
            temperature=run.temperature,
        ),
        plan=plan,
        backend=backend,
        compute_dtype=run.compute_dtype,
        logits_dtype=run.logits_dtype,
        operand_dtype=operands,
    )


def topk_results(topk: TopkOutputs | None) -> dict[str, Tensor | None]:
    values = (None, None) if topk is None else (topk.mass, topk.entropy)
    return dict(zip(TOPK_STATISTICS, values, strict=True))


def raise_on_bad_labels(labels: Tensor, index: Tensor, vocab_size: int) -> None:
    bad = ((labels < 0) | (labels >= vocab_size)).nonzero()
    if bad.numel():
        first = bad[0, 0]
        got = f"{int(labels[first])} at flat position {int(index[first])}"
        raise fail("labels", got, f"0..{vocab_size - 1}")


def empty_output(hidden: Tensor, name: str, compute_dtype: torch.dtype, size: Any) -> Tensor:
    dtype = torch.bool if name == "is_top1" else accumulation_dtype(compute_dtype)
    return hidden.new_empty(size, dtype=dtype)
