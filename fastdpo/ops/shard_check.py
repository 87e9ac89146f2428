"""Whether the shards that ranks have make one head: said on every rank, before any of them waits."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fastdpo.types import LMHead, VocabShard


def check_shard(head: LMHead) -> None:
    """Hold the shards of all ranks of a group against each other: at a shard's first use, by one exchange.

    Raises:
        ValueError: on every rank, where shards overlap, do not add up to the vocabulary, or differ in bias,
            scale, cap, temperature or adapter; LoRA where ranks have rows of their own.
    """
    shard = head.vocab_parallel
    if not isinstance(shard, VocabShard):
        raise TypeError(f"lm_head.vocab_parallel: got {type(shard).__name__}, wanted a VocabShard")
    mine = _of_rank(head, shard)
    if mine in shard.checked:
        return
    if head.adapter is not None and shard.has_own_rows:
        raise ValueError(
            "lm_head.adapter: got LoRA with VocabShard(has_own_rows=True), wanted a head without"
        )
    said: list[Any] = [None] * dist.get_world_size(shard.group)
    dist.all_gather_object(said, mine, group=shard.group)
    if wrong := _disagreement(said):
        raise ValueError(f"lm_head.vocab_parallel: {wrong}")
    shard.checked[mine] = max(one[1][0] for one in said)


def largest_part(head: LMHead) -> int:
    """Rows of the largest shard of a head that was checked: ranks plan by it what all have to plan alike."""
    assert head.vocab_parallel is not None
    return head.vocab_parallel.checked[_of_rank(head, head.vocab_parallel)]


def _of_rank(head: LMHead, shard: VocabShard) -> tuple[Any, ...]:
    """What a rank says of its shard."""
    adapter = None if head.adapter is None else tuple(head.adapter[0].shape)
    settings = (
        shard.has_own_rows,
        head.logit_scale,
        head.softcap,
        head.temperature,
        head.bias is not None,
        adapter,
    )
    return (shard.start, tuple(head.weight.shape), shard.vocab_size, str(head.weight.dtype), settings)


def _disagreement(said: list[Any]) -> str | None:
    """What is wrong with the shards of the ranks, if anything; the same words on every rank."""
    for name, place in (
        ("vocab_size", 2),
        ("dtypes of the weight", 3),
        ("own rows, scale, cap, temperature, bias, LoRA", 4),
    ):
        if len({one[place] for one in said}) > 1:
            return f"got {name} {[one[place] for one in said]} of the ranks, wanted the same on all"
    shapes = [(one[0], one[1]) for one in said]
    ranges = sorted((start, start + shape[0]) for start, shape in shapes if len(shape) == 2)
    ends = [0, *(stop for _, stop in ranges)]
    is_whole = len(ranges) == len(said) and ends[-1] == said[0][2]
    are_neighbours = all(
        start == end and start < stop for (start, stop), end in zip(ranges, ends, strict=False)
    )
    if not is_whole or not are_neighbours or len({shape[1:] for _, shape in shapes}) > 1:
        return (
            f"got rows from {[start for start, _ in shapes]} of shapes {[shape for _, shape in shapes]}, "
            f"wanted (rows, H) of each rank, at least one row, that are 0 to {said[0][2] - 1} together, none "
            "twice"
        )
    return None
