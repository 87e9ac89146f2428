"""Who computes attention over a forest: a kernel for rows of any length, or piece by piece.

Every query sees exactly its path. On a GPU, in 16 bits, that is one call: keys and values are gathered along
each piece's path, and a variable-length kernel aligns queries and keys at their ends, as a causal mask does.
Elsewhere pieces go one after the other through ``scaled_dot_product_attention``, causal where nothing is
before them, else with a small mask. Softcaps and attention sinks take flash-attn, or plain products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.integrations.forest.segments import Piece

# Rows of scores that are alive at once where a window or a cap needs them in plain torch.
_QUERY_BLOCK = 1024
_SMALL_DTYPES = (torch.float16, torch.bfloat16)
_Core: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[Piece],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention of some tokens of one row, as a function of transformers' ``AttentionInterface``.

    Args:
        query: ``(1, heads, n, d)``, of the tokens that ``pieces`` have together.
        key, value: ``(1, key heads, m, d)``: of the row up to the last of them, or of its last m tokens, if
            no piece sees one before.
        sliding_window: a token sees itself and so many less one before it on its path; None or 0 for all.
        softcap: of the scores.
        s_aux: ``(heads,)``, attention sinks: logits that take their share of each softmax.

    Returns:
        ``(1, n, heads, d)``.

    Raises:
        ValueError: queries that are not those of the pieces.
    """
    first, last = pieces[0].start, pieces[-1].stop
    if query.shape[0] != 1 or query.shape[2] != last - first or key.shape[2] > last:
        raise ValueError(
            f"forest: got queries {tuple(query.shape)} and keys {tuple(key.shape)}, wanted those of the "
            f"tokens {first} to {last} of one row"
        )
    query, key, value = (_as_autocast(tensor) for tensor in (query, key, value))
    # Places count from the first key that is there.
    moved = _moved(pieces, last - key.shape[2])
    window = sliding_window or None
    kernel = _varlen_kernel(query, dropout=dropout, softcap=softcap, has_sinks=s_aux is not None)
    if kernel is not None:
        return kernel(query, key, value, moved, scaling, window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if softcap is None and s_aux is None:
            is_gqa = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and q.shape[2] > 1,
                scale=scale, enable_gqa=is_gqa,
            )  # fmt: skip
        return _plain(q, k, v, mask, scale, dropout, softcap, s_aux)

    in_blocks = window is not None or softcap is not None or s_aux is not None
    return _by_piece(query, key, value, moved, core, window, in_blocks).transpose(1, 2).contiguous()


def _moved(pieces: Sequence[Piece], by: int) -> Sequence[Piece]:
    if not by:
        return pieces
    return [
        Piece(start - by, stop - by, tuple((a - by, b - by) for a, b in spans))
        for start, stop, spans in pieces
    ]


