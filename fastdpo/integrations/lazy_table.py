"""The operations on lazy logits that make no logits: log-probabilities, losses, statistics, masks.

Each takes the function of torch that was called and its arguments, and answers NotImplemented where it does
not know what is asked of it: then the real values are made. Row operations (no V in the shape) end in the
fused op; where a mask says which rows count, the op gets those alone. `lazy_views.py` has those that only
move rows about.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastdpo.integrations.lazy import LazyLogits, lazy_tensor, on_real, records, register
from fastdpo.integrations.lazy_values import Memory
from fastdpo.integrations.lazy_views import OF_LABEL, copied, is_integer

T: Any = Tensor
_OWN_GRAD = "retain_grad", "register_hook", "register_post_accumulate_grad_hook"


def _is(x: Any, *kinds: str) -> bool:
    return isinstance(x, LazyLogits) and x.kind in kinds


def _number(value: Any) -> float | None:
    """A finite number other than 0, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value and math.isfinite(value) else None


def _is_last(x: Tensor, dim: Any) -> bool:
    if isinstance(dim, tuple | list):
        dim = dim[0] if len(dim) == 1 else None
    return isinstance(dim, int) and dim in (-1, x.dim() - 1)


def _same_rows(a: LazyLogits, b: LazyLogits, of_b: Callable[[Tensor], Tensor] = lambda rows: rows) -> bool:
    if not a.memory.is_like(b.memory):
        return False
    rows = of_b(b.rows)
    return a.rows is rows or (a.rows.shape == rows.shape and bool(torch.equal(a.rows, rows)))


# Scales and caps


@register(
    *(T.mul, T.__mul__, T.__rmul__, torch.mul, torch.multiply, T.multiply, T.__imul__, T.mul_),
    *(T.div, T.__truediv__, torch.div, T.true_divide, torch.true_divide, torch.divide),
    *(T.__itruediv__, T.div_),
)
def _scaled(func: Any, x: Any, other: Any, **kwargs: Any) -> Any:
    name = func.__name__.strip("_")
    divides = "div" in name
    if not divides and not isinstance(x, LazyLogits):
        x, other = other, x
    if not isinstance(x, LazyLogits) or kwargs or x.kind == "argmax":
        return NotImplemented
    is_inplace = func in (T.mul_, T.div_, T.__imul__, T.__itruediv__)
    number = _number(other)
    if number is not None:
        number = 1 / number if divides else number
        if not is_inplace:
            return copied(x, **_times(x.memory, number))
        # All that shares the memory sees it; a part of it, or a change that autograd is not to see, is real.
        is_all = x.numel() == x.memory.rows.numel() * (x.shape[-1] if x.has_vocab else 1)
        if not is_all or x.memory.known is not None or records(x) != x.memory.has_grad:
            return NotImplemented
        for key, value in _times(x.memory, number).items():
            setattr(x.memory, key, value)
        return x
    if divides or is_inplace:
        return NotImplemented
    if isinstance(other, LazyLogits):
        return _product(x, other)
    if x.has_vocab or not isinstance(other, Tensor) or other.requires_grad:
        return NotImplemented
    if torch.broadcast_shapes(other.shape, x.shape) != x.shape:
        return NotImplemented
    return func(x.kept_values((other != 0).expand(x.shape)), other)


def _times(memory: Memory, number: float) -> dict[str, Any]:
    if memory.kind != "logits":
        return {"factor": memory.factor * number}
    if memory.cap is None:
        return {"scale": memory.scale * number}
    # number * cap * tanh(scale * x / cap), the sign inside: a cap is positive
    return {"scale": memory.scale * number, "cap": memory.cap * abs(number)}


def _product(x: LazyLogits, y: LazyLogits) -> Any:
    """p times log p, or times the logits: of which entropies are made."""
    if y.kind == "probs":
        x, y = y, x
    kind = {"logprobs": "p_logp", "logits": "p_logit"}.get(y.kind)
    if x.kind != "probs" or kind is None or not _same_rows(x, y):
        return NotImplemented
    factor, dtype = x.memory.factor * y.memory.factor, torch.promote_types(x.dtype, y.dtype)
    return copied(x if records(x) else y, kind=kind, factor=factor, dtype=dtype)


@register(T.neg, torch.neg, T.negative, torch.negative)
def _negative(func: Any, x: LazyLogits) -> Any:
    return copied(x, **_times(x.memory, -1.0)) if x.kind != "argmax" else NotImplemented


