"""Mode ``pairs`` as a torch.library op: one forward pass gives the loss and the gradients of it.

An op takes no callable: a loss is named by a key of ``GROUP_LOSSES``, its parameters as text and its tensors.
The backward pass hands out the gradients made in the forward pass, scaled by the incoming one. They are given
away once: a second backward pass, and one that builds a graph, compute them again with ``linear_logprob``'s
backward op from the kept dL/dlogp, so that nothing handed out earlier changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.contract import RowOutputs
from fastdpo.ops import checks
from fastdpo.ops.grouped_chunks import GroupLoss, grouped_chunks
from fastdpo.ops.library import OPTIONS_SCHEMA, CallOptions, backward_op, empty_output, head_call
from fastdpo.ops.linear_logprob import call_options, flat_rows
from fastdpo.ops.scaling import scaled
from fastdpo.ops.shard_groups import carried_shard, restored_shard
from fastdpo.ops.vocab_parallel import own_labels, summed_rows
from fastdpo.types import Execution, LinearLogprobOutput, LMHead, VocabShard

# key -> (parameters as text, tensors) -> the loss of a group; filled by the layer that knows losses.
GROUP_LOSSES: dict[str, Callable[[str, Sequence[Tensor]], GroupLoss]] = {}


class GradientNeeds(NamedTuple):
    """What needs a gradient. An op's forward cannot ask its inputs: they come detached."""

    hidden: bool
    weight: bool
    bias: bool


@contextmanager
def recording_gradients() -> Iterator[None]:
    """Autograd inside an op, whose implementation runs below it, for the small graph of a loss."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


@torch.library.custom_op(
    "fastdpo::grouped_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor token_index, str index_kind, "
    "Tensor? ref_hidden, Tensor loss_rows, str loss_key, str loss_parameters, Tensor[] loss_tensors, "
    "str shard, str statistics, bool needs_hidden, bool needs_weight, bool needs_bias, "
    f"{OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def grouped_loss_op(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    token_index: Tensor,  # (N,), row by row of the loss
    index_kind: str,  # one of PER_TOKEN
    ref_hidden: Tensor | None,  # (M, H)
    loss_rows: Tensor,  # on the host: row r of the loss has tokens [loss_rows[r], loss_rows[r + 1])
    loss_key: str,
    loss_parameters: str,
    loss_tensors: list[Tensor],
    shard: str,  # of a part of the vocabulary, what `carried_shard` wrote of it; labels are the part's own
    statistics: str,  # names joined by commas
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    *options: Any,  # CallOptions
) -> tuple[Tensor, ...]:
    """The loss ``()``, six results ``(N,)`` (those not asked for ``(0,)``), the reference's log-probabilities
    ``(N,)``, dL/dlogp as of `GroupedResults`, dhidden, dweight and dbias (``(0,)`` where not needed)."""
    run = CallOptions(*options)
    needs: dict[str, Any] = {
        "needs_hidden": needs_hidden, "needs_weight": needs_weight, "needs_bias": needs_bias,
    }  # fmt: skip
    rows = (hidden, weight, bias, labels, token_index, index_kind)
    largest, join = restored_shard(shard, weight.shape[0])
    batch: dict[str, Any] = {"loss_rows": loss_rows.tolist(), "largest_part": largest, **needs}
    call = head_call(*rows, run, ref_hidden=ref_hidden, **batch)
    with torch.amp.autocast(hidden.device.type, enabled=False):
        results = grouped_chunks(
            call,
            tuple(filter(None, statistics.split(","))),
            GROUP_LOSSES[loss_key](loss_parameters, loss_tensors),
            **needs,
            join=join,
        )

    def or_empty(value: Tensor | None, name: str = "logps") -> Tensor:
        return empty_output(hidden, name, run.compute_dtype, 0) if value is None else value

    tokens = [or_empty(value, name) for name, value in results.outputs._asdict().items()]
    grads = (results.dhidden, results.dweight, results.dbias)
    ref_logps = or_empty(results.ref_logps)
    return (results.loss, *tokens, ref_logps, results.token_grads, *map(or_empty, grads))


@grouped_loss_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, labels = arguments[:4]
    ref_hidden = arguments[6]
    shard, statistics = arguments[11:13]
    needs = GradientNeeds(*arguments[13:16])
    run = CallOptions(*arguments[16:])
    num_tokens = labels.shape[0]
    wanted = ("logps", "lse", *statistics.split(","))

    def tokens(name: str, is_wanted: bool = True) -> Tensor:
        return empty_output(hidden, name, run.compute_dtype, num_tokens if is_wanted else 0)

    def like(tensor: Tensor, is_needed: bool) -> Tensor:
        if is_needed:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return empty_output(hidden, "logps", run.compute_dtype, 0)

    return (
        empty_output(hidden, "logps", run.compute_dtype, ()),
        *(tokens(name, name in wanted) for name in RowOutputs._fields),
        tokens("logps", ref_hidden is not None),
        empty_output(hidden, "logps", run.compute_dtype, (4, num_tokens) if shard else num_tokens),
        like(hidden, needs.hidden),
        like(weight, needs.weight),
        like(bias, needs.bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, token_index, index_kind = inputs[:6]
    logps, lse = output[1:3]
    token_grads, *grads = output[-4:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, bias, labels, token_index, logps, lse, token_grads)
    # Not saved tensors: the first backward pass takes them away. They have no graph, so there is no cycle.
    ctx.grads = grads
    ctx.index_kind = index_kind
    ctx.needs = GradientNeeds(*inputs[13:16])
    ctx.options = CallOptions(*inputs[16:])
    # No gradient for the rest; a list of tensors wants a list.
    ctx.no_grads = tuple([None] * len(value) if isinstance(value, list) else None for value in inputs[3:])


def _backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None, None, None, *ctx.no_grads)
    grads, ctx.grads = ctx.grads, None
    if grads is None or torch.is_grad_enabled():
        grads = _compute_again(ctx, grad_loss)
    else:
        grads = [scaled(grad, grad_loss) for grad in grads]
    needed = (grad if is_needed else None for grad, is_needed in zip(grads, ctx.needs, strict=True))
    return (*needed, *ctx.no_grads)


def _compute_again(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by recomputation, from dL/dlogp; with a graph whose second derivative raises."""
    hidden, weight, bias, labels, token_index, logps, lse, token_grads = ctx.saved_tensors
    lse_grads = None
    if token_grads.dim() > 1:  # of a part of the vocabulary
        token_grads, lse_grads, logps, lse = token_grads
        lse_grads = lse_grads * grad_loss
    rows = (hidden, weight, bias, labels, token_index, ctx.index_kind, logps, lse, hidden.new_empty(0), None)
    options = ctx.options._replace(run_mode="recompute")
    grads: tuple[Tensor, Tensor, Tensor] = backward_op(
        token_grads * grad_loss, lse_grads, None, *rows, *ctx.needs, *options
    )
    return grads


