"""Views, casts, selections and copies of lazy tensors: the same function of their row numbers.

Each takes the function of torch that was called and its arguments, and answers NotImplemented where it does
not know what is asked of it: then the real values are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastdpo.integrations.lazy import LazyLogits, lazy_tensor, records, register

T: Any = Tensor
# What a label's entry of them is.
OF_LABEL = {"logprobs": "logp", "logits": "logit"}


def copied(x: LazyLogits, rows: Tensor | None = None, **changes: Any) -> LazyLogits:
    """A lazy tensor of a memory of its own, which nothing that is written to ``x`` later will change."""
    given = {"labels": x.labels, **changes}
    rows = x.rows if rows is None else rows
    memory = replace(x.memory, rows=rows.contiguous(), real=None, known=None, has_grad=records(x), **given)
    return lazy_tensor(memory)


def _view(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, LazyLogits):
        return NotImplemented
    args, kwargs = tree_map(lambda v: v.meta if isinstance(v, LazyLogits) else v, (args, kwargs))
    if any(isinstance(value, torch.dtype) for value in args):
        return NotImplemented
    proxy, metas = x.rows, func(x.meta, *args, **kwargs)
    if x.has_vocab:  # V columns that take no memory; where they are still last, they are still the vocabulary
        proxy = proxy.unsqueeze(-1).expand(x.shape)
        if any(one.shape[-1:] != x.shape[-1:] for one in ([metas] if isinstance(metas, Tensor) else metas)):
            return _turned(func, x, proxy, metas, *args, **kwargs)
    seen = func(proxy, *args, **kwargs)
    labels = None if x.labels is None else func(x.labels, *args, **kwargs)
    if isinstance(seen, Tensor):
        return _viewed(x, seen, labels, metas, lambda value: func(value, *args, **kwargs))
    made = []
    for place, part in enumerate(seen):

        def view(value: Tensor, place: int = place) -> Any:
            return func(value, *args, **kwargs)[place]

        made.append(_viewed(x, part, None if labels is None else labels[place], metas[place], view))
    return NotImplemented if any(one is NotImplemented for one in made) else type(seen)(made)


def _viewed(
    x: LazyLogits, rows: Tensor, labels: Tensor | None, meta: Tensor, view: Callable[[Tensor], Tensor]
) -> Any:
    if x.has_vocab:
        size = x.shape[-1]
        is_last = rows.dim() > 0 and rows.shape[-1] == size and (rows.stride(-1) == 0 or not rows.numel())
        if not is_last or size == 1:
            return NotImplemented
        rows = rows[..., 0]
    rows, labels = rows.contiguous(), None if labels is None else labels.contiguous()
    if meta.untyped_storage()._cdata != x.meta.untyped_storage()._cdata:
        return copied(x, rows, labels=labels)  # a reshape that has to copy
    given: dict[str, Any] = {"rows": rows, "labels": labels, "meta": meta, "is_recorded": records(x)}
    return lazy_tensor(x.memory, views=(*x.views, view), **given)


def _turned(func: Any, x: LazyLogits, proxy: Tensor, meta: Any, *args: Any, **kwargs: Any) -> Any:
    """``(B, V, T)`` of ``(B, T, V)``, for cross_entropy."""
    if func not in _TURNS or x.dim() != 3 or meta.shape[1] != x.shape[-1]:
        return NotImplemented
    seen = func(proxy, *args, **kwargs)
    if seen.stride(1) != 0:
        return NotImplemented
    views = (*x.views, lambda value: func(value, *args, **kwargs))
    given: dict[str, Any] = {"rows": seen[:, 0].contiguous(), "meta": meta, "is_recorded": records(x)}
    return lazy_tensor(x.memory, views=views, is_turned=True, **given)


_TURNS = {
    T.transpose,
    T.permute,
    T.swapaxes,
    T.movedim,
    T.mT.__get__,
    torch.transpose,
    torch.permute,
    torch.movedim,
}

register(
    *(T.view, T.reshape, T.flatten, T.unflatten, T.squeeze, T.unsqueeze, T.transpose, T.permute, T.narrow),
    *(T.select, T.expand, T.expand_as, T.view_as, T.reshape_as, T.chunk, T.split, T.unbind, T.tensor_split),
    *(T.movedim, T.swapaxes, T.t, T.mT.__get__, torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze),
    *(torch.transpose, torch.permute, torch.narrow, torch.chunk, torch.split, torch.unbind, torch.movedim),
    *(torch.tensor_split, torch.select, torch.swapaxes, T.unsafe_chunk, T.unsafe_split),
)(_view)


@register(T.detach, T.data.__get__, torch.detach)
def _detach(func: Any, x: LazyLogits) -> Any:
    given: dict[str, Any] = {"rows": x.rows, "labels": x.labels, "meta": x.meta}
    return lazy_tensor(x.memory, views=x.views, is_recorded=False, **given)


@register(T.contiguous)
def _contiguous(func: Any, x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    return x if x.meta.is_contiguous() else copied(x)


@register(T.clone, torch.clone)
def _clone(func: Any, x: LazyLogits, **kwargs: Any) -> Any:
    return copied(x)


@register(T.__iter__)
def _iterate(func: Any, x: LazyLogits) -> Any:
    parts = _view(T.unbind, x, 0)
    return parts if parts is NotImplemented else iter(parts)


@register(T.__repr__)
def _describe(func: Any, x: LazyLogits, **kwargs: Any) -> str:
    return f"LazyLogits({x.kind}, shape={tuple(x.shape)}, dtype={x.dtype}, device='{x.device}')"


@register(T.to, T.float, T.double, T.half, T.bfloat16, T.type, T.type_as, T.cpu, T.cuda)
def _cast(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, LazyLogits):
        return NotImplemented

    def empty(value: Any) -> Any:
        is_lazy = isinstance(value, LazyLogits)
        return torch.empty(0, dtype=value.dtype, device=value.device) if is_lazy else value

    before = empty(x)
    after = func(before, *tree_map(empty, args), **tree_map(empty, kwargs))
    if not isinstance(after, Tensor):
        return after  # the name of a type
    if after is before:
        return x
    if after.device != x.device or not after.is_floating_point() or not x.is_floating_point():
        return NotImplemented
    return copied(x, dtype=after.dtype)


@register(T.__getitem__)
def _index(func: Any, x: Any, index: Any) -> Any:
    if not isinstance(x, LazyLogits):
        return NotImplemented
    index = index if isinstance(index, tuple) else (index,)
    # An empty list is one of row numbers, though torch makes floats of it.
    index = tuple(
        torch.as_tensor(i, dtype=None if i else torch.int64, device=x.device)
        if isinstance(i, list | range)
        else i
        for i in index
    )
    plain = [i for i in index if i is None or i is Ellipsis or isinstance(i, slice | int)]
    if len(plain) == len(index) and not any(isinstance(i, bool) for i in index):
        return _view(func, x, index)
    tensors = [i for i in index if isinstance(i, Tensor)]
    if len(plain) + len(tensors) != len(index) or any(isinstance(i, LazyLogits | bool) for i in index):
        return NotImplemented
    if x.has_vocab:
        num_dims = sum(
            i.dim() if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) else 1
            for i in index
            if i is not None and i is not Ellipsis
        )
        place = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
        filled = (slice(None),) * (x.dim() - num_dims)
        index = (*index[:place], *filled, *index[place + 1 :])
        last: Any = index[-1]
        if isinstance(last, Tensor):
            return _picked(x, index)
        if not isinstance(last, slice) or last.indices(x.shape[-1]) != (0, x.shape[-1], 1):
            return NotImplemented
        index = index[:-1]
    labels = None if x.labels is None else x.labels[index]
    return copied(x, x.rows[index], labels=labels)


def _picked(x: LazyLogits, index: Sequence[Any]) -> Any:
    """``x[rows, labels]``."""
    if x.kind not in OF_LABEL or not all(isinstance(i, Tensor) and is_integer(i) for i in index):
        return NotImplemented
    *places, labels = torch.broadcast_tensors(*index)
    labels = torch.where(labels < 0, labels + x.shape[-1], labels).long()
    return copied(x, x.rows[tuple(places)], kind=OF_LABEL[x.kind], labels=labels.contiguous())


def is_integer(x: Tensor) -> bool:
    return x.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)


@register(T.masked_select, torch.masked_select)
def _masked_select(func: Any, x: Any, mask: Tensor) -> Any:
    if not isinstance(x, LazyLogits) or x.has_vocab or mask.shape != x.shape:
        return NotImplemented
    return _index(T.__getitem__, x, mask)


@register(T.roll, torch.roll, T.flip, torch.flip, T.index_select, torch.index_select)
def _moved(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name = "dim" if func.__name__ == "index_select" else "dims"
    place = 1 if func.__name__ == "roll" else 0
    given = kwargs.pop(name, args[place] if len(args) > place else None)
    if func is T.flip and len(args) > 1:
        given, args = args, ()
    dims = [given] if isinstance(given, int) else given
    if not isinstance(x, LazyLogits) or dims is None:
        return NotImplemented
    dims = [d % x.dim() for d in dims]
    if any(d >= x.rows.dim() for d in dims):
        return NotImplemented
    before, after = args[:place], args[place + 1 :]
    if func.__name__ == "roll" and not before:
        before = (kwargs.pop("shifts"),)
    where = dims[0] if name == "dim" else dims

    def moved(value: Tensor) -> Tensor:
        return func(value, *before, where, *after, **kwargs)

    return copied(x, moved(x.rows), labels=None if x.labels is None else moved(x.labels))


@register(torch.stack, torch.cat, torch.concat, torch.concatenate)
def _joined(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    first = tensors[0]
    if kwargs or not isinstance(dim, int) or not all(isinstance(x, LazyLogits) for x in tensors):
        return NotImplemented
    for x in tensors:
        memory = x.memory
        is_like = memory.is_like(first.memory) and x.dim() == first.dim() and records(x) == records(first)
        same = ("kind", "factor", "dtype")
        if not is_like or any(getattr(memory, name) != getattr(first.memory, name) for name in same):
            return NotImplemented
    num_dims = first.dim() + (func is torch.stack)
    dim = dim % num_dims if num_dims else 0
    if first.has_vocab and dim >= num_dims - 1:
        return NotImplemented
    labels = None if first.labels is None else func([x.labels for x in tensors], dim)
    return copied(first, func([x.rows for x in tensors], dim), labels=labels)
