"""``token_divergence`` as torch.library ops, in the way of ``library.py``: schema, fake, autograd.

Teachers are constants: their tensors have no gradient, whatever they require.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.contract import LogitTransform
from fastdpo.kernels.divergence import DIFFERENTIABLE, DivergenceOutputs
from fastdpo.kernels.matmul import operand_dtype
from fastdpo.ops.backends import resolve_divergence_backend
from fastdpo.ops.checks import accumulation_dtype
from fastdpo.ops.divergence_chunks import (
    DivergenceCall,
    backward_divergences,
    differentiable,
    forward_divergences,
    num_kept,
)
from fastdpo.ops.divergence_plan import divergence_plan
from fastdpo.ops.head_call import HeadCall
from fastdpo.ops.library import PER_TOKEN, empty_output, fake_cache
from fastdpo.plan.plan import Plan


class DivergenceOptions(NamedTuple):
    """The scalars that both ops take, in this order, after their tensors and flags."""

    outputs: str  # names of DivergenceOutputs joined by commas
    logps_requires_grad: bool
    jsd_beta: float
    first_slope: float
    second_slope: float
    run_mode: str
    backend: str
    workspace_mib: int
    cache_mib: int
    logit_scale: float
    softcap: float | None
    temperature: float
    compute_dtype: torch.dtype
    ref_logit_scale: float
    ref_softcap: float | None
    ref_temperature: float
    ref_compute_dtype: torch.dtype
    second_logit_scale: float
    second_softcap: float | None
    second_temperature: float
    second_compute_dtype: torch.dtype


_HEAD = "float {0}logit_scale, float? {0}softcap, float {0}temperature, ScalarType {0}compute_dtype"
OPTIONS_SCHEMA = (
    "str outputs, bool logps_requires_grad, float jsd_beta, float first_slope, float second_slope, "
    "str run_mode, str backend, SymInt workspace_mib, SymInt cache_mib, "
) + ", ".join(_HEAD.format(prefix) for prefix in ("", "ref_", "second_"))
TEACHERS_SCHEMA = (
    "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, Tensor? second_hidden, Tensor? second_weight, "
    "Tensor? second_bias, Tensor? coefficients"
)
NUM_TEACHER_TENSORS = 7


@torch.library.custom_op(
    "fastdpo::token_divergence",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? token_index, str index_kind, "
    f"SymInt ignore_index, {TEACHERS_SCHEMA}, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def divergence_op(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,) or (N,)
    token_index: Tensor | None,  # (N,)
    index_kind: str,  # one of library.INDEX_KINDS
    ignore_index: int,
    *rest: Any,  # the teachers' tensors, (M, H'), (V, H'), (V,) each, and (2, *labels); DivergenceOptions
) -> tuple[Tensor, ...]:
    """Six results of the labels' shape (those not asked for ``(0,)``), the index of labelled rows, and what
    is kept for the backward pass."""
    teachers, run = rest[:NUM_TEACHER_TENSORS], DivergenceOptions(*rest[NUM_TEACHER_TENSORS:])
    index = token_index
    if index is None:
        index = (labels != ignore_index).nonzero().squeeze(1)
    call = _divergence_call(hidden, weight, bias, labels, index, index_kind, teachers, run)
    with torch.amp.autocast(hidden.device.type, enabled=False):
        compact, kept = forward_divergences(call)

    def full(value: Tensor | None) -> Tensor:
        if value is None:
            return empty_output(hidden, "", run.compute_dtype, 0)
        if call.policy.index is None or index_kind in PER_TOKEN:
            return value
        return value.new_zeros(labels.shape[0]).index_copy_(0, call.policy.index, value)

    # An op may not return its input: the caller's index is not repeated.
    made_index = index if token_index is None else index.new_empty(0)
    return (*map(full, compact), made_index, kept)


@divergence_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_index: Tensor | None,
    index_kind: str,
    ignore_index: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    run = DivergenceOptions(*rest[NUM_TEACHER_TENSORS:])
    wanted = run.outputs.split(",")
    with_gradient = differentiable(tuple(wanted), run.logps_requires_grad)
    results = [
        empty_output(hidden, "", run.compute_dtype, labels.shape[0] if name in wanted else 0)
        for name in DivergenceOutputs._fields
    ]
    num_tokens: Any
    if token_index is None:
        num_tokens = torch.library.get_ctx().new_dynamic_size()
        index = labels.new_empty(num_tokens, dtype=torch.int64)
    else:
        num_tokens = token_index.shape[0]
        index = labels.new_empty(0, dtype=torch.int64)
    count = num_kept(with_gradient, run.run_mode)
    dtype = operand_dtype(run.compute_dtype, accumulation_dtype(run.compute_dtype), hidden.device)
    if run.run_mode == "cache":
        return (*results, index, fake_cache(hidden, weight.shape[0], dtype, count))
    shape: tuple[Any, ...] = (0,)
    if run.run_mode == "stash":
        shape = (*((2,) if count == 2 else ()), num_tokens, hidden.shape[1])
    return (*results, index, hidden.new_empty(shape, dtype=dtype))


@torch.library.custom_op(
    "fastdpo::token_divergence_backward",
    mutates_args=(),
    schema="(Tensor? grad_forward_kl, Tensor? grad_reverse_kl, Tensor? grad_jsd, Tensor? grad_logps, "
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor index, str index_kind, Tensor kept, "
    "bool needs_hidden, bool needs_weight, bool needs_bias, "
    f"{TEACHERS_SCHEMA}, {OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def divergence_backward_op(
    grad_forward_kl: Tensor | None,  # of the labels' shape, each; one of them at least
    grad_reverse_kl: Tensor | None,
    grad_jsd: Tensor | None,
    grad_logps: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    index_kind: str,
    kept: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dhidden, dweight, dbias)``; one that is not needed has shape ``(0,)``."""
    teachers, run = rest[:NUM_TEACHER_TENSORS], DivergenceOptions(*rest[NUM_TEACHER_TENSORS:])
    needs = {"needs_hidden": needs_hidden, "needs_weight": needs_weight, "needs_bias": needs_bias}
    call = _divergence_call(hidden, weight, bias, labels, index, index_kind, teachers, run, **needs)

    def compact(value: Tensor | None) -> Tensor | None:
        if value is None or call.policy.index is None or index_kind in PER_TOKEN:
            return value
        return value.index_select(0, call.policy.index)

    upstream = tuple(compact(grad) for grad in (grad_forward_kl, grad_reverse_kl, grad_jsd, grad_logps))
    with torch.amp.autocast(hidden.device.type, enabled=False):
        grads = backward_divergences(call, kept, upstream, **needs)
    dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return dhidden, dweight, dbias