grouped_loss_op.register_autograd(_backward, setup_context=_setup_context)


def grouped_loss(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    token_index: Tensor,
    index_kind: str,
    loss_rows: Tensor,
    loss: tuple[str, str, list[Tensor]],
    *,
    ref_hidden: Tensor | None = None,
    outputs: tuple[str, ...] = (),
    execution: Execution | None = None,
) -> tuple[Tensor, LinearLogprobOutput, Tensor | None]:
    """Mode ``pairs``: the loss ``()``, differentiable, and what ``indexed_logprob`` gives, detached.

    Args:
        hidden, head, labels, token_index, index_kind, ref_hidden: as for ``indexed_logprob``.
        loss_rows: ``(rows + 1,)`` int64 on the host, where the tokens of each row of the loss begin.
        loss: a key of ``GROUP_LOSSES``, and its parameters and tensors.
    """
    checks.check_inputs(hidden, head)
    wanted = checks.check_outputs(outputs, False)
    run = checks.check_execution(execution)
    hidden, ref_hidden = flat_rows(hidden), None if ref_hidden is None else flat_rows(ref_hidden)
    shard, carried = head.vocab_parallel, ""
    if isinstance(shard, VocabShard):
        carried, labels = carried_shard(head), own_labels(labels, head.weight.shape[0], shard)
        if ref_hidden is not None:
            ref_hidden, *_ = summed_rows(ref_hidden.detach(), token_index, index_kind, shard)
        hidden, token_index, index_kind = summed_rows(hidden, token_index, index_kind, shard)
    own = (hidden, head.weight, head.bias)
    needs = (tensor is not None and tensor.requires_grad for tensor in (hidden, head.weight, head.bias))
    ref_rows = None if ref_hidden is None else ref_hidden.detach()
    options = (carried, ",".join(wanted), *needs, *call_options(hidden, head, run, "pairs"))
    loss_output, *results = grouped_loss_op(
        *own, labels, token_index, index_kind, ref_rows, loss_rows, *loss, *options
    )
    tokens = dict(zip(RowOutputs._fields, results, strict=False))
    named = {name: tokens[name] for name in wanted}
    ref_logps = None if ref_hidden is None else results[len(RowOutputs._fields)]
    return loss_output, LinearLogprobOutput(tokens["logps"], **named), ref_logps
