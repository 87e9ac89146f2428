"""Which pairs make a batch when a batch is so many tokens, not so many pairs.

Every pair comes once an epoch, in a batch within the budget. The number of batches is the same in every
epoch (transformers counts its steps once, before the first) and a multiple of the number of ranks, so
that every rank has as many: accelerate hands batches out in turn, and a run of ``num_ranks`` batches of
like cost is a round. The order depends on seed and epoch alone, so skipping batches resumes a run.

Where pairs are too few for a multiple of the ranks, batches without pairs fill up the last round: a rank
then computes the shortest pair, and counts it as nothing.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import seed_worker

from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.row import Row
from fastdpo.training.data.row_numbers import row_list
from fastdpo.training.settings.config import PreferenceConfig

STRATEGIES = ("random", "sequential", "group_by_length")
# Draws of a random packing before the tight one, which always fits, is taken.
_ATTEMPTS = 3


@dataclass(frozen=True)
class TokenBudget:
    """At most ``tokens`` in a batch of a layout (``padded``, ``packed``, ``shared_prompt``).

    What counts is what the backbone computes of each row; padding counts for padded batches, and not for
    rows, where the planner may add some.
    """

    tokens: int
    layout: str
    multiple_of: int = 1

    def sampler(self, dataset: RowDataset, **options: Any) -> TokenBudgetSampler:
        """A batch sampler over ``dataset``.

        Raises:
            ValueError: a pair that alone is larger than the budget; names its row.
        """
        sizes = dataset.batch_tokens(self.layout)
        counts = dataset.num_sequences if self.is_padded else None
        if self.is_padded:
            sizes = -(-sizes // self.multiple_of) * self.multiple_of
        costs = sizes if counts is None else sizes * counts
        largest = int(costs.argmax())
        cost = int(costs[largest])
        if cost > self.tokens:
            raise ValueError(self.refusal(cost, row_list([int(dataset.rows[largest])])))
        sequences = None if counts is None else counts.tolist()
        return TokenBudgetSampler(sizes.tolist(), self.tokens, sequences=sequences, **options)

    @property
    def is_padded(self) -> bool:
        """Whether a batch costs its number of sequences times the longest of them."""
        return self.layout == "padded"

    def of_row(self, row: Row) -> tuple[int, int]:
        """Tokens that a row adds to a batch, of a padded one those of its longest sequence; its sequences."""
        lengths = [len(row.prompt) + len(answer.ids) for answer in row.answers]
        if self.is_padded:
            return -(-max(lengths) // self.multiple_of) * self.multiple_of, len(lengths)
        if self.layout == "packed":
            return sum(lengths), len(lengths)
        return row.distinct_tokens, len(lengths)

    def refusal(self, cost: int, row: str) -> str:
        """What is said of a row that alone costs more than the budget."""
        return (
            f"max_tokens_per_batch: got {self.tokens}, wanted at least {cost}: what {row} takes in the "
            f"layout {self.layout!r} (or a smaller max_length)"
        )

    def cut(self, dataset: RowDataset, order: Tensor) -> list[Tensor]:
        """Pairs in the order given, cut into batches."""
        if not len(order):
            return []
        places = self.sampler(dataset.subset(order), strategy="sequential")
        return [order[torch.tensor(batch)] for batch in places]


def pair_tokens(dataset: RowDataset, layout: str) -> Tensor:
    """``(P,)``: tokens that a pair (or row) adds to a batch; those of its longest sequence where padded."""
    return dataset.batch_tokens(layout)


class TokenBudgetSampler(Sampler[list[int]]):
    """A batch sampler whose batches hold at most ``budget`` tokens.

    Args:
        sizes: tokens that each pair adds to a batch. With ``sequences`` those of its longest sequence: a
            batch then costs its number of sequences times the largest of them.
        budget: tokens of a batch.
        num_ranks: the number of batches is a multiple of it.
        strategy: ``random`` packs pairs of all lengths together, by chance; ``group_by_length`` packs
            neighbours in the order of length, and shuffles the batches; ``sequential`` keeps the order.
            Padded batches are always of like lengths, unless sequential.
        seed: of the order.
        sequences: how many each pair has in a padded batch; None for batches without padding.

    Raises:
        ValueError: an unknown strategy, no pairs, or a pair larger than the budget (the message gives its
            index).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        budget: int,
        *,
        num_ranks: int = 1,
        strategy: str = "random",
        seed: int = 0,
        sequences: Sequence[int] | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {strategy!r}, wanted one of {STRATEGIES}")
        if not sizes:
            raise ValueError("sizes: got no pairs, wanted at least one")
        self.sizes, self.budget, self.num_ranks = list(sizes), budget, num_ranks
        self.strategy, self.seed, self.sequences = strategy, seed, sequences
        largest = max(range(len(sizes)), key=lambda i: self.cost([i]))
        if self.cost([largest]) > budget:
            raise ValueError(f"sizes: got {self.cost([largest])} tokens for pair {largest}, wanted {budget}")
        if strategy == "random" and sequences is not None:
            self.strategy = "group_by_length"
        self.epoch = 0
        count = len(self._tight(self._shuffled(torch.Generator().manual_seed(seed))))
        self._count = -(-count // num_ranks) * num_ranks

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch, of a resumed run too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = self._shuffled(generator)
        batches = self._random(order, generator) if self.strategy == "random" else None
        batches = self._split_up(batches or self._tight(order))
        if self.strategy == "sequential":
            return iter(batches)
        # Ranks wait for each other at every step: a round is of batches that take as long.
        batches.sort(key=self.cost, reverse=True)
        rounds = [batches[i : i + self.num_ranks] for i in range(0, len(batches), self.num_ranks)]
        shuffle = torch.randperm(len(rounds), generator=generator).tolist()
        return iter([batch for place in shuffle for batch in rounds[place]])

    def cost(self, batch: Sequence[int]) -> int:
        """Tokens of a batch."""
        if self.sequences is not None:
            count = sum(self.sequences[i] for i in batch)
            return count * max((self.sizes[i] for i in batch), default=0)
        return sum(self.sizes[i] for i in batch)

    def most_expensive(self) -> list[int]:
        """The largest batch of the first epoch: of those that cost most, the one with the longest pair."""
        epoch, self.epoch = self.epoch, 0
        try:
            return max(
                self, key=lambda batch: (self.cost(batch), max(map(self.sizes.__getitem__, batch), default=0))
            )
        finally:
            self.epoch = epoch

    def _shuffled(self, generator: torch.Generator) -> list[int]:
        if self.strategy == "sequential":
            return list(range(len(self.sizes)))
        return torch.randperm(len(self.sizes), generator=generator).tolist()

    def _tight(self, order: Sequence[int]) -> list[list[int]]:
        """Batches whose number depends on the sizes alone, so that it is the same in every epoch."""
        if self.strategy == "random":
            return self._best_fit(order)
        if self.strategy == "group_by_length":
            # Of equals those with more sequences first: the number of batches must not depend on chance.
            order = sorted(order, key=lambda i: (-self.sizes[i], -self.sequences[i] if self.sequences else 0))
        batches: list[list[int]] = []
        total = largest = count = 0
        for i in order:
            more = 1 if self.sequences is None else self.sequences[i]
            total, largest, count = total + self.sizes[i], max(largest, self.sizes[i]), count + more
            cost = total if self.sequences is None else count * largest
            if batches and cost <= self.budget:
                batches[-1].append(i)
            else:
                batches.append([i])
                total = largest = self.sizes[i]
                count = more
        return batches

    def _best_fit(self, order: Sequence[int]) -> list[list[int]]:
        """Best fit, longest first; pairs of one size are interchangeable, so chance decides among them."""
        batches: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (room, batch), sorted
        for i in sorted(order, key=lambda i: -self.sizes[i]):
            size = self.sizes[i]
            place = bisect.bisect_left(rooms, (size, -1))
            if place == len(rooms):
                batches.append([i])
                bisect.insort(rooms, (self.budget - size, len(batches) - 1))
            else:
                room, batch = rooms.pop(place)
                batches[batch].append(i)
                bisect.insort(rooms, (room - size, batch))
        return batches

    def _random(self, order: Sequence[int], generator: torch.Generator) -> list[list[int]] | None:
        """Pairs dealt to the emptiest batch, long ones roughly first; None where chance leaves one over."""
        for _ in range(_ATTEMPTS):
            jitter = (0.75 + 0.5 * torch.rand(len(order), generator=generator)).tolist()
            dealt = sorted(order, key=lambda i: -self.sizes[i] * jitter[i])
            batches: list[list[int]] = [[] for _ in range(self._count)]
            loads = [(0, batch) for batch in range(self._count)]
            for i in dealt:
                load, batch = heapq.heappop(loads)
                if load + self.sizes[i] > self.budget:
                    break
                batches[batch].append(i)
                heapq.heappush(loads, (load + self.sizes[i], batch))
            else:
                return batches
        return None

    def _split_up(self, batches: list[list[int]]) -> list[list[int]]:
        """Exactly as many batches as `len`: those with the most pairs are halved, and empty ones added."""
        batches = [list(batch) for batch in batches]
        while len(batches) < self._count:
            place = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[place]
            half = -(-len(batch) // 2)
            batches[place : place + 1] = [batch[:half], batch[half:]]
        return batches


@dataclass(frozen=True)
class FillingCollator:
    """``collator``, and ``filler`` marked as such in place of no pairs."""

    collator: Any
    filler: Any

    def __call__(self, pairs: Sequence[Any]) -> Any:
        return self.collator(pairs) if pairs else replace(self.collator([self.filler]), is_filler=True)


def training_sampler(dataset: RowDataset, budget: TokenBudget, args: PreferenceConfig) -> TokenBudgetSampler:
    """The batches of a run, of all its ranks."""
    return budget.sampler(
        dataset,
        num_ranks=args.world_size // args.shared_ranks,
        strategy=args.train_sampling_strategy,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )


def budget_dataloader(
    dataset: RowDataset, budget: TokenBudget, collator: Any, args: PreferenceConfig
) -> DataLoader[Any]:
    """The training batches of a budget, for accelerate to hand out to the ranks."""
    return DataLoader(
        dataset,
        batch_sampler=training_sampler(dataset, budget, args),
        collate_fn=FillingCollator(collator, dataset[int(dataset.batch_tokens(budget.layout).argmin())]),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        # Settings that older versions of transformers do not have.
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        in_order=getattr(args, "dataloader_in_order", True),
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
