"""Logits that are not made until somebody looks: what a lazy tensor stands for, and its values.

A `LazyLogits` has shape, dtype and device, but no memory. It knows hidden states and head (`Source`), which
row of the hidden states each of its own rows is, and what of the distribution over the vocabulary it stands
for (its kind). `lazy_table.py` has the operations that keep it lazy or that run in the fused op. Any other
operation gets real values.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastdpo.ops.linear_logprob import linear_logprob
from fastdpo.types import Execution, LMHead, TokenLayout

# Of shape (..., V): logits z, log-probabilities, probabilities p, and the products p log p and p z.
VOCAB_KINDS = frozenset({"logits", "logprobs", "probs", "p_logp", "p_logit"})
# Of shape (...), by the statistics of the op that they are made of; a label's ``logit`` is made of its row of
# the head, and ``argmax`` of logits in small chunks. ``expected`` is sum_v p z, ``uniform``
# is the mean over the vocabulary of -log p, ``mean`` that of z, ``sum_sq`` is log sum_v p^2.
_OUTPUTS: dict[str, tuple[str, ...]] = {
    "logp": (),
    "lse": ("lse",),
    "entropy": ("entropy",),
    "expected": ("lse", "entropy"),
    "mean": ("mean_logit",),
    "uniform": ("lse", "mean_logit"),
    "sum_sq": ("log_sum_sq_probs",),
}
_NO_LABEL = -(1 << 62)  # no label is ignored by the op: which rows it gets has been decided before

# Operations by the function that torch hands over; `lazy_table.py` fills it. Each may answer NotImplemented.
TABLE: dict[Any, Callable[..., Any]] = {}

_HERE = os.path.dirname(os.path.abspath(__file__))
_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.join(_HERE, "lazy"))
_SEEN: dict[Any, Any] = {}  # the registry of `warnings`: a line that makes real logits is named once


class MadeLogits(RuntimeError):
    """With ``on_materialize="error"``: an operation on lazy logits needs their real values."""


@dataclass(frozen=True, eq=False)
class Source:
    """Hidden states ``(M, H)`` and the head that were there when the model ran.

    Args:
        head: its scale and cap are not used: the model's own code applies them to the lazy tensor.
        compute_dtype: of the product, where autocast was on; None: that of ``hidden``.
        on_materialize: ``"warn"`` or ``"error"``.
    """

    hidden: Tensor
    head: LMHead
    execution: Execution
    compute_dtype: torch.dtype | None
    on_materialize: str
    versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", self._versions())

    @property
    def tensors(self) -> list[Tensor]:
        adapter: Any = self.head.adapter or ()
        found = (self.hidden, self.head.weight, self.head.bias, *adapter)
        return [value for value in found if isinstance(value, Tensor)]

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    def _versions(self) -> tuple[int, ...]:
        return tuple(0 if value.is_inference() else value._version for value in self.tensors)

    def check_unchanged(self) -> None:
        """Raise RuntimeError where hidden states or head have been written to since the model ran."""
        if self.versions != self._versions():
            raise RuntimeError(
                "logits: got lazy logits whose hidden states or head were changed in place after the forward "
                "pass (an optimiser's step, for example), wanted them used before that. Compute what you "
                "need of the logits before the step"
            )

    def logits(self, rows: Tensor) -> Tensor:
        """``(N, V)``: the head's real output for rows ``(N,)`` of the hidden states."""
        head, dtype = self.head, self.compute_dtype or self.hidden.dtype
        states = self.hidden
        if len(rows) != len(states) or not torch.equal(rows, torch.arange(len(states), device=rows.device)):
            states = states.index_select(0, rows)
        bias = None if head.bias is None else head.bias.to(dtype)
        logits = F.linear(states.to(dtype), head.weight.to(dtype), bias)
        if head.adapter is not None:
            lora_a, lora_b, scale = head.adapter[:3]
            narrow = F.linear(states.to(lora_a.dtype), lora_a)
            logits = (logits + F.linear(narrow, lora_b) * scale).to(dtype)
        return logits