@divergence_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, needs = arguments[4:7], arguments[11:14]
    dhidden, dweight, dbias = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if is_needed
        else arguments[4].new_empty(0)
        for tensor, is_needed in zip(tensors, needs, strict=True)
    )
    return dhidden, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, token_index, index_kind, _ = inputs[:7]
    teachers = inputs[7 : 7 + NUM_TEACHER_TENSORS]
    *results, index, kept = output
    # Unused outputs would otherwise get zero gradients of their size: one of D's, with `cache`.
    ctx.set_materialize_grads(False)
    options = DivergenceOptions(*inputs[7 + NUM_TEACHER_TENSORS :])
    made = differentiable(tuple(options.outputs.split(",")), options.logps_requires_grad)
    ctx.is_made = [name in made for name in DIFFERENTIABLE]
    others = [out for out, is_made in zip(results, ctx.is_made, strict=False) if not is_made]
    ctx.mark_non_differentiable(*others, *results[len(DIFFERENTIABLE) :], index, kept)
    ctx.index_kind = index_kind
    saved_index = index if token_index is None else token_index
    ctx.save_for_backward(hidden, weight, bias, labels, saved_index, kept, *teachers)
    ctx.options = options
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Ahead-of-time autograd materialises the others' gradients whatever is said, and these are (0,).
    upstream = [grad if is_made else None for grad, is_made in zip(grads, ctx.is_made, strict=False)]
    needs = ctx.needs_input_grad[:3]
    no_more = (None,) * (ctx.num_inputs - 3)
    if all(grad is None for grad in upstream):
        return (None, None, None, *no_more)
    hidden, weight, bias, labels, index, kept, *teachers = ctx.saved_tensors
    results = divergence_backward_op(
        *upstream, hidden, weight, bias, labels, index, ctx.index_kind, kept, *needs, *teachers, *ctx.options
    )
    return (*(grad if is_needed else None for grad, is_needed in zip(results, needs, strict=True)), *no_more)