def _as_autocast(tensor: Tensor) -> Tensor:
    """In autocast's dtype: norms and rotations may have left queries and keys in fp32."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


# Piece by piece


def _by_piece(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[Piece],
    core: _Core,
    window: int | None,
    in_blocks: bool,
) -> Tensor:
    """``(1, heads, n, d)``. Tensors are split once, so that a backward pass joins each of them once."""
    cuts = sorted({0, key.shape[2], *(cut for piece in pieces for span in piece.spans for cut in span)})
    sizes = [stop - start for start, stop in pairwise(cuts)]
    place = {cut: number for number, cut in enumerate(cuts)}
    keys, values = key.split(sizes, 2), value.split(sizes, 2)
    queries = query.split([piece.stop - piece.start for piece in pieces], 2)
    found: list[Tensor] = []
    for piece, q in zip(pieces, queries, strict=True):
        seen = [n for start, stop in piece.spans for n in range(place[start], place[stop])]
        k, v = (_joined([parts[n] for n in seen]) for parts in (keys, values))
        found += _causal(q, k, v, core, window, _QUERY_BLOCK if in_blocks else q.shape[2])
    return torch.cat(found, 2)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, core: _Core, window: int | None, block: int
) -> Iterator[Tensor]:
    """Attention of queries that are the last of their keys, some rows at a time, without keys unseen."""
    count, total = query.shape[2], key.shape[2]
    past = total - count
    for start in range(0, count, block):
        stop = min(start + block, count)
        first = 0 if window is None else max(0, past + start - window + 1)
        place = slice(first, past + stop)
        q, k, v = query[:, :, start:stop], key[:, :, place], value[:, :, place]
        reach = None if window is None or window >= past + stop - first else window
        mask = None if k.shape[2] == stop - start and reach is None else _mask(q, k.shape[2], reach)
        yield core(q, k, v, mask)


def _mask(query: Tensor, keys: int, window: int | None) -> Tensor:
    """``(queries, keys)`` bool: causal, aligned at the end, within the window."""
    count = query.shape[2]
    at = torch.arange(keys - count, keys, device=query.device)[:, None]
    gap = at - torch.arange(keys, device=query.device)
    return gap >= 0 if window is None else (gap >= 0) & (gap < window)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Scores in full, for what no fused kernel of torch's knows: eager attention of transformers."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _mask(query, key.shape[2], None)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    probabilities = scores.softmax(-1)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    return F.dropout(probabilities.to(query.dtype), dropout, training=dropout > 0) @ value


# Variable-length kernels


def _varlen_kernel(
    query: Tensor, *, dropout: float, softcap: float | None, has_sinks: bool
) -> Callable[..., Tensor] | None:
    """One call for the whole row, where a kernel can do all that is asked."""
    if query.device.type != "cuda" or query.dtype not in _SMALL_DTYPES or has_sinks:
        return None
    if dropout == 0 and softcap is None:
        return _torch_varlen
    flash = _flash_attn()
    if flash is None:
        return None

    def with_flash_attn(
        q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float | None, window: int | None
    ) -> Tensor:
        (q, k, v), bounds = _gathered(q, k, v, pieces)
        out: Tensor = flash(
            q, k, v, *bounds, dropout_p=dropout, softmax_scale=scale, causal=True,
            window_size=_reach(window), softcap=softcap or 0.0,
        )  # fmt: skip
        return out[None]

    return with_flash_attn


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    (q, k, v), bounds = _gathered(q, k, v, pieces)
    is_gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, *bounds, scale=scale, window_size=_reach(window), enable_gqa=is_gqa)
    assert isinstance(out, Tensor)  # it is a pair only where more is asked of it
    return out[None]


def _reach(window: int | None) -> tuple[int, int]:
    """Keys that are seen to the left and to the right; -1 for all."""
    return -1 if window is None else window - 1, 0


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, int, int]]:
    """Queries ``(n, heads, d)``, and keys and values along each piece's path; with the bounds of both."""
    bounds, index = _bounds(tuple(pieces), k.shape[2], q.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    if index is None:
        return (q.contiguous(), k.contiguous(), v.contiguous()), bounds
    return (q.contiguous(), k[index], v[index]), bounds


@lru_cache(maxsize=4)  # the layers of a model ask for the same again and again
def _bounds(
    pieces: tuple[Piece, ...], num_keys: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor, int, int], Tensor | None]:
    """Bounds of each piece's queries and keys with the longest of both, and the keys' rows ``(K,)``.

    None for rows that are all of the keys in their order: of packed sequences, or of one path.
    """
    counts = [piece.stop - piece.start for piece in pieces]
    sizes = [sum(stop - start for start, stop in piece.spans) for piece in pieces]

    def bounds(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device, non_blocking=True)

    spans = [span for piece in pieces for span in piece.spans]
    ends = [0, *(stop for _, stop in spans)]
    index = None
    if ends[-1] != num_keys or ends[:-1] != [start for start, _ in spans]:
        index = torch.cat([torch.arange(*span) for span in spans]).to(device, non_blocking=True)
    return (bounds(counts), bounds(sizes), max(counts), max(sizes)), index


@cache
def _flash_attn() -> Callable[..., Any] | None:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func
