"""What the head's products take on a GPU, by a model of waves: pure arithmetic, nothing imported.

A product is made in output tiles, one on a multiprocessor at a time; tiles go over the multiprocessors in
waves, and the last wave leaves some idle. The logits have thousands of tiles. D W has as few as 42, and a
sum over the whole vocabulary behind each: its sum is cut into **parts** of the vocabulary, each a product of
its own with fp32 results, until there are tiles for every multiprocessor.

The model is an assumption (tile, bandwidth, what lies between kernels: an H200's); no GPU has confirmed it.
Times are in units of one wave over one element of the sum: 2 x 128 x 256 FLOP of one multiprocessor, 11 ns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

# The output tile of the GEMMs, and the FLOP that a GPU does while it reads a byte.
TILE_ROWS, TILE_COLUMNS = 128, 256
FLOP_PER_BYTE = 184
# The share of the bandwidth that is left to a product for reading the weight: with it the reading hides
# behind 512 rows, as it does in what others have measured, and no longer behind fewer.
WEIGHT_READ_SHARE = 0.4
# Between two kernels, some 5 us: the last blocks run out, the next ones begin.
BETWEEN_KERNELS = 450
MAX_PARTS = 32
PART_ALIGNMENT = 8  # vocabulary entries: 16 bytes of a 16-bit D
WANTED_BUSY = 0.95
MIB = 1024 * 1024


def whole_tiles(rows: int) -> int:
    """Rows up to the edge of their last tile: what a product of them takes."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def tile_count(rows: int, columns: int, parts: int = 1) -> int:
    """Output tiles of ``parts`` products ``(rows, columns)``."""
    return -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS) * parts


def part_size(vocab_size: int, parts: int) -> int:
    """Vocabulary entries of each of several parts; what is left over is a small product of its own."""
    return vocab_size if parts == 1 else vocab_size // parts // PART_ALIGNMENT * PART_ALIGNMENT


def partial_sum_bytes(rows: int, hidden_size: int, parts: int) -> int:
    """Bytes of the fp32 results of some rows' D W, of all parts."""
    return 4 * rows * hidden_size * parts


