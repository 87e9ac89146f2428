"""What the reference says of a batch, and of a whole data set: scored through a patched model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fastdpo.losses.aggregate import segment_sums
from fastdpo.training.batches.batch import Batch
from fastdpo.training.batches.budget import TokenBudget
from fastdpo.training.batches.forward import sequence_logps, token_logps
from fastdpo.training.data.dataset import RowDataset


def reference_values(model: nn.Module, batch: Batch) -> Tensor:
    """What a batch's losses want of the reference, fp32 in nats, without a graph.

    A sum for each answer ``(S,)``, or for each piece of an answer; ``(S, T)`` or ``(N,)`` where tokens count.
    """
    if batch.segment_ids is not None:
        ids = batch.segment_ids.masked_fill(~batch.mask, -1)
        return segment_sums(token_logps(model, batch).logps, ids, batch.numbers["num_segments"])
    if batch.kind.reference_per == "token":
        return token_logps(model, batch).logps
    return sequence_logps(model, batch)


@torch.no_grad()
def batch_scores(model: nn.Module, batch: Batch) -> Tensor:
    """``reference_values`` as they are kept: row after row, with the mismatched answers' sums behind them."""
    values = reference_values(model, batch)
    values = values[batch.mask] if values.dim() == 2 else batch.by_row(values)
    if batch.mismatched is not None:
        values = torch.cat([values, sequence_logps(model, batch.mismatched)])
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
    in_step: bool = False,
) -> Tensor:
    """Score this rank's share of the pairs.

    Pairs of like length go into one batch, which keeps padding small; the order of the result is the
    data set's. A ``budget`` takes the place of ``batch_size``.

    Args:
        is_done: ``(P,)`` bool, pairs to leave out. Batches are cut as without it: those that are left hold
            what they would have held, so that rounding is the same.
        keep: gets each batch's pairs and scores, as soon as they are there.
        in_step: forward passes are exchanges of the ranks, which all have to make as many.

    Returns:
        fp32 on the CPU, in the data set's ``score_shape``; 0 for other ranks' rows, and for those left out.
    """
    order = dataset.lengths.argsort(descending=True, stable=True)

    def cut(of: int) -> list[Tensor]:
        own = order[of::num_ranks]
        return list(own.split(batch_size) if budget is None else budget.cut(dataset, own)) if len(own) else []

    scores = torch.zeros(dataset.score_shape)
    was_training = model.training
    model.eval()
    batches = cut(rank)
    if in_step:
        most = max(len(cut(of)) for of in range(num_ranks))
        batches += [order[:0]] * (most - len(batches))
    for places in tqdm(batches, desc="Scoring", disable=not show_progress, leave=False):
        if is_done is not None:
            places = places[~is_done[places]]
        if not len(places):
            if in_step:
                batch_scores(model, collator([dataset[int(order[-1])]]).to(device))
            continue
        batch = collator([dataset[i] for i in places.tolist()]).to(device)
        values = batch_scores(model, batch).cpu()
        dataset.put_scores(scores, places, values)
        if keep is not None:
            keep(places, values)
    model.train(was_training)
    return scores
