"""Batches of a stream: its rows shuffled by a buffer, gone through again and again, and dealt to the ranks.

Every rank reads the whole stream and takes its share of the batches, in turn: no rank waits for another's
rows. Seed and pass decide on the order, so reading again up to a batch resumes a run.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from fastdpo.training.batches.budget import FillingCollator, TokenBudget, TokenBudgetSampler
from fastdpo.training.data.model_fit import StreamFit
from fastdpo.training.data.row import Row
from fastdpo.training.data.row_numbers import row_of
from fastdpo.training.data.stream import StreamDataset
from fastdpo.training.settings.batches import check_own_masks
from fastdpo.training.settings.config import PreferenceConfig

Item = TypeVar("Item")


def shuffled(items: Iterable[Item], size: int, seed: int) -> Iterator[Item]:
    """Each item once, from a buffer of ``size`` that chance picks from; in their order for 0 and 1."""
    if size <= 1:
        yield from items
        return
    chance, held = random.Random(seed), list[Item]()
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = chance.randrange(size)
        yield held[place]
        held[place] = item
    chance.shuffle(held)
    yield from held


@dataclass(eq=False)
class StreamBatches(IterableDataset[list[Row]]):
    """The batches of one rank, without an end.

    Args:
        rows: of the stream.
        size: rows of a batch, where there is no ``budget``.
        budget: tokens of a batch. Rows in their order fill one batch after the other; others are packed by
            length, a buffer's rows of one pass at a time.
        buffer_size: rows that chance picks from; 0 or 1 for the stream's order.
        seed: of the order.
        rank, world: whose share it is, of how many.
        fit: holds rows to the models.
    """

    rows: StreamDataset
    size: int
    budget: TokenBudget | None
    buffer_size: int
    seed: int
    rank: int = 0
    world: int = 1
    fit: StreamFit | None = None

    def __iter__(self) -> Iterator[list[Row]]:
        """Raises ValueError, as ``StreamDataset.rows``, and for a row that alone is beyond the budget."""
        batches, handed_out = self._batches(), 0
        while dealt := list(islice(batches, self.world)):
            handed_out += sum(map(len, dealt))
            self.rows.epoch = handed_out / self.rows.num_rows if self.rows.num_rows else 0.0
            yield dealt[self.rank]

    def _batches(self) -> Iterator[list[Row]]:
        passes = (
            shuffled(self.rows.rows(self.fit), self.buffer_size, self.seed + epoch) for epoch in count()
        )
        if self.budget is None:
            rows = chain.from_iterable(passes)
            return iter(lambda: list(islice(rows, self.size)), [])
        if self.buffer_size > 1:
            return self._packed(self.budget, passes)
        return self._filled(self.budget, chain.from_iterable(passes))

    def _packed(self, budget: TokenBudget, passes: Iterable[Iterator[Row]]) -> Iterator[list[Row]]:
        for epoch, rows in enumerate(passes):
            while held := list(islice(rows, self.buffer_size)):
                found = [self._checked(budget, row) for row in held]
                sampler = TokenBudgetSampler(
                    [tokens for tokens, _ in found],
                    budget.tokens,
                    num_ranks=self.world,
                    seed=self.seed + epoch,
                    sequences=[sequences for _, sequences in found] if budget.is_padded else None,
                )
                yield from ([held[place] for place in batch] for batch in sampler)

    def _filled(self, budget: TokenBudget, rows: Iterable[Row]) -> Iterator[list[Row]]:
        batch: list[Row] = []
        longest = sequences = total = 0
        for row in rows:
            tokens, more = self._checked(budget, row)
            longest, sequences, total = max(longest, tokens), sequences + more, total + tokens
            if batch and (sequences * longest if budget.is_padded else total) > budget.tokens:
                yield batch
                batch, longest, sequences, total = [], tokens, more, tokens
            batch.append(row)

    def _checked(self, budget: TokenBudget, row: Row) -> tuple[int, int]:
        tokens, sequences = budget.of_row(row)
        cost = tokens * sequences if budget.is_padded else tokens
        if cost > budget.tokens:
            raise ValueError(budget.refusal(cost, row_of(self.rows.stream.name, row.number)))
        return tokens, sequences


@dataclass(frozen=True)
class _StreamCollator(Generic[Item]):
    """A collator that knows of answers scored in part, or refuses them."""

    collator: Any

    def __call__(self, rows: list[Row]) -> Any:
        for row in rows:
            if any(answer.scored is not None for answer in row.answers):
                check_own_masks(self.collator, row.answers[0])
        return self.collator(rows)


def stream_dataloader(
    rows: StreamDataset,
    budget: TokenBudget | None,
    collator: Any,
    args: PreferenceConfig,
    fit: StreamFit | None = None,
) -> DataLoader[Any]:
    """This rank's training batches; not for accelerate, which would deal them out once more.

    Raises:
        ValueError: one of the first rows is beyond the budget.
    """
    head = rows.head
    if budget is not None:
        budget.sampler(head)
    batches = StreamBatches(
        rows,
        args.train_batch_size,
        budget,
        args.shuffle_buffer_size if args.train_sampling_strategy == "random" else 0,
        args.seed if args.data_seed is None else args.data_seed,
        args.process_index // args.shared_ranks,
        args.world_size // args.shared_ranks,
        fit,
    )
    filler = head[int(head.lengths.argmin())]
    return DataLoader(
        batches,
        batch_size=None,  # they are batches already
        collate_fn=FillingCollator(_StreamCollator(collator), filler),
        pin_memory=args.dataloader_pin_memory,
    )