@dataclass(eq=False)
class Memory:
    """What lazy tensors share that would be views of one another: an in-place change of one is seen by all.

    Args:
        kind: see `VOCAB_KINDS` and `_OUTPUTS`; or ``argmax``.
        rows: int64, of the shape of the tensor (without V): which row of the hidden states each one is.
        labels: int64, the same shape; of the kinds ``logp`` and ``logit``.
        scale, cap: the logits are ``scale * head(h)``, or ``cap * tanh(scale * head(h) / cap)``.
        factor: multiplies the values of all kinds but logits.
        has_grad: whether autograd was recording when this was asked for, and hidden states or head train.
        real: the values, from when something needed them.
        known: ``(keep, values)``: values where the bool tensor ``keep`` is True, 0 elsewhere.
    """

    source: Source
    kind: str
    rows: Tensor
    dtype: torch.dtype
    has_grad: bool
    labels: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    factor: float = 1.0
    real: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None

    @property
    def has_vocab(self) -> bool:
        return self.kind in VOCAB_KINDS

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, self.source.vocab_size) if self.has_vocab else self.rows.shape)

    def is_like(self, other: Memory) -> bool:
        """Whether both are of one distribution, for rows that still have to be compared."""
        return (self.source, self.scale, self.cap) == (other.source, other.scale, other.cap)

    def values(self, keep: Tensor | None = None) -> Tensor:
        """Real values in the shape of ``rows`` (and V); 0 where the bool tensor ``keep`` is False."""
        if keep is None:
            if self.real is None:
                with torch.set_grad_enabled(self.has_grad):
                    made = self._made(self.rows.flatten(), self._flat_labels())
                    self.real = made.view(self.shape)
            return self.real
        if self.real is not None:
            return self.real
        if self.known is not None and not (keep & ~self.known[0]).any():
            return self.known[1]
        chosen = keep.flatten().nonzero().squeeze(-1)
        labels = self._flat_labels()
        with torch.set_grad_enabled(self.has_grad):
            made = self._made(self.rows.flatten()[chosen], None if labels is None else labels[chosen])
            values = made.new_zeros(self.rows.numel()).index_copy(0, chosen, made).view(self.shape)
        self.known = (keep.clone(), values)
        return values

    def _flat_labels(self) -> Tensor | None:
        return None if self.labels is None else self.labels.flatten()

    def _made(self, rows: Tensor, labels: Tensor | None) -> Tensor:
        """``(N,)`` or ``(N, V)``, in the dtype of this memory."""
        self.source.check_unchanged()
        device = self.source.hidden.device.type
        # Casts, as gradients, are those of when it was asked for, not of where it is looked at first.
        with torch.autocast(device, enabled=False):
            if self.kind == "argmax":
                return self._argmax(rows)
            values = self._of_vocab(rows) if self.has_vocab else self._statistic(rows, labels)
            return (values if self.factor == 1.0 else values * self.factor).to(self.dtype)

    def _transformed(self, rows: Tensor) -> Tensor:
        logits = self.source.logits(rows)
        # The model's own logits, to the bit, where nothing was done to them.
        logits = logits.to(self.dtype) if self.dtype.is_floating_point else logits
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _of_vocab(self, rows: Tensor) -> Tensor:
        logits = self._transformed(rows)
        if self.kind == "logits":
            return logits
        logprobs = logits.log_softmax(-1)
        if self.kind == "logprobs":
            return logprobs
        probs = logprobs.exp()
        return probs if self.kind == "probs" else probs * (logprobs if self.kind == "p_logp" else logits)

    def _argmax(self, rows: Tensor) -> Tensor:
        size = max(1, (self.source.execution.workspace_mib << 20) // (4 * self.source.vocab_size))
        return torch.cat([self._transformed(some).argmax(-1) for some in rows.split(size)])

    def statistics(self, rows: Tensor, labels: Tensor | None, outputs: Iterable[str]) -> Any:
        """`LinearLogprobOutput` of ``(N,)`` tensors for rows ``(N,)`` of the hidden states."""
        source, names = self.source, tuple(outputs)
        head = replace(source.head, logit_scale=self.scale, softcap=self.cap, temperature=1.0)
        execution = source.execution
        if source.compute_dtype is not None:
            execution = replace(execution, compute_dtype=source.compute_dtype)
        needs_entropy = self.has_grad and "entropy" in names
        if needs_entropy:  # the only mode that has its gradient
            execution = replace(execution, mode="recompute")
        # Where no label is wanted, another one for each row: of what a label's column is rounded by, all
        # rows together would be too much for one column of the head's gradient.
        targets = rows % source.vocab_size if labels is None else labels
        return linear_logprob(
            source.hidden,
            head,
            TokenLayout(rows, targets, torch.zeros_like(rows)),
            ignore_index=_NO_LABEL,
            outputs=names,
            entropy_requires_grad=needs_entropy,
            check_labels=rows.device.type == "cpu",
            execution=execution,
        )

    def _statistic(self, rows: Tensor, labels: Tensor | None) -> Tensor:
        if self.kind == "logit":
            assert labels is not None
            return self._label_logit(rows, labels)
        names = _OUTPUTS[self.kind]
        mean = None
        if "mean_logit" in names and self.has_grad:
            # The op's has no gradient. Without a cap the mean of logits is the product with the mean weight.
            mean, names = self._mean_logit(rows), names[:-1]
            if not names:
                return mean
        out = self.statistics(rows, labels, names)
        mean = out.mean_logit if mean is None else mean
        made: dict[str, Callable[[], Any]] = {
            "logp": lambda: out.logps,
            "lse": lambda: out.lse,
            "entropy": lambda: out.entropy,
            "expected": lambda: out.lse - out.entropy,
            "mean": lambda: mean,
            "uniform": lambda: out.lse - mean,
            "sum_sq": lambda: out.log_sum_sq_probs,
        }
        return made[self.kind]()

    def _label_logit(self, rows: Tensor, labels: Tensor) -> Tensor:
        """No product: each row of the hidden states times its label's row of the head, in fp32."""
        head, dtype = self.source.head, self.source.compute_dtype or self.source.hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        states = self.source.hidden.index_select(0, rows)
        logit = (states.to(dtype).to(wide) * F.embedding(labels, head.weight).to(dtype).to(wide)).sum(-1)
        if head.bias is not None:
            logit = logit + head.bias[labels].to(wide)
        if head.adapter is not None:
            lora_a, lora_b, scale = head.adapter[:3]
            narrow = F.linear(states.to(lora_a.dtype), lora_a)
            logit = logit + (narrow * F.embedding(labels, lora_b)).to(wide).sum(-1) * scale
        logit = logit * self.scale
        return logit if self.cap is None else self.cap * torch.tanh(logit / self.cap)

    def has_mean(self) -> bool:
        """Whether the mean logit can be had without logits."""
        return not self.has_grad or (self.cap is None and self.source.head.adapter is None)

    def _mean_logit(self, rows: Tensor) -> Tensor:
        head = self.source.head
        dtype = torch.promote_types(self.source.hidden.dtype, torch.float32)
        states = self.source.hidden.index_select(0, rows).to(dtype)
        mean = states @ head.weight.mean(0, dtype=dtype)
        return (mean if head.bias is None else mean + head.bias.mean(dtype=dtype)) * self.scale


class _InGraph(torch.autograd.Function):
    """A lazy tensor's place in autograd's graph.

    DDP looks here for the parameters that were used. A gradient comes this way only from functions with a
    backward pass of their own (kernels that took the tensor's memory); it goes on through the real values.
    """

    @staticmethod
    def forward(ctx: Any, make: Callable[[], LazyLogits], *tensors: Tensor) -> Tensor:
        made = make()
        ctx.memory, ctx.views = made.memory, made.views  # not the tensor: it would keep itself alive
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.memory.real is None and ctx.memory.has_vocab:
            _report(ctx.memory, "backward")
        value = ctx.memory.values()
        with torch.enable_grad():
            for view in ctx.views:
                value = view(value)
        tensors = ctx.memory.source.tensors
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, grads[0], retain_graph=True, allow_unused=True))
        return None, *(next(found) if tensor.requires_grad else None for tensor in tensors)


