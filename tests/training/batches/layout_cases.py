"""What the tests of batch layouts share: pairs of unlike length, and one step of a model on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.losses.aggregate import sequence_sums
from fastdpo.training.batches.batch import Batch
from fastdpo.training.batches.collate import PaddedCollator, RowCollator
from fastdpo.training.batches.forward import token_logps
from fastdpo.training.batches.plan import RowCosts
from fastdpo.training.data.row import REFERENCE, Answer, Row
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.choices import ARRANGEMENTS_OF
from fastdpo.training.settings.config import PreferenceConfig

# Any numbers will do where the arrangement is fixed.
COSTS = RowCosts(call_tokens=10.0, pair_tokens=0.01, skips_masked=False)
ROW_CASES = [(layout, arrangement) for layout, names in ARRANGEMENTS_OF.items() for arrangement in names]


def make_pairs(sizes: Sequence[tuple[int, int, int]], *, vocab: int = 199, seed: int = 0) -> list[Row]:
    """Pairs of (prompt, chosen, rejected) tokens of these lengths, with references of their own."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for number, size in enumerate(sizes, start=1):
        prompt, *answers = (torch.randint(3, vocab, (k,), generator=generator) for k in size)
        reference = torch.tensor([-3.0 * size[1], -3.5 * size[2]])
        pairs.append(Row(number, prompt, tuple(map(Answer, answers)), {REFERENCE: reference}))
    return pairs


def with_numbers(pair: Row, **numbers: Any) -> Row:
    """The pair with further, or replaced, numbers."""
    return replace(pair, numbers={**pair.numbers, **numbers})


def with_answers(pair: Row, *ids: Tensor) -> Row:
    """The pair with other answers, scored as a whole."""
    return replace(pair, answers=tuple(map(Answer, ids)))


# Answers of one token, prompts of one token, and sequences beyond a window of 6.
PAIRS = make_pairs([(9, 7, 12), (1, 1, 1), (5, 1, 10), (12, 8, 3)])


def row_collator(layout: str, arrangement: str = "auto", **options: Any) -> RowCollator:
    """Prompts are shared however short they are."""
    arrangements = ARRANGEMENTS_OF[layout] if arrangement == "auto" else (arrangement,)
    return RowCollator(0, layout, COSTS, arrangements, **{"shortest_shared": 1, **options})


def make_batch(layout: str, arrangement: str = "auto", pairs: Sequence[Any] = PAIRS) -> Batch:
    return (PaddedCollator(0) if layout == "padded" else row_collator(layout, arrangement))(pairs)


class Step(NamedTuple):
    loss: Tensor
    logps: Tensor  # (2P,)
    tokens: Tensor  # (N,), sequence after sequence
    grads: dict[str, Tensor]


def run_step(model: nn.Module, batch: Batch, *, num_pairs: int | None = None, **settings: Any) -> Step:
    """Loss, log-probabilities and gradients of one batch, with the reference that the pairs carry."""
    args = PreferenceConfig(
        output_dir="unused", use_cpu=True, **{"loss_type": ["sigmoid", "sft"], **settings}
    )
    size = num_pairs or len(batch.rows)
    model.zero_grad(set_to_none=True)
    result = batch_loss(model, model, batch, BatchCounts(size, 40), args, Reference("precomputed"))
    result.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logps, mask = token_logps(model, batch).logps, batch.mask
    return Step(result.loss.detach(), sequence_sums(logps, mask, batch.bounds), logps[mask], grads)
