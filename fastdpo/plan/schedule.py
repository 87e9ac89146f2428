"""In which chunks and groups the labelled rows of one call are processed: pure arithmetic.

Chunk boundaries depend on (N, H, V, logits dtype, workspace, device) and on nothing else, in particular
not on the mode or on who needs gradients: a policy that equals its reference, or a forward pass repeated by
activation checkpointing, gets logits of the same bits (DESIGN section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fastdpo.plan import waves

MIB = 1024 * 1024
# Rows of the workspace start at multiples of this many elements: 128 bytes or more in every dtype, so
# that an odd vocabulary still gets aligned, vectorised loads.
LEADING_DIM_MULTIPLE = 64
CHUNK_ROWS_MULTIPLE = 128
# Below this a product no longer hides the reading of W on an H200 (DESIGN section 3); smaller still works.
WANTED_CHUNK_ROWS = 512
# Labelled rows of D that mode `pairs` holds at most before they become a part of dweight: enough that adding
# dweight up is cheap beside its product (a sixth of it at 512 rows, a fiftieth at 4096).
GROUP_ROWS = 4096

# What is within a hundredth of the fastest is as good, and may take less memory.
ENOUGH = 1.01


def leading_dim(vocab_size: int) -> int:
    """Elements from one row of the logits workspace to the next."""
    return -(-vocab_size // LEADING_DIM_MULTIPLE) * LEADING_DIM_MULTIPLE


def holds_a_chunk_row(vocab_size: int, logits_bytes: int, workspace_mib: int) -> bool:
    """Whether the workspace holds one row of logits, which every mode but ``lean`` needs."""
    return leading_dim(vocab_size) * logits_bytes <= workspace_mib * MIB


def chunk_and_block_rows(
    num_tokens: int,
    vocab_size: int,
    logits_bytes: int,
    workspace_mib: int,
    *,
    hidden_size: int = 0,
    num_multiprocessors: int = 0,
    joins_chunks: bool = True,
) -> tuple[int, int]:
    """Rows of a chunk, whose logits are one product, and of a block, the chunks whose D is one product.

    On a CPU a chunk is an even share of what the workspace holds, and a block is a chunk. On a GPU both are
    what the model of ``waves.py`` finds fastest for logits and D W together, up to the whole workspace; of
    those within a hundredth of that, what takes the least memory. A block stays in the workspace, while modes
    that move D out of it hold one chunk of logits. ``joins_chunks=False``: a block is a chunk there too.

    Raises:
        ValueError: the workspace does not hold a single row.
    """
    limit = fitting_rows(vocab_size, logits_bytes, workspace_mib)
    if num_tokens <= limit:
        return num_tokens, num_tokens
    multiple = CHUNK_ROWS_MULTIPLE if limit >= CHUNK_ROWS_MULTIPLE else 1
    if num_multiprocessors == 0 or multiple == 1:
        return (_even_share(num_tokens, limit // multiple * multiple, multiple),) * 2
    device = (hidden_size, num_multiprocessors)
    costs = gpu_choices(num_tokens, vocab_size, logits_bytes, workspace_mib, *device, joins_chunks)
    return _lightest(costs)


def fitting_rows(vocab_size: int, logits_bytes: int, workspace_mib: int) -> int:
    """Rows of logits that the workspace holds.

    Raises:
        ValueError: it does not hold a single one.
    """
    row_bytes = leading_dim(vocab_size) * logits_bytes
    limit = workspace_mib * MIB // row_bytes
    if limit < 1:
        raise ValueError(
            f"workspace_mib: one row of {vocab_size} logits needs {row_bytes} bytes, got {workspace_mib} MiB"
        )
    return limit


def hidden_scratch_bytes(workspace_mib: int) -> int:
    """Bytes that fp32 results of D W may take on a GPU, beside the logits: a quarter of what these may."""
    return workspace_mib * MIB // 4


def gpu_choices(
    num_tokens: int,
    vocab_size: int,
    logits_bytes: int,
    workspace_mib: int,
    hidden_size: int,
    num_multiprocessors: int,
    joins_chunks: bool,
) -> dict[tuple[int, int], float]:
    """The rows of every chunk and block that a GPU may take, and the predicted time of logits and D W."""
    limit = fitting_rows(vocab_size, logits_bytes, workspace_mib)
    device = (hidden_size, vocab_size, num_multiprocessors, hidden_scratch_bytes(workspace_mib))
    return _choices(waves.whole_tiles(num_tokens), limit, *device, joins_chunks)


@lru_cache(maxsize=4096)
def _choices(
    num_tokens: int,
    limit: int,
    hidden_size: int,
    vocab_size: int,
    num_multiprocessors: int,
    scratch_bytes: int,
    joins_chunks: bool,
) -> dict[tuple[int, int], float]:
    device = (hidden_size, vocab_size, num_multiprocessors)

    def logits(rows: int) -> float:
        return waves.logits_cost(rows, *device)

    def hidden_grad(rows: int) -> float:
        return waves.hidden_grad_cost(rows, *device, scratch_bytes)

    limit -= limit % CHUNK_ROWS_MULTIPLE
    # Blocks from half the limit on: a smaller one could be doubled. Chunks from the wanted rows on.
    smallest = min(WANTED_CHUNK_ROWS, -(-limit // (2 * CHUNK_ROWS_MULTIPLE)) * CHUNK_ROWS_MULTIPLE)
    return {
        (rows, joined * rows): waves.cost_of_all(num_tokens, rows, logits)
        + waves.cost_of_all(num_tokens, joined * rows, hidden_grad)
        for rows in range(smallest, limit + 1, CHUNK_ROWS_MULTIPLE)
        for joined in range(1, limit // rows + 1 if joins_chunks else 2)
        if 2 * joined * rows >= limit or not joins_chunks
    }


def _lightest(costs: dict[tuple[int, int], float]) -> tuple[int, int]:
    """Of the sizes that are fast enough those with the fewest rows, of chunk and block together."""
    enough = ENOUGH * min(costs.values())
    return min((sizes for sizes in costs if costs[sizes] <= enough), key=lambda s: (sum(s), costs[s]))


def hidden_grad_piece(
    num_rows: int, hidden_size: int, vocab_size: int, num_multiprocessors: int, scratch_bytes: int
) -> int:
    """Rows of a compact D whose product with W is made at a time on a GPU, by the same model and rule."""
    device = (hidden_size, vocab_size, num_multiprocessors, scratch_bytes)
    return min(_piece(waves.whole_tiles(num_rows), *device), max(num_rows, 1))


@lru_cache(maxsize=4096)
def _piece(
    num_rows: int, hidden_size: int, vocab_size: int, num_multiprocessors: int, scratch_bytes: int
) -> int:
    device = (hidden_size, vocab_size, num_multiprocessors, scratch_bytes)
    limit = max(scratch_bytes // waves.partial_sum_bytes(1, hidden_size, 1), CHUNK_ROWS_MULTIPLE)

    def cost(rows: int) -> float:
        return waves.hidden_grad_cost(rows, *device)

    candidates = range(CHUNK_ROWS_MULTIPLE, min(limit, num_rows) + 1, CHUNK_ROWS_MULTIPLE)
    costs = {(rows, 0): waves.cost_of_all(num_rows, rows, cost) for rows in candidates}
    return _lightest(costs)[0] if costs else CHUNK_ROWS_MULTIPLE


def _even_share(num_tokens: int, limit: int, multiple: int) -> int:
    num_chunks = -(-num_tokens // limit)
    even = -(-num_tokens // num_chunks)
    return min(limit, -(-even // multiple) * multiple)


@dataclass(frozen=True)
class RowGroup:
    """Rows of a loss (pairs, answers, lists, steps), whole, as mode ``pairs`` takes them together.

    Rows ``[first_row, last_row)`` of the loss fill labelled rows ``[start, stop)`` of hidden.
    """

    first_row: int
    last_row: int
    start: int
    stop: int
    is_recomputed: bool = False  # one that is longer than the buffer of D: it is computed twice


def group_loss_rows(loss_rows: Sequence[int], capacity: int) -> tuple[RowGroup, ...]:
    """A loss's rows in order, as few groups of at most ``capacity`` labelled rows as that takes, even ones.

    Args:
        loss_rows: row r of the loss fills labelled rows ``[loss_rows[r], loss_rows[r + 1])``.
        capacity: rows of D that fit; what is longer than that is a group of its own, to be recomputed.
    """
    groups = _fill_groups(loss_rows, capacity)
    # The smallest capacity that needs no more groups: the buffer is as long as the longest of them.
    low, high = 1, max(capacity, 1)
    while low < high:
        middle = (low + high) // 2
        candidate = _fill_groups(loss_rows, middle)
        if len(candidate) <= len(groups) and _recomputed_rows(candidate) == _recomputed_rows(groups):
            high, groups = middle, candidate
        else:
            low = middle + 1
    return tuple(groups)


def _fill_groups(loss_rows: Sequence[int], capacity: int) -> list[RowGroup]:
    groups: list[RowGroup] = []
    first = 0
    num_rows = len(loss_rows) - 1
    while first < num_rows:
        last = first + 1
        is_recomputed = loss_rows[last] - loss_rows[first] > capacity
        while not is_recomputed and last < num_rows and loss_rows[last + 1] - loss_rows[first] <= capacity:
            last += 1
        groups.append(RowGroup(first, last, loss_rows[first], loss_rows[last], is_recomputed))
        first = last
    return groups


def _recomputed_rows(groups: Sequence[RowGroup]) -> int:
    return sum(group.stop - group.start for group in groups if group.is_recomputed)
