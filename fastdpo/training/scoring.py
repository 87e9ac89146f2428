"""Log-probabilities of a batch, and of a whole data set, through a patched model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fastdpo.integrations.fused_output import FusedLMOutput, HeadStates, Teachers, require_states
from fastdpo.integrations.model import require_fused_output
from fastdpo.integrations.row_masks import RowMasks
from fastdpo.losses.aggregate import segment_sums
from fastdpo.training.batches import (
    Batch,
    answer_logps,
    completion_mask,
    is_in_rows,
    to_device,
    token_layout,
)
from fastdpo.training.dataset import RowDataset
from fastdpo.training.token_budget import TokenBudget
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


def reference_values(model: nn.Module, batch: Batch) -> Tensor:
    """What a batch's losses want of the reference, fp32 in nats, without a graph.

    A sum for each answer ``(S,)``, or for each piece of an answer; ``(S, T)`` or ``(N,)`` where tokens count.
    """
    if "segment_ids" in batch:
        ids = batch["segment_ids"].masked_fill(~completion_mask(batch), -1)
        return segment_sums(token_logps(model, batch).logps, ids, batch["num_segments"])
    if batch.get("kind") == "samples":
        return token_logps(model, batch).logps
    return sequence_logps(model, batch)


@torch.no_grad()
def batch_scores(model: nn.Module, batch: Batch) -> Tensor:
    """``reference_values`` as they are kept: flat, with the mismatched answers' sums behind them."""
    values = reference_values(model, batch)
    if values.dim() == 2:
        values = values[completion_mask(batch)]
    if "mismatched" in batch:
        values = torch.cat([values, sequence_logps(model, batch["mismatched"])])
    return values.float()


def score_dataset(
    model: nn.Module,
    dataset: RowDataset,
    collator: Callable[[list[Any]], Batch],
    *,
    batch_size: int,
    budget: TokenBudget | None = None,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    show_progress: bool = False,
    is_done: Tensor | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Score this rank's share of the pairs.

    Pairs of like length go into one batch, which keeps padding small; the order of the result is the
    data set's. A ``budget`` takes the place of ``batch_size``.

    Args:
        is_done: ``(P,)`` bool, pairs to leave out. Batches are cut as without it: those that are left hold
            what they would have held, so that rounding is the same.
        keep: gets each batch's pairs and scores, as soon as they are there.

    Returns:
        fp32 on the CPU, in the data set's ``score_shape``: for pairs ``(P, 2)``, log-probabilities of chosen
        and rejected; 0 for other ranks' rows, and for those left out.
    """
    order = dataset.lengths.argsort(descending=True, stable=True)[rank::num_ranks]
    scores = torch.zeros(dataset.score_shape)
    was_training = model.training
    model.eval()
    batches = list(order.split(batch_size) if budget is None else budget.cut(dataset, order))
    for places in tqdm(batches, desc="Scoring", disable=not show_progress, leave=False):
        if is_done is not None:
            places = places[~is_done[places]]
            if not len(places):
                continue
        batch = to_device(collator([dataset[i] for i in places.tolist()]), device)
        values = batch_scores(model, batch).cpu()
        dataset.put_scores(scores, places, values)
        if keep is not None:
            keep(places, values)
    model.train(was_training)
    return scores
