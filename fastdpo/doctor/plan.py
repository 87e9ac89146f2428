"""``fastdpo doctor``: the plan of a call of a model's head, as the op would make it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdpo.integrations.lm_head import unwrap
from fastdpo.ops.backends import resolve_divergence_backend
from fastdpo.ops.checks import accumulation_dtype, resolve_dtypes
from fastdpo.ops.library import head_call
from fastdpo.ops.linear_logprob import call_options, settle_mode
from fastdpo.ops.token_divergence import plan_divergences
from fastdpo.plan.plan import Plan
from fastdpo.types import Execution, HeadAdapter, LMHead


class Divergences(NamedTuple):
    """What a call asks of ``token_divergence``; but for the heads arguments of ``plan_divergences``."""

    heads: tuple[LMHead, ...]
    outputs: tuple[str, ...]
    logps_requires_grad: bool
    vocab_size: int | None


def plan_of(
    model: nn.Module,
    head: LMHead,
    execution: Execution,
    row_tokens: Sequence[int],
    has_pair_loss: bool = False,
    divergences: Divergences | None = None,
) -> tuple[Plan, str]:
    """The plan and the backend of one call of the head, as its op would settle them.

    Args:
        row_tokens: labelled tokens of each row of data.
        has_pair_loss: whether rows are pairs, and the call makes their loss.
        divergences: what the call measures; with None the op is ``linear_logprob``.

    Raises:
        ValueError, TypeError: what the call itself would raise.
    """
    weight, num_tokens = head.weight, sum(row_tokens)
    own = [t for t in (weight, head.bias) if t is not None]
    own += list(head.adapter[:2]) if isinstance(head.adapter, HeadAdapter) else []
    tied = weight is unwrap(model).get_input_embeddings().weight
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is t for t in own)]
    trains_backbone = bool(rest) or (tied and weight.requires_grad)
    # No memory behind it, as the plan reads shapes alone.
    hidden = weight.detach().new_empty((1, weight.shape[1])).expand(num_tokens, -1)
    if torch.is_autocast_enabled(weight.device.type):
        hidden = hidden.float()[:1].expand(num_tokens, -1)
    hidden = hidden.requires_grad_(trains_backbone)
    if divergences is not None:
        teachers = [(its.weight[:1], its) for its in divergences.heads]  # of these, too, shape and dtype
        how: dict[str, Any] = {"execution": execution, **divergences._asdict()}
        del how["heads"]
        with torch.enable_grad():
            plan = plan_divergences(hidden, head, teachers, num_tokens, **how)
        sums = accumulation_dtype(resolve_dtypes(hidden, weight, execution)[0])
        return plan, resolve_divergence_backend(execution.backend, weight.device, sums)
    with torch.enable_grad():
        mode = settle_mode(hidden, head, execution, has_row_loss=has_pair_loss)
        options = call_options(hidden, head, execution, mode)
    index = torch.zeros(num_tokens, dtype=torch.int64, device=weight.device)
    call = head_call(
        hidden.detach(),
        weight.detach(),
        None,
        index,
        index,
        "tokens",
        options,
        needs_hidden=trains_backbone,
        needs_weight=weight.requires_grad,
        needs_bias=head.bias is not None and head.bias.requires_grad,
        loss_rows=list(accumulate(row_tokens, initial=0)),
    )
    return call.plan, call.backend
