"""Mode ``pairs``: a batch's objective as an op can carry it, and its loss group by group of rows.

What needs the whole batch, the counts to divide by and the size of the longest list, is known before it.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional.rows import Rows
from fastdpo.functional.tokens import RowTokens
from fastdpo.losses.build import build_objective
from fastdpo.losses.objective import Objective
from fastdpo.ops.grouped_chunks import GroupLoss
from fastdpo.ops.grouped_loss import GROUP_LOSSES, recording_gradients
from fastdpo.ops.sequence import sigmoid_pairs
from fastdpo.plan.schedule import RowGroup

LOSS_KEY = "objective"
# What tokens and rows have that is cut into groups.
OF_TOKENS = ("segment_ids", "offsets", "in_answer", "in_nll")
OF_ROWS = ("token_weights", "ref_logps", "ref_sums", "extras")


def pack_objective(
    loss_arguments: dict[str, Any], rows: Rows, segments: Tensor, divisors: Sequence[float | Tensor]
) -> tuple[str, list[Tensor]]:
    """An objective and all it needs of a batch as an op can carry it: text, and the tensors it numbers.

    Args:
        loss_arguments: of ``build_objective``.
        segments: ``(rows + 1,)`` on the host, where each row's segments begin.
        divisors: of the whole batch (``Objective.divisors``), which take the place of its counts.
    """
    tensors: list[Tensor] = []
    counts = ("num_pairs", "num_tokens")
    parts = {
        "loss": {name: value for name, value in loss_arguments.items() if name not in counts},
        "tokens": {name: getattr(rows.tokens, name) for name in OF_TOKENS},
        "rows": {name: getattr(rows, name) for name in OF_ROWS},
        "segments": segments,
        "divisors": divisors,
    }
    return repr(_plain(parts, tensors, rows.tokens.segment_ids.device)), tensors


# Not functions within the others: one that calls itself is a circle, which keeps the tensors past the call.
def _plain(value: Any, tensors: list[Tensor], device: torch.device) -> Any:
    """Python's own, as ``repr`` writes it: of NumPy's floats and texts it would write the class."""
    if isinstance(value, Tensor) and not (value.dim() == 0 and value.device.type == "cpu" != device.type):
        tensors.append(value)
        return (len(tensors) - 1,)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, tensors, device) for name, item in value.items()}
    if hasattr(value, "tolist"):  # also a number that is on the host: kernels want theirs on the device
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item, tensors, device) for item in value]
    return str(value) if isinstance(value, str) else value


def _restored(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, tuple):
        return tensors[value[0]]
    if isinstance(value, dict):
        return {name: _restored(item, tensors) for name, item in value.items()}
    return [_restored(item, tensors) for item in value] if isinstance(value, list) else value


def _unpack_objective(parameters: str, tensors: Sequence[Tensor]) -> GroupLoss:
    """What ``pack_objective`` made, as a function of a group."""
    parts = _restored(literal_eval(parameters), tensors)
    of_loss, divisors, places = parts["loss"], parts["divisors"], parts["segments"].tolist()
    segment_ids = parts["tokens"]["segment_ids"]
    batch = Rows(RowTokens(places[-1], segment_ids, **parts["tokens"]), **parts["rows"])

    def group_loss(logps: Tensor, ref_logps: Tensor | None, group: RowGroup) -> tuple[Tensor, Tensor]:
        which = slice(group.first_row, group.last_row)
        arguments: dict[str, Any] = {
            name: value[which] if isinstance(value, Tensor) and value.dim() else value
            for name, value in of_loss.items()
        }
        objective = build_objective(**arguments)
        rows = batch.of_group(group, places[group.first_row], places[group.last_row], ref_logps)
        if objective.is_plain_sigmoid:
            return _sigmoid_of_group(objective, rows, logps, divisors[0])
        with recording_gradients():
            leaf = logps.detach().requires_grad_()
            share = objective.total(rows.batch(objective, leaf), divisors)
            (token_grads,) = torch.autograd.grad(share, leaf)
        return share.detach(), token_grads

    return group_loss


def _sigmoid_of_group(
    objective: Objective, rows: Rows, logps: Tensor, divisor: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The DPO loss, the one that has a kernel: one launch where autograd takes some thirty."""
    ref_sums = rows.reference(logps.dtype)
    arguments: dict[str, Any] = dict(objective.terms[0].arguments)
    if "pair_weights" in objective.per_pair:
        weights = objective.per_pair["pair_weights"]
        if isinstance(weights, Tensor) and ref_sums is not None:
            # A pair that counts nowhere may have a reference that is NaN.
            ref_sums = ref_sums.view(-1, 2).where((weights != 0).unsqueeze(-1), 0).view(-1)
        arguments["pair_weights"] = weights
    result = sigmoid_pairs(
        logps,
        rows.tokens.offsets,
        divisor=divisor,
        ref_sums=ref_sums,
        weights=rows.token_weights,
        mask=rows.tokens.in_answer,
        **arguments,
    )
    return result.loss, result.g


GROUP_LOSSES[LOSS_KEY] = _unpack_objective
