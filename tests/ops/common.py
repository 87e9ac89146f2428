"""What the op's tests share: a case through `linear_logprob`, and every backend that can run here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, linear_logprob
from fastdpo.definitions.logprob import linear_logprob_reference
from fastdpo.ops.backends import resolve_backend
from fastdpo.testing import Case, HeadResults
from fastdpo.types import LinearLogprobOutput


def backend_or_skip(name: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend's name on the CPU, or a skip with the reason why it does not run here."""
    try:
        return resolve_backend(name, torch.device("cpu"), dtype)
    except (ValueError, TypeError) as error:
        pytest.skip(str(error))


def leaves(case: Case, *, hidden: bool = True, weight: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fresh copies of the case's tensors that require the gradients named; the bias goes with the weight."""
    h = case.hidden.clone().requires_grad_(hidden)
    w = case.weight.clone().requires_grad_(weight)
    b = None if case.bias is None else case.bias.clone().requires_grad_(weight)
    return h, w, b


def run_op(
    case: Case, h: Tensor, w: Tensor, b: Tensor | None, execution: Execution | None = None, **kwargs: Any
) -> LinearLogprobOutput:
    """`linear_logprob` on a case."""
    head = replace(case.lm_head, weight=w, bias=b)
    return linear_logprob(h, head, case.labels, ignore_index=case.ignore_index, execution=execution, **kwargs)


def op_results(case: Case, execution: Execution | None = None, **kwargs: Any) -> HeadResults:
    """Log-probabilities and all gradients of a case."""
    h, w, b = leaves(case)
    out = run_op(case, h, w, b, execution, **kwargs)
    wanted = [leaf for leaf in (h, w, b) if leaf is not None]
    grads = torch.autograd.grad(out.logps, wanted, case.upstream.to(out.logps.dtype))
    return HeadResults(out.logps.detach(), grads[0], grads[1], grads[2] if b is not None else None)


def dense_output(
    case: Case, h: Tensor, w: Tensor, b: Tensor | None, outputs: tuple[str, ...] = ()
) -> LinearLogprobOutput:
    """The definition on a case, in the dtype of the tensors given."""
    return linear_logprob_reference(
        h,
        w,
        case.labels,
        bias=b,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        temperature=case.temperature,
        ignore_index=case.ignore_index,
        outputs=outputs,
    )
