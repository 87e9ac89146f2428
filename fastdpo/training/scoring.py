"""Log-probabilities of a batch, and of a whole data set, through a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fastdpo.integrations.model import require_fused_output
from fastdpo.losses.aggregate import sequence_sums
from fastdpo.training.collate import IGNORE_INDEX, PreferenceCollator
from fastdpo.training.data import PreferenceDataset
from fastdpo.types import LinearLogprobOutput

Batch = Mapping[str, Tensor]


def token_logps(model: nn.Module, batch: Batch, *, statistics: tuple[str, ...] = ()) -> LinearLogprobOutput:
    """Per-token log-probabilities of a collated batch, ``(2P, T)`` aligned with its labels.

    Raises:
        TypeError: the model is not patched, so it answered with logits.
    """
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        return_logps=True,
        logps_outputs=statistics,
    )
    fused: Any = require_fused_output(output)
    return LinearLogprobOutput(fused.logps, **{name: getattr(fused, name) for name in statistics})


def completion_mask(batch: Batch) -> Tensor:
    """``(2P, T)`` bool: the tokens that are scored; the first position is predicted by nothing."""
    mask = batch["labels"] != IGNORE_INDEX
    mask[:, 0] = False
    return mask


@torch.no_grad()
def sequence_logps(model: nn.Module, batch: Batch) -> Tensor:
    """``(2P,)`` fp32 log-probabilities of the answers, in nats, without a graph."""
    return sequence_sums(token_logps(model, batch).logps, completion_mask(batch))


def score_dataset(
    model: nn.Module,
    dataset: PreferenceDataset,
    collator: PreferenceCollator,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    show_progress: bool = False,
) -> Tensor:
    """Score this rank's share of the pairs.

    Pairs of like length go into one batch, which keeps padding small; the order of the result is the
    data set's.

    Returns:
        ``(P, 2)`` fp32 on the CPU: log-probabilities of chosen and rejected; 0 for other ranks' pairs.
    """
    order = dataset.lengths.argsort(descending=True, stable=True)[rank::num_ranks]
    scores = torch.zeros(len(dataset), 2)
    was_training = model.training
    model.eval()
    for places in tqdm(order.split(batch_size), desc="Scoring", disable=not show_progress, leave=False):
        batch = collator([dataset[i] for i in places.tolist()])
        batch = {name: value.to(device) for name, value in batch.items()}
        scores[places] = sequence_logps(model, batch).view(2, -1).T.float().cpu()
    model.train(was_training)
    return scores