@register(torch.tanh, T.tanh)
def _tanh(func: Any, x: LazyLogits) -> Any:
    return copied(x, cap=1.0) if x.kind == "logits" and x.memory.cap is None else NotImplemented


# From logits to rows


@register(T.log_softmax, torch.log_softmax, F.log_softmax, T.softmax, torch.softmax, F.softmax)
def _softmax(func: Any, x: Any, dim: Any = None, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    if not _is(x, "logits") or not _is_last(x, dim):
        return NotImplemented
    dtype = dtype or next((a for a in args if isinstance(a, torch.dtype)), None)
    kind = "logprobs" if func.__name__.startswith("log") else "probs"
    return copied(x, kind=kind, dtype=dtype or _dtype_of(func, x))


def _dtype_of(func: Any, x: Tensor) -> torch.dtype:
    """The dtype that autocast, where it is on, gives to the result."""
    return func(torch.empty(1, 1, dtype=x.dtype, device=x.device), -1).dtype


@register(torch.exp, T.exp)
def _exp(func: Any, x: LazyLogits) -> Any:
    if x.kind != "logprobs" or x.memory.factor != 1.0:
        return NotImplemented
    return copied(x, kind="probs", dtype=_dtype_of(torch.softmax, x))


@register(torch.log, T.log)
def _log(func: Any, x: LazyLogits) -> Any:
    return copied(x, kind="logprobs") if x.kind == "probs" and x.memory.factor == 1.0 else NotImplemented


@register(T.gather, torch.gather, torch.take_along_dim, T.take_along_dim)
def _gather(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    names = ("indices", "dim") if func.__name__ == "take_along_dim" else ("dim", "index")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    index: Any = given.get("index", given.get("indices"))
    dim = given.get("dim")
    if not _is(x, *OF_LABEL) or not _is_last(x, dim) or isinstance(index, LazyLogits):
        return NotImplemented
    fits = index.dim() == x.dim() and all(a <= b for a, b in zip(index.shape[:-1], x.shape, strict=False))
    if not fits or (func.__name__ == "take_along_dim" and index.shape[:-1] != x.shape[:-1]):
        return NotImplemented
    rows = x.rows[tuple(slice(size) for size in index.shape[:-1])]
    rows = rows.unsqueeze(-1).expand(index.shape)
    # Values of their own: many loops write to their labels between here and the mask.
    return copied(x, rows, kind=OF_LABEL[x.kind], labels=index.long().clone())


@register(torch.logsumexp, T.logsumexp, torch.special.logsumexp)
def _logsumexp(func: Any, x: Any, dim: Any, keepdim: bool = False) -> Any:
    if not _is(x, *OF_LABEL) or not _is_last(x, dim):
        return NotImplemented
    rows = x.rows.unsqueeze(-1) if keepdim else x.rows
    if x.kind == "logprobs":  # of 2 log p, whose gradient the op has not
        is_known = x.memory.factor == 2.0 and not records(x)
        return copied(x, rows, kind="sum_sq", factor=1.0) if is_known else NotImplemented
    return copied(x, rows, kind="lse", dtype=_dtype_of(torch.logsumexp, x))


@register(T.sub, torch.sub, T.__sub__, torch.subtract, T.subtract)
def _difference(func: Any, x: Any, y: Any, **kwargs: Any) -> Any:
    if kwargs or not isinstance(x, LazyLogits) or not isinstance(y, LazyLogits):
        return NotImplemented
    kinds, dtype = (x.kind, y.kind), torch.promote_types(x.dtype, y.dtype)
    has_factors = x.memory.factor != 1.0 or y.memory.factor != 1.0
    if has_factors or records(x) != records(y):
        return NotImplemented
    if kinds == ("logits", "lse") and _same_rows(x, y, lambda rows: rows.squeeze(-1)):
        return copied(x, kind="logprobs", dtype=dtype) if y.dim() == x.dim() else NotImplemented
    if kinds == ("logit", "lse") and _same_rows(x, y):
        return copied(x, kind="logp", dtype=dtype)
    if kinds == ("lse", "logit") and _same_rows(x, y):
        return copied(y, kind="logp", factor=-1.0, dtype=dtype)
    if kinds == ("lse", "expected") and _same_rows(x, y):
        return copied(x, kind="entropy", dtype=dtype)
    return NotImplemented


@register(T.sum, torch.sum)
def _sum(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _is(x, *OF_LABEL) and (dim is None or _is_last(x, dim)):
        wide = torch.promote_types(dtype or x.dtype, torch.float32)
        total = _mean(func, x, -1, keepdim, dtype=wide if dim is None else dtype or _dtype_of(torch.sum, x))
        if total is NotImplemented:
            return total
        total = total * x.shape[-1]
        return total if dim is not None else total.sum().to(dtype or x.dtype)
    if not _is(x, "p_logp", "p_logit") or not _is_last(x, dim):
        return NotImplemented
    rows, factor = (x.rows.unsqueeze(-1) if keepdim else x.rows), x.memory.factor
    dtype = dtype or _dtype_of(torch.sum, x)
    if x.kind == "p_logp":
        return copied(x, rows, kind="entropy", factor=-factor, dtype=dtype)
    return copied(x, rows, kind="expected", dtype=dtype)


@register(T.nansum, torch.nansum)
def _nansum(func: Any, x: Any) -> Any:
    total = _sum(torch.sum, x) if _is(x, "logits") else NotImplemented
    # One NaN among the logits would make the sum NaN: then they are looked at one by one.
    if total is NotImplemented or x.memory.source.agree("nansum", not bool(total.isfinite())):
        return NotImplemented
    return total


@register(T.mean, torch.mean)
def _mean(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not _is(x, *OF_LABEL):
        return NotImplemented
    if (dim is not None and not _is_last(x, dim)) or not x.memory.has_mean:
        return NotImplemented
    rows = x.rows.unsqueeze(-1) if keepdim and dim is not None else x.rows
    kind, factor = ("mean", 1.0) if x.kind == "logits" else ("uniform", -x.memory.factor)
    means = copied(x, rows, kind=kind, factor=factor, dtype=dtype or x.dtype)
    return means if dim is not None else means.mean()


@register(T.argmax, torch.argmax)
def _argmax(func: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is(x, "logits", "logprobs", "probs") or not _is_last(x, dim) or x.memory.factor <= 0:
        return NotImplemented
    rows = x.rows.unsqueeze(-1) if keepdim else x.rows
    made = replace(x.memory, kind="argmax", rows=rows, dtype=torch.int64, factor=1.0, labels=None)
    return lazy_tensor(replace(made, has_grad=False, real=None, known=None))


@register(T.max, torch.max)
def _max(func: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is(x, *OF_LABEL) or x.memory.factor <= 0:
        return NotImplemented
    places = _argmax(torch.argmax, x, dim, keepdim)
    if places is NotImplemented:
        return NotImplemented
    indices = places.real_values()
    values = copied(x, places.rows, kind=OF_LABEL[x.kind], labels=indices)
    return torch.return_types.max((values, indices))


@register(T.eq, torch.eq, T.__eq__, T.ne, torch.ne, T.__ne__)
def _equal(func: Any, x: Any, labels: Any) -> Any:
    if isinstance(labels, LazyLogits) and not isinstance(x, LazyLogits):
        x, labels = labels, x
    is_known = _is(x, "argmax") and isinstance(labels, Tensor) and not isinstance(labels, LazyLogits)
    if not is_known or not is_integer(labels) or labels.shape != x.shape:
        return NotImplemented
    memory, flat = x.memory, labels.flatten().long()
    chosen = ((flat >= 0) & (flat < memory.source.vocab_size)).nonzero().squeeze(-1)
    rows = x.rows.flatten()[chosen]
    memory.source.agree("argmax == labels", True)
    with torch.no_grad():
        found = memory.looked_at(lambda whole: whole.statistics(rows, flat[chosen], ["is_top1"]).is_top1)
    equal = torch.zeros_like(flat, dtype=torch.bool).index_copy(0, chosen, found).view(x.shape)
    return equal if func in (T.eq, torch.eq, T.__eq__) else ~equal


# Losses


@register(F.cross_entropy, F.nll_loss)
def _cross_entropy(
    func: Any,
    x: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    kind = "logits" if func is F.cross_entropy else "logprobs"
    is_known = _is(x, kind) and isinstance(target, Tensor) and not isinstance(target, LazyLogits)
    is_known = is_known and not target.is_floating_point() and target.shape == x.rows.shape
    is_known = is_known and (x.rows.dim() <= 1 or x.is_turned)
    if not is_known or size_average is not None or reduce is not None or x.memory.factor != 1.0:
        return NotImplemented
    if reduction not in ("none", "mean", "sum") or not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented  # torch has its errors
    if label_smoothing and weight is not None:
        return NotImplemented
    keep, target = target != ignore_index, target.long()
    dtype = _dtype_of(torch.log_softmax, x)
    wide = torch.promote_types(dtype, torch.float32)  # rounded once, as torch's own sum is
    rows = copied(x, kind="logp", labels=target, factor=-1.0, dtype=wide)
    values, weights = rows.kept_values(keep), keep
    if weight is not None:
        weights = weight[torch.where(keep, target, 0)].to(wide) * keep
        values = values * weights
    if label_smoothing:
        uniform = copied(x, kind="uniform", dtype=wide).kept_values(keep)
        values = (1 - label_smoothing) * values + label_smoothing * uniform
    if reduction == "none":
        return values.to(dtype)
    return (values.sum() if reduction == "sum" else values.sum() / weights.sum()).to(dtype)


# Masks of rows


@register(T.masked_fill, torch.masked_fill, T.masked_fill_)
def _masked_fill(func: Any, x: Any, mask: Any, value: Any) -> Any:
    if not _is_row_mask(x, mask) or isinstance(value, LazyLogits):
        return NotImplemented
    if func is T.masked_fill_:
        return _written(func, x, ~mask, mask, value)
    return func(x.kept_values(~mask.expand(x.shape)), mask, value)


@register(T.__setitem__)
def _set(func: Any, x: Any, index: Any, value: Any) -> Any:
    if not _is_row_mask(x, index) or index.shape != x.shape or isinstance(value, LazyLogits):
        return NotImplemented
    return _written(func, x, ~index, index, value)


def _written(func: Any, x: LazyLogits, keep: Tensor, *args: Any) -> Any:
    """An in-place change of the rows that are not kept: they are never computed, and all views see it."""
    memory = x.memory
    x.kept_values(keep.expand(x.shape))
    if memory.real is None and memory.known is not None:
        memory.real, memory.known = memory.known[1], None
    return on_real(func, (x, *args), {})


@register(torch.where, T.where)
def _where(func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 3:
        return NotImplemented
    mask, x, other = args if func is torch.where else (args[1], args[0], args[2])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or isinstance(mask, LazyLogits):
        return NotImplemented

    def kept(value: Any, keep: Tensor) -> Any:
        is_mask = isinstance(value, LazyLogits) and _is_row_mask(value, keep)
        return value.kept_values(keep.expand(value.shape)) if is_mask else value

    x, other = kept(x, mask), kept(other, ~mask)
    if isinstance(x, LazyLogits) or isinstance(other, LazyLogits):
        return NotImplemented
    return torch.where(mask, x, other)


def _is_row_mask(x: Any, mask: Any) -> bool:
    """Whether ``mask`` says of each entry of ``x``, which has no vocabulary, whether it counts."""
    if not isinstance(x, LazyLogits) or x.has_vocab or x.kind == "argmax":
        return False
    is_mask = isinstance(mask, Tensor) and not isinstance(mask, LazyLogits) and mask.dtype == torch.bool
    return is_mask and mask.dim() <= x.dim() and torch.broadcast_shapes(mask.shape, x.shape) == x.shape


# What needs no values


@register(
    *(T.new_zeros, T.new_ones, T.new_empty, T.new_full, T.new_tensor, torch.zeros_like, torch.ones_like),
    *(torch.empty_like, torch.full_like),
)
def _new(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return func(torch.empty(1, dtype=x.dtype, device=x.device).expand(x.shape), *args, **kwargs)


@register(T.grad_fn.__get__, T.grad.__get__, T._base.__get__)
def _nothing(func: Any, x: LazyLogits) -> None:
    """None: what has a ``grad_fn`` DDP would hand through a function of its own, which takes real values.

    Under ``static_graph`` the first step's gradients are added up over ranks by that function alone.
    """
    asked_by = sys._getframe(2).f_locals.get("self")
    if isinstance(asked_by, DistributedDataParallel) and asked_by.static_graph:
        raise RuntimeError(
            "logits: got lazy ones under DistributedDataParallel(static_graph=True), which would not add up "
            "the gradients of the first step over ranks, wanted static_graph=False, or logits='real'"
        )


@register(*(getattr(T, name) for name in _OWN_GRAD))
def _refused(func: Any, x: LazyLogits, *args: Any) -> Any:
    owner = type(getattr(args[0] if args else None, "__self__", None))
    is_engines = func is T.register_hook and owner.__module__.startswith("torch.distributed.fsdp")
    if is_engines and (handle := x.memory.source.take_hook(*args)) is not None:
        return handle
    raise RuntimeError(
        f"logits: got {func.__name__} on lazy logits, whose gradient is never made, wanted real ones: "
        "patch_model(model, logits='real')"
    )
