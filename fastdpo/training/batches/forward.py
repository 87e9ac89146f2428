"""A batch through a patched model: log-probabilities, a loss made on the way, divergences, states."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdpo.integrations.fused_output import FusedLMOutput, HeadStates, Teachers, require_states
from fastdpo.integrations.model import require_fused_output
from fastdpo.training.batches.batch import Batch, Padded
from fastdpo.training.batches.parts import group_of, logps_in_parts
from fastdpo.training.batches.router import asked_for_router, keep_router_loss
from fastdpo.types import DPOLossOutput, LinearLogprobOutput, PreferenceLossOutput


class Scorable(Protocol):
    """What a patched model can score: a batch, or a part of one."""

    def model_inputs(self, model: nn.Module) -> dict[str, Any]:
        """Arguments for its states."""

    def label_inputs(self) -> dict[str, Any]:
        """Which tokens to score."""


def token_logps(
    model: nn.Module, batch: Scorable, *, statistics: tuple[str, ...] = ()
) -> LinearLogprobOutput:
    """Per-token log-probabilities, ``(S, T)`` aligned with the labels, or ``(N,)``.

    Raises:
        TypeError: the model is not patched, so it answered with logits.
    """
    group = group_of(model)
    if group is not None:
        return logps_in_parts(model, batch, group, statistics)
    fused: Any = _scored(model, batch, logps_outputs=statistics)
    return LinearLogprobOutput(fused.logps, **{name: getattr(fused, name) for name in statistics})


def fused_loss(model: nn.Module, batch: Scorable, **arguments: Any) -> DPOLossOutput | PreferenceLossOutput:
    """The loss of a batch, made inside the model's forward so that the head is used once.

    Args:
        arguments: of ``fused_dpo_loss``, or where ``loss_type`` is of another kind of
            ``fused_preference_loss``.

    Raises:
        TypeError: the model is not patched.
    """
    # Not a dict, whose tensors FSDP's mixed precision would round.
    out: Any = _scored(model, batch, pair_loss=MappingProxyType(arguments)).pair_loss
    return out


def divergence_logps(
    model: nn.Module, batch: Scorable, teachers: Teachers, names: tuple[str, ...]
) -> FusedLMOutput:
    """``logps``, ``ref_logps`` and the divergences named per token, in the shape that ``token_logps`` has.

    Args:
        teachers: ``head_states`` of the same batch.
    """
    boxed = MappingProxyType({"teachers": teachers})  # whose tensors FSDP's mixed precision would round
    return _scored(model, batch, logps_outputs=names, reference=boxed)


def head_states(model: nn.Module, batch: Scorable) -> HeadStates:
    """What the model's head sees of a batch, and the head; of a carried one what predicts labels alone."""
    layout = batch.label_inputs().get("token_layout")
    asked = {} if layout is None else {"token_layout": layout}
    return require_states(model(**batch.model_inputs(model), return_states=True, **asked))


def _scored(model: nn.Module, batch: Scorable, **asked: Any) -> FusedLMOutput:
    given = {**asked_for_router(batch.model_inputs(model)), **batch.label_inputs()}
    found = require_fused_output(model(**given, return_logps=True, **asked))
    keep_router_loss(found.aux_loss)
    return found


@torch.no_grad()
def sequence_logps(model: nn.Module, batch: Batch | Padded) -> Tensor:
    """``(S,)`` fp32 log-probabilities of the answers, in nats, without a graph; with weights of tokens
    in the batch, their weighted sums."""
    return batch.answer_logps(token_logps(model, batch).logps)