class LazyLogits(Tensor):
    """A tensor that is not there: logits ``(..., V)``, or what was asked of them, ``(..., V)`` or ``(...)``.

    Make one with `lazy_tensor`. What a view would share with it is in ``memory``; ``views`` lead from there
    to this tensor, and ``meta`` has its shape and strides. Of one that ``is_turned`` V is not the last of the
    dimensions but the second, as `cross_entropy` takes it; nothing else does.
    """

    memory: Memory
    rows: Tensor
    labels: Tensor | None
    views: tuple[Callable[[Tensor], Tensor], ...]
    meta: Tensor
    is_turned: bool

    @property
    def kind(self) -> str:
        return self.memory.kind

    @property
    def has_vocab(self) -> bool:
        return self.memory.has_vocab

    def of_memory(self, value: Tensor) -> Tensor:
        """The part of ``value``, a tensor of the memory's shape, that this tensor is."""
        for view in self.views:
            value = view(value)
        return value

    def real_values(self, func: Any = None) -> Tensor:
        """The values, a plain tensor. ``func``: who asks, for the warning."""
        if self.memory.real is None and self.has_vocab:
            _report(self.memory, func)
        return self.of_memory(self.memory.values())

    def kept_values(self, keep: Tensor) -> Tensor:
        """The values where ``keep``, a bool tensor of this shape, is True; anything elsewhere."""
        if self.numel() != self.memory.rows.numel():  # the memory has rows that this tensor has not
            return self.of_memory(self.memory.values())
        whole = torch.ones_like(self.memory.rows, dtype=torch.bool)
        self.of_memory(whole).copy_(keep)
        return self.of_memory(self.memory.values(whole))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PROPERTIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        operation = TABLE.get(func)
        if operation is not None and not _needs_real(func, (args, kwargs)):
            try:
                result = operation(func, *args, **kwargs)
            except TypeError:
                if _takes(operation, func, *args, **kwargs):
                    raise
                result = NotImplemented  # by one of torch's other names of an argument, or into `out`
            if result is not NotImplemented:
                return result
        return on_real(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return on_real(func, args, kwargs or {})  # of a call in C++, which no function announced


_ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_leaf", "is_sparse", "is_quantized"),
    *("is_nested", "is_cuda", "is_cpu", "is_meta", "is_xpu", "is_mps"),
)
_METHODS = (
    *(
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "__len__",
        "is_floating_point",
        "is_complex",
    ),
    *("is_contiguous", "element_size", "get_device", "is_inference"),
)
# What the wrapper itself can answer.
_PROPERTIES = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name) for name in _METHODS),
    *(torch.is_floating_point, torch.is_complex, torch.is_inference, torch.numel),
}


