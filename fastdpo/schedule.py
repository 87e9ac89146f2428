"""In which chunks and groups the labelled rows of one call are processed: pure arithmetic, nothing imported.

Chunk boundaries depend on (N, H, V, logits dtype, workspace, device) and on nothing else, in particular
not on the mode or on who needs gradients: a policy that equals its reference, or a forward pass repeated by
activation checkpointing, gets logits of the same bits (DESIGN section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

MIB = 1024 * 1024
# Rows of the workspace start at multiples of this many elements: 128 bytes or more in every dtype, so
# that an odd vocabulary still gets aligned, vectorised loads.
LEADING_DIM_MULTIPLE = 64
CHUNK_ROWS_MULTIPLE = 128
# Below this a product no longer hides the reading of W on an H200 (DESIGN section 3); smaller still works.
WANTED_CHUNK_ROWS = 512
# Rows of D that mode `pairs` holds at most before they become a part of dweight: enough that adding up
# dweight is cheap beside its product (a sixth of it at 512 rows, a fiftieth at 4096).
GROUP_ROWS = 4096

# What the choice of rows assumes of a GPU: the output tile of its GEMMs, the FLOP it does while it reads a
# byte (of an H200), and what a product of too few tiles reaches of the peak by splitting its sum.
TILE_ROWS, TILE_COLUMNS = 128, 256
FLOP_PER_BYTE = 184
SPLIT_SUM_EFFICIENCY = 0.93


def leading_dim(vocab_size: int) -> int:
    """Elements from one row of the logits workspace to the next."""
    return -(-vocab_size // LEADING_DIM_MULTIPLE) * LEADING_DIM_MULTIPLE


def holds_a_chunk_row(vocab_size: int, logits_bytes: int, workspace_mib: int) -> bool:
    """Whether the workspace holds one row of logits, which every mode but ``lean`` needs."""
    return leading_dim(vocab_size) * logits_bytes <= workspace_mib * MIB


@lru_cache(maxsize=1024)
def chunk_and_block_rows(
    num_tokens: int,
    vocab_size: int,
    logits_bytes: int,
    workspace_mib: int,
    *,
    hidden_size: int = 0,
    num_multiprocessors: int = 0,
) -> tuple[int, int]:
    """Rows of a chunk, whose logits are one product, and of a block, the chunks whose D is one product.

    On a GPU a block fills the workspace, so that D W of it fills the waves, while a chunk takes at most half
    of it where that still is ``WANTED_CHUNK_ROWS``: modes that do not leave D in the workspace then hold one
    chunk of logits only, and the logits are the same products in every mode. On a CPU a block is a chunk.

    Raises:
        ValueError: the workspace does not hold a single row.
    """
    sizes = (num_tokens, vocab_size, logits_bytes, workspace_mib)
    limit = workspace_mib * MIB // (leading_dim(vocab_size) * logits_bytes)
    limit -= limit % CHUNK_ROWS_MULTIPLE
    half = limit // 2 // CHUNK_ROWS_MULTIPLE * CHUNK_ROWS_MULTIPLE
    rows = chunk_rows(*sizes, hidden_size=hidden_size, num_multiprocessors=num_multiprocessors)
    if num_multiprocessors == 0 or rows == num_tokens or half < WANTED_CHUNK_ROWS:
        return rows, rows

    def cost(sizes: tuple[int, int]) -> tuple[float, float, int, int]:
        rows, block_rows = sizes
        device = (hidden_size, vocab_size, num_multiprocessors)
        total = _cost_of_all(num_tokens, rows, _logits_cost, device)
        total += _cost_of_all(num_tokens, block_rows, _hidden_grad_cost, device)
        # Of equal ones those that need no split sum, then the smaller workspace, then the longer chunks.
        tiles = block_rows // TILE_ROWS * -(-hidden_size // TILE_COLUMNS)
        whole_waves = -(-tiles // num_multiprocessors) / block_rows
        return round(total), whole_waves, block_rows, -rows

    # From half of the limits on: anything smaller could be doubled.
    smallest = -(-half // (2 * CHUNK_ROWS_MULTIPLE)) * CHUNK_ROWS_MULTIPLE
    candidates = [
        (rows, joined * rows)
        for rows in range(smallest, half + 1, CHUNK_ROWS_MULTIPLE)
        for joined in range(-(-limit // (2 * rows)), limit // rows + 1)
    ]
    return min(candidates, key=cost)


@lru_cache(maxsize=1024)
def chunk_rows(
    num_tokens: int,
    vocab_size: int,
    logits_bytes: int,
    workspace_mib: int,
    *,
    hidden_size: int = 0,
    num_multiprocessors: int = 0,
) -> int:
    """Rows per chunk: on a CPU an even share of what the workspace holds, on a GPU what fills its waves.

    Raises:
        ValueError: the workspace does not hold a single row.
    """
    row_bytes = leading_dim(vocab_size) * logits_bytes
    limit = workspace_mib * MIB // row_bytes
    if limit < 1:
        raise ValueError(
            f"workspace_mib: one row of {vocab_size} logits needs {row_bytes} bytes, got {workspace_mib} MiB"
        )
    if num_tokens <= limit:
        return num_tokens
    if limit < CHUNK_ROWS_MULTIPLE:
        return _even_share(num_tokens, limit, 1)
    limit -= limit % CHUNK_ROWS_MULTIPLE
    if num_multiprocessors == 0:
        return _even_share(num_tokens, limit, CHUNK_ROWS_MULTIPLE)

    # From half the limit on: anything smaller could be doubled.
    smallest = -(-limit // (2 * CHUNK_ROWS_MULTIPLE)) * CHUNK_ROWS_MULTIPLE
    candidates = range(smallest, limit + 1, CHUNK_ROWS_MULTIPLE)

    def cost(rows: int) -> tuple[float, int]:
        device = (hidden_size, vocab_size, num_multiprocessors)
        total = _cost_of_all(num_tokens, rows, _logits_cost, device)
        return total + _cost_of_all(num_tokens, rows, _hidden_grad_cost, device), -rows

    return min(candidates, key=cost)


def _even_share(num_tokens: int, limit: int, multiple: int) -> int:
    num_chunks = -(-num_tokens // limit)
    even = -(-num_tokens // num_chunks)
    return min(limit, -(-even // multiple) * multiple)


def _cost_of_all(
    num_tokens: int, rows: int, cost: Callable[[int, int, int, int], float], device: tuple[int, int, int]
) -> float:
    """The cost of products of ``rows`` rows each, and of what is left."""
    full, rest = divmod(num_tokens, rows)
    return full * cost(rows, *device) + (cost(rest, *device) if rest else 0.0)


# Times of a product of some rows in units of one wave over one element of the sum.


def _logits_cost(rows: int, hidden_size: int, vocab_size: int, num_multiprocessors: int) -> float:
    waves = _waves(rows, vocab_size, num_multiprocessors)
    return max(waves * hidden_size, _weight_cost(hidden_size, vocab_size, num_multiprocessors))


def _hidden_grad_cost(rows: int, hidden_size: int, vocab_size: int, num_multiprocessors: int) -> float:
    waves = _waves(rows, hidden_size, num_multiprocessors)
    return max(waves * vocab_size, _weight_cost(hidden_size, vocab_size, num_multiprocessors))


def _waves(rows: int, columns: int, num_multiprocessors: int) -> float:
    tiles = -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)
    return min(-(-tiles // num_multiprocessors), tiles / (num_multiprocessors * SPLIT_SUM_EFFICIENCY))


def _weight_cost(hidden_size: int, vocab_size: int, num_multiprocessors: int) -> float:
    """The time that reading the weight takes."""
    weight_bytes = 2 * vocab_size * hidden_size
    return weight_bytes * FLOP_PER_BYTE / (2 * TILE_ROWS * TILE_COLUMNS * num_multiprocessors)


@dataclass(frozen=True)
class PairGroup:
    """Whole pairs ``[first_pair, last_pair)`` that fill labelled rows ``[start, stop)`` of mode ``pairs``."""

    first_pair: int
    last_pair: int
    start: int
    stop: int
    is_recomputed: bool = False  # a pair longer than the buffer of D: its rows are computed twice


def group_pairs(pair_rows: Sequence[int], capacity: int) -> tuple[PairGroup, ...]:
    """Pairs in order, as few groups of at most ``capacity`` rows as that takes, about equally long.

    Args:
        pair_rows: ``(P + 1,)``, pair p fills labelled rows ``[pair_rows[p], pair_rows[p + 1])``.
        capacity: rows of D that fit; a pair longer than that is a group of its own, to be recomputed.
    """
    groups = _fill_groups(pair_rows, capacity)
    # The smallest capacity that needs no more groups: the buffer is as long as the longest of them.
    low, high = 1, max(capacity, 1)
    while low < high:
        middle = (low + high) // 2
        candidate = _fill_groups(pair_rows, middle)
        if len(candidate) <= len(groups) and _recomputed_rows(candidate) == _recomputed_rows(groups):
            high, groups = middle, candidate
        else:
            low = middle + 1
    return tuple(groups)


def _fill_groups(pair_rows: Sequence[int], capacity: int) -> list[PairGroup]:
    groups: list[PairGroup] = []
    first = 0
    num_pairs = len(pair_rows) - 1
    while first < num_pairs:
        last = first + 1
        is_recomputed = pair_rows[last] - pair_rows[first] > capacity
        while not is_recomputed and last < num_pairs and pair_rows[last + 1] - pair_rows[first] <= capacity:
            last += 1
        groups.append(PairGroup(first, last, pair_rows[first], pair_rows[last], is_recomputed))
        first = last
    return groups


def _recomputed_rows(groups: Sequence[PairGroup]) -> int:
    return sum(group.stop - group.start for group in groups if group.is_recomputed)
