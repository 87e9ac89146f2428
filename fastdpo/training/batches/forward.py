"""A batch through a patched model: log-probabilities, a loss made on the way, divergences, states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.integrations.fused_output import FusedLMOutput, HeadStates, Teachers, require_states
from fastdpo.integrations.model import require_fused_output
from fastdpo.integrations.row_masks import RowMasks
from fastdpo.training.batches.contents import Batch, answer_logps, is_in_rows, token_layout
from fastdpo.types import DPOLossOutput, LinearLogprobOutput


def token_logps(model: nn.Module, batch: Batch, *, statistics: tuple[str, ...] = ()) -> LinearLogprobOutput:
    """Per-token log-probabilities of a collated batch, ``(2P, T)`` aligned with its labels, or ``(N,)``.

    Raises:
        TypeError: the model is not patched, so it answered with logits.
    """
    fused: Any = _scored(model, batch, logps_outputs=statistics)
    return LinearLogprobOutput(fused.logps, **{name: getattr(fused, name) for name in statistics})


def fused_pair_loss(model: nn.Module, batch: Batch, **arguments: Any) -> DPOLossOutput:
    """The loss of a collated batch of pairs, made inside the model's forward so that the head is used once.

    Args:
        arguments: of ``fused_dpo_loss``.

    Raises:
        TypeError: the model is not patched.
    """
    out: Any = _scored(model, batch, pair_loss=arguments).pair_loss
    return out


def divergence_logps(
    model: nn.Module, batch: Batch, teachers: Teachers, names: tuple[str, ...]
) -> FusedLMOutput:
    """``logps``, ``ref_logps`` and the divergences named per token, in the shape that ``token_logps`` has.

    Args:
        teachers: ``head_states`` of the same batch.
    """
    return _scored(model, batch, logps_outputs=names, reference=teachers)


def head_states(model: nn.Module, batch: Batch) -> HeadStates:
    """What the model's head sees of a collated batch, and the head."""
    return require_states(model(**_backbone_inputs(model, batch), return_states=True))


def _scored(model: nn.Module, batch: Batch, **asked: Any) -> FusedLMOutput:
    labels = {"token_layout": token_layout(batch)} if is_in_rows(batch) else {"labels": batch["labels"]}
    inputs = _backbone_inputs(model, batch)
    return require_fused_output(model(**inputs, **labels, return_logps=True, **asked))


def _backbone_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    if is_in_rows(batch):
        masks = RowMasks(model)
        return {"row_batches": [masks.inputs(call) for call in batch["calls"]]}
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def sequence_logps(model: nn.Module, batch: Batch) -> Tensor:
    """``(2P,)`` fp32 log-probabilities of the answers, in nats, without a graph; with weights of tokens
    in the batch, their weighted sums."""
    return answer_logps(batch, token_logps(model, batch).logps)