divergence_op.register_autograd(_backward, setup_context=_setup_context)


def _divergence_call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    index_kind: str,
    teachers: tuple[Any, ...],
    run: DivergenceOptions,
    *,
    needs_hidden: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = False,
) -> DivergenceCall:
    """The call that both passes make the same way, so that they agree on every chunk."""
    *streams, coefficients = teachers
    num_tokens = index.shape[0]
    # `nonzero` is in order: as many labelled tokens as positions means all of them, and rows are views.
    is_all = index_kind == "found" and num_tokens == hidden.shape[0]
    num_teachers = 1 if coefficients is None else 2
    names = tuple(run.outputs.split(","))
    with_gradient = differentiable(names, run.logps_requires_grad)
    backend = resolve_divergence_backend(run.backend, hidden.device, accumulation_dtype(run.compute_dtype))
    plan = divergence_plan(
        hidden,
        weight,
        ((streams[1], run.ref_compute_dtype), (streams[4], run.second_compute_dtype))[:num_teachers],
        run.run_mode,
        num_tokens=num_tokens,
        num_kept=num_kept(with_gradient, run.run_mode),
        compute_dtype=run.compute_dtype,
        backend=backend,
        workspace_mib=run.workspace_mib,
        cache_mib=run.cache_mib,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
    )
    targets = (labels if is_all or index_kind in PER_TOKEN else labels.index_select(0, index)).long()

    def head(
        states: Tensor, its_weight: Tensor, its_bias: Tensor | None, scalars: tuple[Any, ...]
    ) -> HeadCall:
        rows = None if is_all else index
        return _head_call(
            states, its_weight, its_bias, rows, index_kind == "repeated", targets, plan, backend, scalars
        )

    policy = head(hidden, weight, bias, run[9:13])
    calls = [head(streams[0], streams[1], streams[2], run[13:17])]
    if num_teachers == 2:
        calls.append(head(streams[3], streams[4], streams[5], run[17:21]))
        if policy.index is not None and index_kind not in PER_TOKEN:
            coefficients = coefficients.index_select(1, policy.index)
    return DivergenceCall(
        policy,
        tuple(calls),
        coefficients,
        (run.first_slope, run.second_slope) if num_teachers == 2 else (0.0, 0.0),
        names,
        with_gradient,
        run.jsd_beta,
    )


def _head_call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    has_repeats: bool,
    labels: Tensor,
    plan: Plan,
    backend: str,
    scalars: tuple[Any, ...],
) -> HeadCall:
    scale, softcap, temperature, compute_dtype = scalars
    acc = accumulation_dtype(compute_dtype)
    return HeadCall(
        hidden=hidden,
        weight=weight,
        bias=bias,
        index=index,
        has_repeats=has_repeats,
        labels=labels,
        ref_hidden=None,
        transform=LogitTransform(
            bias=None if bias is None else bias.to(acc).contiguous(),
            scale=scale,
            softcap=softcap,
            temperature=temperature,
        ),
        plan=plan,
        backend=backend,
        compute_dtype=compute_dtype,
        logits_dtype=acc,
        operand_dtype=operand_dtype(compute_dtype, acc, hidden.device),
    )
