"""``token_divergence``: per-token KL and Jensen-Shannon divergences from a teacher's hidden states and head.

The checks, the mode, and the shapes that the caller sees; ``divergence_library.py`` has the op behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.kernels.divergence import DIVERGENCES, DivergenceOutputs
from fastdpo.ops import checks
from fastdpo.ops.backends import DIVERGENCE_BACKENDS, resolve_divergence_backend
from fastdpo.ops.divergence_chunks import differentiable, num_kept
from fastdpo.ops.divergence_library import DivergenceOptions, divergence_op
from fastdpo.ops.divergence_plan import divergence_plan
from fastdpo.ops.linear_logprob import flat_rows, labelled_rows
from fastdpo.plan.modes import resolve_mode
from fastdpo.plan.plan import Plan
from fastdpo.types import Execution, LMHead, TeacherCombination, TokenDivergenceOutput, TokenLayout

OUTPUTS = DivergenceOutputs._fields
DEFAULT_JSD_BETA = 0.5
MODES = ("auto", "score", "stash", "cache", "recompute")


def token_divergence(
    hidden: Tensor,
    lm_head: LMHead | Tensor | torch.nn.Linear,
    ref_hidden: Tensor,
    labels: Tensor | TokenLayout,
    *,
    outputs: tuple[str, ...] = ("forward_kl",),
    ref_lm_head: LMHead | Tensor | torch.nn.Linear | None = None,
    second_hidden: Tensor | None = None,
    second_lm_head: LMHead | Tensor | torch.nn.Linear | None = None,
    combination: TeacherCombination | None = None,
    jsd_beta: float | None = None,
    logps_requires_grad: bool = True,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    token_index: Tensor | None = None,
    execution: Execution | None = None,
) -> TokenDivergenceOutput:
    """Per-token divergences of a policy from a teacher over the whole vocabulary, without the batch's logits.

    With p the policy's distribution and q the teacher's, each of its own hidden states and head:
    ``forward_kl`` is KL(q || p), ``reverse_kl`` is KL(p || q), and ``jsd``, with m = b q + (1 - b) p, is
    b KL(q || m) + (1 - b) KL(p || m). The teacher may be made of two, q = softmax(a z_first + b z_second)
    with coefficients per token. Only labelled tokens enter a matrix product; logits exist for one chunk at a
    time.

    Products of 2 N H V FLOP, with one teacher: 2 without a gradient; 3 with the head frozen (``stash``, all
    in the forward pass); with the head trained 4 in ``cache`` while all of D is kept (2 and 2) and 6 in
    ``recompute`` (2 and 4; frozen 2 and 3). A second teacher adds one to each pass that makes logits.
    ``logps`` beside a divergence keep as much again: 4 with the head frozen, and trained 4 as well, while
    ``cache_mib`` holds two D's. Several divergences in one call take ``recompute``.

    Args:
        hidden: ``(..., H)`` of the policy, float64, float32, bfloat16 or float16.
        lm_head: the policy's head: an `LMHead`, a ``(V, H)`` tensor, or an ``nn.Linear``.
        ref_hidden: ``(..., H')`` of the teacher, the same positions; a constant, as all that is a teacher's:
            no gradient flows to it. H' may differ from H.
        labels: ``(...)`` int64 or int32, or a `TokenLayout`, as in ``linear_logprob``: they say which tokens
            count, those other than ``ignore_index``, and which the log-probabilities are of.
        outputs: what to make, from ``forward_kl``, ``reverse_kl``, ``jsd``, at least one of them; ``logps``
            and ``ref_logps``, log p and log q of the labels, from the same logits (the second never
            differentiable); and of two teachers ``l1_distance`` (sum |q_first - q_second|, never
            differentiable).
        ref_lm_head: the teacher's head; None: ``lm_head``. Its vocabulary has the same size, but for
            ``vocab_size``.
        second_hidden, second_lm_head: a second teacher; its head None: the first one's.
        combination: with a second teacher, how the two make one; see `TeacherCombination`.
        jsd_beta: b, between 0 and 1; None: 0.5. Towards 0 and 1 the divergence goes to 0.
        logps_requires_grad: whether ``logps`` are differentiable. Those to be looked at alone cost nothing
            beside a divergence.
        vocab_size: the size of the vocabulary that all of it is over, the first so many rows of each head:
            for heads of one tokenizer, padded to different sizes. None: heads of one size.
        ignore_index, token_index: as in ``linear_logprob``.
        execution: ``mode``, ``compute_dtype``, the budgets, and ``backend``: ``triton`` on a GPU, ``cpu``,
            or plain torch (``reference``), in fp32 (fp64 for float64, plain torch's alone). See `Execution`.

    Returns:
        `TokenDivergenceOutput` of tensors of the labels' shape, float32 (float64 for float64 operands), in
        nats. A token that q has and p masks (a logit of -inf) makes KL(q || p) infinite. ``logps`` are within
        the same limits of fp64 as those of ``linear_logprob``, which has other chunks and so other bits; a
        label outside 0..V-1 makes them NaN.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a combination of them that
            means nothing; heads with vocabularies of different size.
        TypeError: an argument of the wrong type.
        RuntimeError: on a second derivative, and under ``torch.func``.

    Example:
        >>> hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(0, 11, (2, 5))
        >>> token_divergence(hidden, weight, hidden, labels).forward_kl.abs().max()
        tensor(0.)

    Source: TDPO, arXiv:2404.11999 (forward KL); AlignDistil, arXiv:2503.02832 (reverse KL to two teachers);
        generalised JSD, arXiv:2306.13649 eq. 1.
    """
    targets, token_index, index_kind = labelled_rows(hidden, labels, token_index)
    head = checks.as_head(lm_head)
    checks.check_inputs(hidden, head)
    run = _check_execution(execution)
    wanted = _check_outputs(outputs, second_hidden is not None)
    beta = _check_jsd_beta(jsd_beta, wanted)
    teachers = _check_teachers(
        hidden, head, ref_hidden, ref_lm_head, second_hidden, second_lm_head, combination
    )
    head, teachers = _over_vocabulary(head, teachers, vocab_size)
    scalars: list[Any] = []
    dtypes: list[torch.dtype] = []
    for name, states, its_head in (("hidden", hidden, head), *teachers):
        dtype, _ = checks.resolve_dtypes(states, its_head.weight, run)
        dtypes.append(dtype)
        scalars += [its_head.logit_scale, its_head.softcap, its_head.temperature, dtype]
        if checks.accumulation_dtype(dtype) != checks.accumulation_dtype(dtypes[0]):
            raise checks.fail(name, f"{dtype} beside a policy in {dtypes[0]}", "float64 for both or neither")
    tensors: list[Any] = []
    for _, states, its_head in teachers:
        bias = None if its_head.bias is None else its_head.bias.detach()
        tensors += [flat_rows(states.detach()), its_head.weight.detach(), bias]
    if len(teachers) == 1:
        tensors += [None, None, None]
        scalars += [1.0, None, 1.0, dtypes[0]]
    coefficients, slopes = _coefficients(combination, targets, checks.accumulation_dtype(dtypes[0]))
    options = DivergenceOptions(
        ",".join(wanted),
        logps_requires_grad,
        beta,
        *slopes,
        _settle_mode(hidden, head, run, wanted),
        run.backend,
        run.workspace_mib,
        run.cache_mib,
        *scalars,
    )
    results = divergence_op(
        flat_rows(hidden),
        head.weight,
        head.bias,
        targets.reshape(-1),
        token_index,
        index_kind,
        ignore_index,
        *tensors,
        coefficients,
        *options,
    )
    named = zip(OUTPUTS, results, strict=False)  # the index and what is kept come behind
    return TokenDivergenceOutput(
        **{name: value.view(targets.shape) for name, value in named if name in wanted}
    )


def _check_execution(execution: Execution | None) -> Execution:
    """An execution whose every option means something here."""
    run = checks.check_execution(execution)
    if run.mode not in MODES:
        raise checks.fail("execution.mode", repr(run.mode), f"one of {MODES} for token_divergence")
    if run.backend not in ("auto", *DIVERGENCE_BACKENDS):
        wanted = f"one of {('auto', *DIVERGENCE_BACKENDS)}, which have a kernel for divergences"
        raise checks.fail("execution.backend", repr(run.backend), wanted)
    if run.logits_dtype == "bf16":
        raise checks.fail("execution.logits_dtype", "'bf16'", "None: divergences are of fp32 logits")
    return run


def _check_outputs(outputs: object, has_second: bool) -> tuple[str, ...]:
    if isinstance(outputs, str) or not isinstance(outputs, (tuple, list)):
        raise checks.fail("outputs", repr(outputs), f"a tuple of names from {OUTPUTS}")
    for name in outputs:
        if name not in OUTPUTS:
            raise checks.fail("outputs", repr(name), f"names from {OUTPUTS}")
    if not set(outputs) & set(DIVERGENCES):
        raise checks.fail("outputs", repr(outputs), f"at least one of {DIVERGENCES}")
    if "l1_distance" in outputs and not has_second:
        raise checks.fail("outputs", "'l1_distance' without second_hidden", "two teachers for it")
    return tuple(dict.fromkeys(outputs))


def _check_jsd_beta(jsd_beta: float | None, outputs: tuple[str, ...]) -> float:
    if jsd_beta is None:
        return DEFAULT_JSD_BETA
    if "jsd" not in outputs:
        raise checks.fail("jsd_beta", repr(jsd_beta), "None, or outputs to name 'jsd'")
    if isinstance(jsd_beta, bool) or not isinstance(jsd_beta, (int, float)) or not 0 < jsd_beta < 1:
        wanted = "a number between 0 and 1; for the limits name 'forward_kl' or 'reverse_kl'"
        raise checks.fail("jsd_beta", repr(jsd_beta), wanted)
    return float(jsd_beta)


def _check_teachers(
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_lm_head: object,
    second_hidden: Tensor | None,
    second_lm_head: object,
    combination: object,
) -> list[tuple[str, Tensor, LMHead]]:
    """Name, states and head of one teacher or two."""
    ref_head = head if ref_lm_head is None else checks.as_head(ref_lm_head, "ref_lm_head")
    teachers = [("ref_hidden", ref_hidden, ref_head)]
    if second_hidden is None:
        for name, value in (("second_lm_head", second_lm_head), ("combination", combination)):
            if value is not None:
                raise checks.fail(name, "a value without second_hidden", "second_hidden as well")
    else:
        if not isinstance(combination, TeacherCombination):
            wanted = "a TeacherCombination with second_hidden"
            raise checks.fail("combination", type(combination).__name__, wanted)
        second_head = ref_head if second_lm_head is None else checks.as_head(second_lm_head, "second_lm_head")
        teachers.append(("second_hidden", second_hidden, second_head))
    for name, states, its_head in teachers:
        if not isinstance(states, Tensor):
            raise TypeError(f"{name}: got {type(states).__name__}, wanted a Tensor")
        size = its_head.weight.shape[1]
        if states.shape[:-1] != hidden.shape[:-1] or states.shape[-1] != size:
            wanted = (
                f"(*{tuple(hidden.shape[:-1])}, {size}), the positions of hidden and the size of its head"
            )
            raise checks.fail(name, f"shape {tuple(states.shape)}", wanted)
        if states.dtype not in checks.COMPUTE_DTYPES:
            raise checks.fail(name, states.dtype, "float64, float32, bfloat16 or float16")
        head_name = name.replace("_hidden", "_lm_head")
        for what, device in ((name, states.device), (f"{head_name}.weight", its_head.weight.device)):
            if device != hidden.device:
                raise checks.fail(what, device, f"{hidden.device}, the device of hidden")
    return teachers


def _over_vocabulary(
    head: LMHead, teachers: list[tuple[str, Tensor, LMHead]], vocab_size: int | None
) -> tuple[LMHead, list[tuple[str, Tensor, LMHead]]]:
    """The heads with rows for one vocabulary: as they come, or the first ``vocab_size`` of each."""
    if vocab_size is not None and (type(vocab_size) is not int or vocab_size < 1):
        raise checks.fail("vocab_size", repr(vocab_size), "a whole number from 1, or None")
    size = head.weight.shape[0] if vocab_size is None else vocab_size
    named = [("lm_head", head), *((name.replace("_hidden", "_lm_head"), its) for name, _, its in teachers)]
    for name, its_head in named:
        rows = its_head.weight.shape[0]
        if vocab_size is None and rows != size:
            wanted = f"{size}, as lm_head has it, or vocab_size"
            raise checks.fail(name, f"a vocabulary of {rows}", wanted)
        if rows < size:
            raise checks.fail("vocab_size", size, f"at most {rows}, the rows of {name}")

    def narrowed(whole: LMHead) -> LMHead:
        if whole.weight.shape[0] == size:
            return whole
        bias = None if whole.bias is None else whole.bias[:size]
        return replace(whole, weight=whole.weight[:size], bias=bias)

    return narrowed(head), [(name, states, narrowed(its_head)) for name, states, its_head in teachers]


def _coefficients(
    combination: TeacherCombination | None, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, tuple[float, float]]:
    """``(2, M)``, a and b of every position less what their slopes add, and the slopes."""
    if combination is None:
        return None, (0.0, 0.0)
    rows = []
    for name in ("first", "second", "first_slope", "second_slope"):
        value = getattr(combination, name)
        if isinstance(value, Tensor) and not name.endswith("slope"):
            if value.shape != targets.shape or not value.is_floating_point():
                got = f"{value.dtype} of shape {tuple(value.shape)}"
                raise checks.fail(f"combination.{name}", got, f"floating-point {tuple(targets.shape)}")
            if value.device != targets.device:
                raise checks.fail(f"combination.{name}", value.device, f"{targets.device}")
            rows.append(value.detach().reshape(-1).to(dtype))
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise checks.fail(f"combination.{name}", repr(value), "a finite number")
        if not name.endswith("slope"):
            rows.append(torch.full((targets.numel(),), value, dtype=dtype, device=targets.device))
    return torch.stack(rows), (float(combination.first_slope), float(combination.second_slope))


def _settle_mode(hidden: Tensor, head: LMHead, run: Execution, outputs: tuple[str, ...]) -> str:
    has_grad = torch.is_grad_enabled()
    mode = resolve_mode(
        run.mode,
        needs_hidden=has_grad and hidden.requires_grad,
        needs_weight=has_grad and head.weight.requires_grad,
        needs_bias=has_grad and head.bias is not None and head.bias.requires_grad,
        cache_mib=run.cache_mib,
    )
    # What is kept for the backward pass is the gradient of one divergence, with logps beside it or without.
    if mode in ("stash", "cache") and len(set(outputs) & set(DIVERGENCES)) > 1:
        if run.mode != "auto":
            raise checks.fail("execution.mode", f"{mode!r} with several divergences", "'recompute' or 'auto'")
        return "recompute"
    return mode


def plan_divergences(
    hidden: Tensor,
    lm_head: LMHead,
    teachers: Sequence[tuple[Tensor, LMHead]],
    num_tokens: int,
    *,
    outputs: tuple[str, ...],
    logps_requires_grad: bool = True,
    vocab_size: int | None = None,
    execution: Execution | None = None,
) -> Plan:
    """The plan of a `token_divergence` of N labelled tokens; nothing runs, only shapes and dtypes are read.

    Args:
        hidden, lm_head: whether they require gradients says what the backward pass makes.
        teachers: states and head of one teacher, or of two.
        num_tokens: N.
        outputs, logps_requires_grad, vocab_size, execution: as there.

    Raises:
        ValueError: what the call itself would raise for its mode or outputs.
    """
    run = _check_execution(execution)
    wanted = _check_outputs(outputs, len(teachers) == 2)
    mode = _settle_mode(hidden, lm_head, run, wanted)
    named = [("ref_hidden", *teachers[0]), *(("second_hidden", *teacher) for teacher in teachers[1:])]
    head, heads = _over_vocabulary(lm_head, named, vocab_size)
    has_grad = torch.is_grad_enabled()
    dtype, _ = checks.resolve_dtypes(hidden, lm_head.weight, run)
    return divergence_plan(
        hidden,
        head.weight,
        [(its.weight, checks.resolve_dtypes(states, its.weight, run)[0]) for _, states, its in heads],
        mode,
        num_tokens=num_tokens,
        num_kept=num_kept(differentiable(wanted, logps_requires_grad), mode),
        compute_dtype=dtype,
        backend=resolve_divergence_backend(run.backend, hidden.device, checks.accumulation_dtype(dtype)),
        workspace_mib=run.workspace_mib,
        cache_mib=run.cache_mib,
        needs_hidden=has_grad and hidden.requires_grad,
        needs_weight=has_grad and lm_head.weight.requires_grad,
        needs_bias=has_grad and lm_head.bias is not None and lm_head.bias.requires_grad,
    )