def logits_cost(rows: int, hidden_size: int, vocab_size: int, num_multiprocessors: int) -> float:
    """The time of the logits of some rows, and of what follows each chunk of them."""
    num_waves = -(-tile_count(rows, vocab_size) // num_multiprocessors)
    weight = _weight_cost(hidden_size, vocab_size, num_multiprocessors)
    return max(num_waves * hidden_size, weight) + 2 * BETWEEN_KERNELS


def hidden_grad_cost(
    rows: int, hidden_size: int, vocab_size: int, num_multiprocessors: int, scratch_bytes: int
) -> float:
    """The time of D W of some rows, in as many parts as is best."""
    device = (hidden_size, vocab_size, num_multiprocessors, scratch_bytes)
    return _best_parts(whole_tiles(rows), *device)[0]


def hidden_grad_parts(
    rows: int, hidden_size: int, vocab_size: int, num_multiprocessors: int, scratch_bytes: int
) -> int:
    """Into how many parts the sum of D W is best cut, for partial sums within ``scratch_bytes``."""
    if num_multiprocessors == 0 or rows == 0:
        return 1
    return _best_parts(whole_tiles(rows), hidden_size, vocab_size, num_multiprocessors, scratch_bytes)[1]


@lru_cache(maxsize=4096)
def _best_parts(
    rows: int, hidden_size: int, vocab_size: int, num_multiprocessors: int, scratch_bytes: int
) -> tuple[float, int]:
    weight = _weight_cost(hidden_size, vocab_size, num_multiprocessors)

    def cost(parts: int) -> float:
        num_waves = -(-tile_count(rows, hidden_size, parts) // num_multiprocessors)
        product = max(num_waves * -(-vocab_size // parts), weight) + BETWEEN_KERNELS
        if parts == 1:
            return product
        # Partial sums are written and read once; adding them up is a kernel, and what is left over another.
        has_rest = part_size(vocab_size, parts) * parts < vocab_size
        sums = byte_cost(2 * partial_sum_bytes(rows, hidden_size, parts), num_multiprocessors)
        return product + sums + (1 + has_rest) * BETWEEN_KERNELS

    fitting = scratch_bytes // partial_sum_bytes(rows, hidden_size, 1)
    most = max(min(MAX_PARTS, fitting, vocab_size // TILE_COLUMNS), 1)
    return min((cost(parts), parts) for parts in range(1, most + 1))


def cost_of_all(num_rows: int, rows: int, cost: Callable[[int], float]) -> float:
    """The cost of products of ``rows`` rows each, and of what is left."""
    full, rest = divmod(num_rows, rows)
    return full * cost(rows) + (cost(rest) if rest else 0.0)


def _weight_cost(hidden_size: int, vocab_size: int, num_multiprocessors: int) -> float:
    return byte_cost(2 * vocab_size * hidden_size, num_multiprocessors) / WEIGHT_READ_SHARE


def byte_cost(num_bytes: int, num_multiprocessors: int) -> float:
    """The time of reading or writing some bytes at the full bandwidth."""
    return num_bytes * FLOP_PER_BYTE / (2 * TILE_ROWS * TILE_COLUMNS * num_multiprocessors)


@dataclass(frozen=True)
class Waves:
    """How one of the head's products goes over the multiprocessors, all of a call's together."""

    product: str  # "logits" or "D W"
    rows: int  # of one product; the last may have fewer
    columns: int
    parts: int  # of the vocabulary, whose sums are added up
    tiles: int  # of one product
    waves: int  # likewise
    busy: float  # the product's own work over what all waves of the call have room for
    time: float  # predicted, over what the work takes where nothing is idle: W read, gaps between kernels
    reason: str  # why `busy` is less than 95 %, else ""

    def __str__(self) -> str:
        times = f" in {self.parts} parts of the vocabulary" if self.parts > 1 else ""
        text = f"{self.product} of {self.rows} rows{times}: {self.tiles} tiles, {self.waves} "
        text += f"wave{'s' if self.waves != 1 else ''}, {self.busy:.1%} busy, {self.time:.2f} x its time"
        return f"{text} ({self.reason})" if self.reason else text


def logits_waves(chunks: list[int], hidden_size: int, vocab_size: int, num_multiprocessors: int) -> Waves:
    """Of the logits of chunks of some rows each."""
    device = (hidden_size, vocab_size, num_multiprocessors)
    work = _Work([(rows, 1) for rows in chunks], vocab_size, num_multiprocessors)
    reason = ""
    if work.busy < WANTED_BUSY:
        rows, _ = work.idlest
        reason = work.edges or "no chunk that the workspace holds is better for both products"
        if _weight_cost(*device) > -(-tile_count(rows, vocab_size) // num_multiprocessors) * hidden_size:
            reason = f"of {rows} rows, reading W takes longer than the product"
        elif len(chunks) == 1:
            reason = work.edges or "all rows are one chunk"
    return work.waves("logits", sum(logits_cost(rows, *device) for rows in chunks), hidden_size, reason)


def hidden_grad_waves(
    pieces: list[tuple[int, int]],
    hidden_size: int,
    vocab_size: int,
    num_multiprocessors: int,
    scratch_bytes: int,
) -> Waves:
    """Of products of D W, each of some ``(rows, parts)``."""
    device = (hidden_size, vocab_size, num_multiprocessors)
    work = _Work(pieces, hidden_size, num_multiprocessors)
    reason = ""
    if work.busy < WANTED_BUSY:
        rows, parts = work.idlest
        wanted = hidden_grad_parts(rows, *device, 2**62)
        wave_time = -(-tile_count(rows, hidden_size, parts) // num_multiprocessors) * vocab_size / parts
        if _weight_cost(*device) > wave_time:
            reason = f"of {rows} rows, reading W takes longer than the product"
        elif wanted != parts and not work.edges:
            needed = partial_sum_bytes(whole_tiles(rows), hidden_size, wanted) / MIB
            reason = f"{wanted} parts would take {needed:.0f} MiB of sums, above {scratch_bytes / MIB:.0f}"
        else:
            reason = work.edges or "more parts would cost more in partial sums than they fill"
    cost = sum(hidden_grad_cost(rows, *device, scratch_bytes) for rows, _ in pieces)
    return work.waves("D W", cost, vocab_size, reason)


class _Work:
    """Products ``(rows, columns)``, each in some parts, and the waves that they take."""

    def __init__(self, pieces: list[tuple[int, int]], columns: int, num_multiprocessors: int) -> None:
        self.pieces, self.columns, self.num_multiprocessors = pieces, columns, num_multiprocessors
        idle: dict[tuple[int, int], float] = {}
        self.tiles = room = 0.0
        for rows, parts in pieces:
            num_waves = -(-tile_count(rows, columns, parts) // num_multiprocessors)
            # A part sums over its share of the vocabulary, so that a wave of p parts is 1 / p as long.
            has = num_waves * num_multiprocessors / parts
            work = rows * columns / (TILE_ROWS * TILE_COLUMNS)
            idle[rows, parts] = idle.get((rows, parts), 0.0) + has - work
            room += has
            self.tiles += work
        self.busy = self.tiles / room
        self.idlest = max(idle, key=idle.__getitem__)  # whose products leave the most idle

    @property
    def edges(self) -> str:
        """Which side of the idlest product does not fill its tiles; "" where its waves idle more."""
        (rows, parts), columns = self.idlest, self.columns
        num_waves = -(-tile_count(rows, columns, parts) // self.num_multiprocessors)
        filled = rows * columns / (tile_count(rows, columns) * TILE_ROWS * TILE_COLUMNS)
        if filled > tile_count(rows, columns, parts) / (num_waves * self.num_multiprocessors):
            return ""
        across, down = columns / TILE_COLUMNS, rows / TILE_ROWS
        if across / -(-columns // TILE_COLUMNS) < down / -(-rows // TILE_ROWS):
            return f"{columns} columns fill {across:.1f} of {-(-columns // TILE_COLUMNS)} tiles"
        return f"{rows} rows fill {down:.1f} of {-(-rows // TILE_ROWS)} tiles"

    def waves(self, product: str, cost: float, depth: int, reason: str) -> Waves:
        """``cost`` of them all, whose sums have ``depth`` terms."""
        rows, parts = self.pieces[0]
        first = tile_count(rows, self.columns, parts)
        time = cost * self.num_multiprocessors / (self.tiles * depth)
        num_waves = -(-first // self.num_multiprocessors)
        return Waves(product, rows, self.columns, parts, first, num_waves, self.busy, time, reason)