def lazy_tensor(
    memory: Memory,
    *,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
    views: tuple[Callable[[Tensor], Tensor], ...] = (),
    meta: Tensor | None = None,
    is_recorded: bool = True,
    is_turned: bool = False,
) -> LazyLogits:
    """A lazy tensor of all of ``memory``, or of the part that ``views`` lead to.

    ``is_recorded``: False where autograd is to see nothing of this view.
    """
    if memory.has_grad and not is_recorded:
        views = (*views, Tensor.detach)
    if rows is None:
        rows, labels = memory.rows, memory.labels
    if meta is None:
        meta = torch.empty(memory.shape, dtype=memory.dtype, device="meta")
    like = meta

    def make() -> LazyLogits:
        made: Any = Tensor._make_wrapper_subclass(
            LazyLogits,
            like.shape,
            strides=like.stride(),
            dtype=memory.dtype,
            device=memory.source.hidden.device,
            requires_grad=False,
        )
        made.memory, made.rows, made.labels, made.views = memory, rows, labels, views
        made.meta, made.is_turned = like, is_turned
        return made

    made: LazyLogits = (
        _InGraph.apply(make, *memory.source.tensors) if memory.has_grad and is_recorded else make()
    )
    return made


def records(x: Tensor) -> bool:
    """Whether autograd would record what is made of ``x`` now."""
    return torch.is_grad_enabled() and x.requires_grad


def _needs_real(func: Any, arguments: Any) -> bool:
    """Whether one of them has values already, which may have been changed in place since, or is turned."""
    found = [x for x in tree_leaves(arguments) if isinstance(x, LazyLogits)]
    takes_turned = func in (F.cross_entropy, F.nll_loss)
    return any(x.memory.real is not None or (x.is_turned and not takes_turned) for x in found)


def _takes(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(operation).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def on_real(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` of the real values of all lazy tensors among its arguments, in indices too."""

    def real(value: Any) -> Any:
        return value.real_values(func) if isinstance(value, LazyLogits) else value

    return func(*tree_map(real, args), **tree_map(real, kwargs))


def _report(memory: Memory, func: Any) -> None:
    """Say which operation makes real logits, and where the caller asks for it."""
    name = func if isinstance(func, str) else getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    file, line = (frame.f_code.co_filename, frame.f_lineno) if frame else ("<unknown>", 0)
    message = (
        f"logits: {name} at {file}:{line} needs the real values of lazy {memory.kind} of shape "
        f"{tuple(memory.shape)}"
    )
    lists = "docs/lazy.md lists what needs none"
    if memory.source.on_materialize == "error":
        raise MadeLogits(f"{message}, which on_materialize='error' does not make. {lists}")
    message = f"{message}, so they are made, as without fastdpo. {lists}"
    warnings.warn_explicit(message, UserWarning, file, line, registry=_SEEN)


def register(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put an operation into the table: it is called with the function of torch and its arguments."""

    def decorate(operation: Callable[..., Any]) -> Callable[..., Any]:
        TABLE.update(dict.fromkeys(functions, operation))
        return operation

    return decorate
