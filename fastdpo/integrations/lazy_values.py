"""What a lazy tensor stands for, and its values: hidden states, a head, and rows of them.

`Source` is what was there when the model ran. A `Memory` is one quantity of the distribution over the
vocabulary (its kind) for some rows of the hidden states; its values are made by the fused op where no V is in
their shape, and for chosen rows alone where a mask says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastdpo.ops.linear_logprob import linear_logprob
from fastdpo.ops.vocab_parallel import sharded_mean_logit
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


@dataclass(frozen=True, eq=False)
class Source:
    """Hidden states ``(M, H)`` and the head that were there when the model ran.

    Args:
        head: its scale and cap are not used: the model's own code applies them to the lazy tensor.
        compute_dtype: of the product, where autocast was on; None: that of ``hidden``.
        on_materialize: ``"warn"`` or ``"error"``.
        own: the head's own forward, which makes the logits of a vocabulary that is split over ranks.
    """

    hidden: Tensor
    head: LMHead
    execution: Execution
    compute_dtype: torch.dtype | None
    on_materialize: str
    own: Callable[[Tensor], Tensor] | None = None
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
        shard = self.head.vocab_parallel
        return self.head.weight.shape[0] if shard is None else shard.vocab_size

    @property
    def is_shard(self) -> bool:
        """Whether each rank has a part of the vocabulary."""
        return self.head.vocab_parallel is not None

    @property
    def is_split(self) -> bool:
        """Whether the weights are elsewhere but in calls of the head."""
        return False

    def within(self, run: Callable[[Source], Tensor]) -> Tensor:
        """``run`` of a source whose head can be read: this one."""
        return run(self)

    def take_hook(self, hook: Callable[[Tensor], Any]) -> RemovableHandle | None:
        """An engine's hook on a lazy tensor, where it will be one of all that is made of it."""
        return None

    def agree(self, what: str, is_needed: bool) -> bool:
        """Whether this process is to look at ``what``; it is alone with its head."""
        return is_needed

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
        if head.vocab_parallel is not None:
            assert self.own is not None
            return self.own(states.to(dtype))
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

    @property
    def has_mean(self) -> bool:
        """Whether the mean over the vocabulary can be made, with a gradient."""
        return self.cap is None or not self.source.is_shard

    def values(self, keep: Tensor | None = None) -> Tensor:
        """Real values in the shape of ``rows`` (and V); 0 where the bool tensor ``keep`` is False."""
        if keep is None:
            if self.real is None:
                self.source.agree(f"{self.kind} of all rows", True)
                with torch.set_grad_enabled(self.has_grad):
                    made = self._made(self.rows.flatten(), self._flat_labels())
                    self.real = made.view(self.shape)
            return self.real
        if self.real is not None:
            return self.real
        is_new = self.known is None or bool((keep & ~self.known[0]).any())
        if not self.source.agree(f"{self.kind} of some rows", is_new) and self.known is not None:
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
        return self.looked_at(lambda memory: memory._of_whole(rows, labels))

    def looked_at(self, run: Callable[[Memory], Tensor]) -> Tensor:
        """``run`` of this memory where the weights of its head can be read."""
        self.source.check_unchanged()
        # Casts, as gradients, are those of when it was asked for, not of where it is looked at first.
        with torch.autocast(self.source.hidden.device.type, enabled=False):
            return self.source.within(lambda source: run(replace(self, source=source)))

    def _of_whole(self, rows: Tensor, labels: Tensor | None) -> Tensor:
        if self.kind == "argmax":
            return self._argmax(rows)
        values = self._of_vocab(rows) if self.has_vocab else self._statistic(rows, labels)
        return (values if self.factor == 1.0 else values * self.factor).to(self.dtype)

    def transformed(self, rows: Tensor) -> Tensor:
        """``(N, V)``: logits as the model makes them, scaled and capped."""
        logits = self.source.logits(rows)
        # The model's own logits, to the bit, where nothing was done to them.
        logits = logits.to(self.dtype) if self.dtype.is_floating_point else logits
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _of_vocab(self, rows: Tensor) -> Tensor:
        logits = self.transformed(rows)
        if self.kind == "logits":
            return logits
        logprobs = logits.log_softmax(-1)
        if self.kind == "logprobs":
            return logprobs
        probs = logprobs.exp()
        return probs if self.kind == "probs" else probs * (logprobs if self.kind == "p_logp" else logits)

    def in_pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows ``(N,)`` by as many as the workspace holds the logits of."""
        size = max(1, (self.source.execution.workspace_mib << 20) // (4 * self.source.vocab_size))
        return rows.split(size)

    def _argmax(self, rows: Tensor) -> Tensor:
        return torch.cat([self.transformed(some).argmax(-1) for some in self.in_pieces(rows)])

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
        if "mean_logit" in names:
            mean, names = self._mean_logit(rows), names[:-1]
            if not names:
                return mean
        out = self.statistics(rows, labels, names)
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
        """No product: each row of the hidden states times its label's row of the head, in fp32.

        Of a vocabulary that is split over ranks the op's, which asks who has the label.
        """
        if self.source.head.vocab_parallel is not None:
            found = self.statistics(rows, labels, ["lse"])
            logit: Tensor = found.logps + found.lse
            return logit
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

    def _mean_logit(self, rows: Tensor) -> Tensor:
        """The product with the mean weight, for which no row is projected; of a cap or LoRA the op's."""
        head = self.source.head
        if self.cap is not None or head.adapter is not None:
            mean: Tensor = _MeanLogit.apply(self, rows, *self.source.tensors)
            return mean
        dtype = torch.promote_types(self.source.hidden.dtype, torch.float32)
        states = self.source.hidden.index_select(0, rows).to(dtype)
        if head.vocab_parallel is not None:
            return sharded_mean_logit(states, head) * self.scale
        mean = states @ head.weight.mean(0, dtype=dtype)
        return (mean if head.bias is None else mean + head.bias.mean(dtype=dtype)) * self.scale


class _MeanLogit(torch.autograd.Function):
    """The op's mean logit; its gradient, where it is asked for, makes some rows of logits after the other."""

    @staticmethod
    def forward(ctx: Any, memory: Memory, rows: Tensor, *tensors: Tensor) -> Tensor:
        ctx.memory, ctx.rows = memory, rows
        mean: Tensor = memory.statistics(rows, None, ["mean_logit"]).mean_logit
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        memory: Memory = ctx.memory
        memory.source.check_unchanged()
        tensors = memory.source.tensors
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        sums = [torch.zeros_like(tensor) for tensor in wanted]
        pieces = memory.in_pieces(ctx.rows)
        for rows, part in zip(pieces, grad.split([len(rows) for rows in pieces]), strict=True):
            with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
                mean = memory.transformed(rows).to(grad.dtype).mean(-1)
            for total, found in zip(sums, torch.autograd.grad(mean, wanted, part), strict=True):
                total += found
        made = iter(sums)
        return None, None, *(next(made) if tensor.requires_grad else None for tensor in tensors)
