"""``linear_logprob``: hidden states and a head to per-token log-probabilities, differentiable.

The checks, the mode, and the shapes that the caller sees; ``library.py`` has the op behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops import checks
from fastdpo.ops.adapted import adapted_results, settle_adapted_mode
from fastdpo.ops.library import CallOptions, forward_op
from fastdpo.ops.shard_check import largest_part
from fastdpo.ops.vocab_parallel import sharded_logprob
from fastdpo.plan.modes import resolve_mode, settled_run
from fastdpo.plan.schedule import holds_a_chunk_row
from fastdpo.types import (
    TOKEN_STATISTICS,
    TOPK_STATISTICS,
    Execution,
    LinearLogprobOutput,
    LMHead,
    TokenLayout,
)


def linear_logprob(
    hidden: Tensor,
    lm_head: LMHead | Tensor | torch.nn.Linear,
    labels: Tensor | TokenLayout,
    *,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    topk: int | None = None,
    entropy_requires_grad: bool = False,
    token_index: Tensor | None = None,
    check_labels: bool = False,
    grad_weight_out: Tensor | None = None,
    execution: Execution | None = None,
) -> LinearLogprobOutput:
    """Per-token log-probabilities of labels under a language-model head, without the logits of the batch.

    With z = softcap(s (W h + b)) / tau, the log-probability of label y is z_y - logsumexp(z). Only labelled
    tokens enter a matrix product; logits exist for one chunk at a time.

    Args:
        hidden: ``(..., H)``, float64, float32, bfloat16 or float16.
        lm_head: an `LMHead`, a ``(V, H)`` tensor, or an ``nn.Linear``; in the dtype of ``hidden``, unless
            autocast or ``execution.compute_dtype`` casts both.
        labels: ``(...)`` int64 or int32, aligned with ``hidden`` (no shift): ``labels[i]`` is the token that
            ``hidden[i]`` predicts. A label outside 0..V-1 makes its log-probability NaN. Or a `TokenLayout`
            of N tokens, whose rows may predict several; results then have shape ``(N,)``.
        ignore_index: the label of tokens that are not scored; they cost nothing and get 0.
        outputs: further statistics, from ``lse`` (differentiable), ``entropy``, ``log_sum_sq_probs``,
            ``mean_logit``, ``is_top1``, ``topk_mass``, ``topk_entropy``; in nats, of the distribution after
            cap and temperature.
        topk: k of the last two, 1 to V; None: 10. With p_1..p_k the largest probabilities, ``topk_mass`` is
            M = sum p_i and ``topk_entropy`` H = -sum p_i log p_i, neither of them differentiable. Divided
            by ln 2 H is in bits; of the renormalised p_i / M it is H / M + log M. For k = V, 1 and the
            entropy. Both falling on held-out answers is a sign of over-optimisation (arXiv:2410.11677 sec.
            4, with k = 10 and bits). Mode ``lean`` has them where its backend stores logits.
        entropy_requires_grad: make ``entropy`` differentiable (mode ``recompute``).
        token_index: ``(N,)`` int64, the flat positions of the labelled tokens, none twice. With it there
            is no host synchronisation; without it there is one. Other positions count as ignored. On a CPU
            a position out of range or named twice raises; on a GPU with ``check_labels``.
        check_labels: raise on labels outside 0..V-1, and on a GPU on a wrong ``token_index`` (one more
            synchronisation each).
        grad_weight_out: ``(V, H)`` contiguous, in the weight's dtype or float32. The backward pass adds the
            weight's gradient to it and returns none for the weight.
        execution: how to run; see `Execution`.

    Returns:
        `LinearLogprobOutput` of tensors of the labels' shape, float32 (float64 for float64 operands).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
        TypeError: an argument of the wrong type, or float64 on a backend that has none.
        RuntimeError: on a second derivative, and under ``torch.func``.

    Example:
        >>> out = linear_logprob(torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(0, 11, (2, 5)))
        >>> out.logps.shape
        torch.Size([2, 5])
    """
    targets, token_index, index_kind = labelled_rows(hidden, labels, token_index, reads_values=check_labels)
    output, _ = indexed_logprob(
        hidden,
        checks.as_head(lm_head, takes_all=True),
        targets,
        token_index,
        index_kind,
        ignore_index=ignore_index,
        outputs=outputs,
        topk=topk,
        entropy_requires_grad=entropy_requires_grad,
        check_labels=check_labels,
        grad_weight_out=grad_weight_out,
        execution=execution,
    )
    return output


def labelled_rows(
    hidden: Tensor,
    labels: Tensor | TokenLayout,
    token_index: Tensor | None,
    *,
    reads_values: bool = False,
) -> tuple[Tensor, Tensor | None, str]:
    """Checked labels, the index of their rows and its kind (``library.INDEX_KINDS``).

    ``reads_values``: check the values of ``token_index`` on a GPU too.
    """
    if isinstance(labels, TokenLayout):
        if token_index is not None:
            raise checks.fail("token_index", "a value together with a TokenLayout", "None: the layout has it")
        checks.check_token_layout(labels, hidden)
        return labels.target_ids, labels.token_index, "repeated"
    checks.check_labels(labels, hidden)
    checks.check_token_index(token_index, hidden, reads_values=reads_values)
    return labels, token_index, "found" if token_index is None else "given"


def indexed_logprob(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    token_index: Tensor | None,
    index_kind: str,
    *,
    ref_hidden: Tensor | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    topk: int | None = None,
    entropy_requires_grad: bool = False,
    check_labels: bool = False,
    grad_weight_out: Tensor | None = None,
    execution: Execution | None = None,
) -> tuple[LinearLogprobOutput, Tensor | None]:
    """``linear_logprob`` for a checked head and index (``library.INDEX_KINDS``), and with a reference.

    Returns:
        The output, and the log-probabilities of ``ref_hidden`` (the shape of ``hidden``, the same head) or
        None: chunk after chunk right behind the policy's, without a gradient.
    """
    wanted = checks.check_outputs(outputs, entropy_requires_grad, has_topk=True)
    k = checks.check_topk(topk, wanted, head.weight.shape[0])
    if head.vocab_parallel is not None:
        return sharded_logprob(
            indexed_logprob,
            hidden,
            head,
            labels,
            token_index,
            index_kind,
            ref_hidden=ref_hidden,
            ignore_index=ignore_index,
            wanted=wanted,
            entropy_requires_grad=entropy_requires_grad,
            check_labels=check_labels,
            grad_weight_out=grad_weight_out,
            execution=execution,
        )
    checks.check_inputs(hidden, head)
    checks.check_grad_weight_out(grad_weight_out, head.weight)
    run = checks.check_execution(execution)

    mode = settle_mode(hidden, head, run, entropy_requires_grad=entropy_requires_grad)
    rows = (labels.reshape(-1), token_index, index_kind)
    options = call_options(hidden, head, run, mode, entropy_requires_grad=entropy_requires_grad)
    statistics = ",".join(name for name in wanted if name in TOKEN_STATISTICS)
    scalars = (ignore_index, statistics, k, entropy_requires_grad, check_labels, *options)
    if head.adapter is not None:
        assert ref_hidden is None, "a head with an adapter is never one head for policy and reference"
        results = adapted_results(flat_rows(hidden), head, *rows, run, grad_weight_out, *scalars)
    else:
        ref_rows = None if ref_hidden is None else flat_rows(ref_hidden.detach())
        results = forward_op(
            flat_rows(hidden), head.weight, head.bias, *rows, ref_rows, grad_weight_out, *scalars
        )
    logps, *made, ref_logps, _, _ = results

    named = zip((*TOKEN_STATISTICS, *TOPK_STATISTICS), made, strict=True)
    output = LinearLogprobOutput(
        logps.view(labels.shape),
        **{name: value.view(labels.shape) for name, value in named if name in wanted},
    )
    return output, None if ref_hidden is None else ref_logps.view(labels.shape)


def settle_mode(
    hidden: Tensor,
    head: LMHead,
    run: Execution,
    *,
    entropy_requires_grad: bool = False,
    has_row_loss: bool = False,
) -> str:
    """The mode that runs for these inputs: what of them needs a gradient, and what the workspace holds."""
    if head.adapter is not None:
        return settle_adapted_mode(hidden, head, run, entropy_requires_grad=entropy_requires_grad)
    has_grad = torch.is_grad_enabled()
    _, logits_dtype = checks.resolve_dtypes(hidden, head.weight, run)
    mode = resolve_mode(
        run.mode,
        needs_hidden=has_grad and hidden.requires_grad,
        needs_weight=has_grad and head.weight.requires_grad,
        needs_bias=has_grad and head.bias is not None and head.bias.requires_grad,
        entropy_requires_grad=entropy_requires_grad,
        cache_mib=run.cache_mib,
        has_row_loss=has_row_loss,
        # Ranks with parts of a vocabulary have to agree.
        holds_a_row=holds_a_chunk_row(
            head.weight.shape[0] if head.vocab_parallel is None else largest_part(head),
            logits_dtype.itemsize,
            run.workspace_mib,
        ),
    )
    if mode == "lean" and logits_dtype == torch.bfloat16:
        raise checks.fail("execution.logits_dtype", "'bf16' with mode 'lean', which stores no logits", "None")
    return mode


def flat_rows(hidden: Tensor) -> Tensor:
    """``(..., H)`` as ``(M, H)``; a view where the strides allow one."""
    return hidden.reshape(-1, hidden.shape[-1])


def call_options(
    hidden: Tensor, head: LMHead, run: Execution, mode: str, *, entropy_requires_grad: bool = False
) -> CallOptions:
    """The scalars of the ops, from what the caller said and a settled mode."""
    compute_dtype, logits_dtype = checks.resolve_dtypes(hidden, head.weight, run)
    trains_head = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    run_mode = settled_run(
        mode,
        needs_hidden=torch.is_grad_enabled() and hidden.requires_grad,
        trains_head=trains_head,
        entropy_requires_grad=entropy_requires_grad,
    )
    return CallOptions(
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=head.temperature,
        run_mode=run_mode,
        backend=run.backend,
        compute_dtype=compute_dtype,
        logits_dtype=logits_dtype,
        workspace_mib=run.workspace_mib,
        cache_mib=run.cache_mib,
    )
