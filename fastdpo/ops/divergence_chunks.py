"""The chunk loops of ``token_divergence``: labelled rows in, divergences and gradients out, no autograd.

    h, h_teacher (C, H) --GEMMs--> x, x_teacher (C, V) --tiles of rows--> divergences, D --> D W (C, H)

As in ``chunked.py``, with a workspace for each head's logits and D in the place of the policy's. With one
divergence D needs no upstream gradient: modes ``stash`` and ``cache`` make it in the forward pass. Beside the
labels' log-probabilities they keep two: the divergence's and theirs. With several divergences D is that of
their combination, which only the backward pass knows: mode ``recompute``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.kernels.contract import RowOutputs
from fastdpo.kernels.divergence import (
    DIFFERENTIABLE,
    DIVERGENCES,
    TEMPORARIES,
    DivergenceKernel,
    DivergenceOutputs,
)
from fastdpo.kernels.matmul import SlabbedWeight, hidden_grad_into, logits_into
from fastdpo.ops.backends import load_divergence_kernel
from fastdpo.ops.checks import accumulation_dtype
from fastdpo.ops.chunked import add_groups, backward_stash, empty_kept
from fastdpo.ops.gradients import DGroup, Gradients, TokenGrads, row_coeff
from fastdpo.ops.head_call import HeadCall, empty_d, front_of_rows, row_buffer
from fastdpo.plan.plan import Plan
from fastdpo.plan.schedule import MIB

# A tile's tensor is no larger than this: on a CPU what caches and the allocator take well, on a GPU what
# fills it.
TILE_MIB = {"cpu": 4, "cuda": 32}


@dataclass(frozen=True, eq=False)
class DivergenceCall:
    """Everything that is the same for every chunk of one call."""

    policy: HeadCall
    teachers: tuple[HeadCall, ...]  # one or two; of the policy's plan
    coefficients: Tensor | None  # (2, N) in the accumulation dtype, with two teachers
    slopes: tuple[float, float]  # what of the teachers' distance is added to them
    names: tuple[str, ...]  # of DivergenceOutputs
    differentiable: tuple[str, ...]  # those of them that have a gradient, in the order of DIFFERENTIABLE
    jsd_beta: float

    @property
    def backend(self) -> str:
        """Of the divergence kernel."""
        return self.policy.backend

    @property
    def num_kept(self) -> int:
        """How many D's (or products of them) the mode keeps for the backward pass."""
        return num_kept(self.differentiable, self.policy.plan.mode)


def differentiable(names: tuple[str, ...], logps_requires_grad: bool) -> tuple[str, ...]:
    """Those of the names that have a gradient, in the order of ``DIFFERENTIABLE``."""
    wanted = DIFFERENTIABLE if logps_requires_grad else DIVERGENCES
    return tuple(name for name in wanted if name in names)


def num_kept(differentiable: tuple[str, ...], mode: str) -> int:
    """0, or 1 for the divergence and 1 for the log-probabilities beside it."""
    return (2 if "logps" in differentiable else 1) if mode in ("stash", "cache") else 0


def combined_rows(plan: Plan, operand_bytes: int) -> int:
    """Rows of two kept D's that are made one at a time: half of the workspace, with padding at most all."""
    size = max(2 * plan.vocab_size, plan.leading_dim) * operand_bytes
    return max(plan.workspace_bytes // size, 1)


def workspace_units(num_teachers: int, backend: str) -> int:
    """Buffers of a chunk's logits that a call takes: one for each head, one for plain torch's temporaries."""
    return num_teachers + (2 if backend == "reference" else 1)


def forward_divergences(call: DivergenceCall) -> tuple[DivergenceOutputs, Tensor]:
    """The compact outputs ``(N,)``, and what the mode keeps for the backward pass: as ``forward_chunks``, of
    two D's one behind the other, that of the log-probabilities second."""
    policy, plan = call.policy, call.policy.plan
    outputs = _empty_outputs(call, call.names)
    kept = empty_kept(policy, call.num_kept)
    parts = kept.unbind() if call.num_kept == 2 else (kept,)
    chunks = _DivergenceChunks(call)
    for start, stop in plan.chunks():
        d_out: tuple[Tensor, ...] = ()
        if plan.mode == "stash":
            d_out = chunks.d_in_place(stop - start, call.num_kept)
        elif stop <= plan.cached_rows:
            d_out = tuple(part[start:stop] for part in parts)
        chunks.process(start, stop, _rows_of(outputs, start, stop), d_out=d_out)
        if plan.mode == "stash":
            for part, d in zip(parts, d_out, strict=True):
                hidden_grad_into(part[start:stop], d, chunks.weight, plan.hidden_parts(stop - start))
    return outputs, kept


def backward_divergences(
    call: DivergenceCall,
    kept: Tensor,
    upstream: tuple[Tensor | None, ...],
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dhidden (M, H), dweight (V, H), dbias (V,))`` in their inputs' dtypes; None where not needed.

    Args:
        call: the call of the forward pass.
        kept: what that kept; read, never written.
        upstream: gradients ``(N,)`` of ``DIFFERENTIABLE``, in their order; None for none.
    """
    policy = call.policy
    weight = policy.slabbed_weight()
    total = Gradients(policy, weight, hidden=needs_hidden, bias=needs_bias, dweight=needs_weight)
    grads, coeffs = _token_grads(call, upstream)
    no_outputs = RowOutputs(grads.logps, grads.logps)  # looked at with gradients of lse only
    if policy.plan.mode == "stash" and coeffs is not None:
        for start, stop in policy.plan.chunks():
            dhidden = _combined(call, kept, coeffs, start, stop)
            total.put_hidden(start, stop, dhidden * row_coeff(policy, grads, start, stop)[:, None])
    elif policy.plan.mode == "stash":
        backward_stash(policy, kept, no_outputs, grads, total)
    else:
        add_groups(total, _d_groups(call, weight, kept, coeffs), no_outputs, grads)
    return total.results()


def _token_grads(
    call: DivergenceCall, upstream: tuple[Tensor | None, ...]
) -> tuple[TokenGrads, Tensor | None]:
    """What multiplies each row of D ``(N,)``, and the coefficients ``(4, N)`` that D is made with, if any.

    The size of a row's largest coefficient stays out of D, which is then of order 1 in 16 bits whatever the
    loss is scaled by; as a power of 2, so that nothing is rounded on its way out and in.
    """
    like = next(grad for grad in upstream if grad is not None)
    stacked = torch.stack([torch.zeros_like(like) if grad is None else grad for grad in upstream])
    if len(call.differentiable) == 1:
        return TokenGrads(stacked[DIFFERENTIABLE.index(call.differentiable[0])]), None
    exponent = torch.frexp(stacked.abs().amax(0)).exponent  # 0 of 0
    size = torch.ldexp(torch.ones_like(like), exponent)
    return TokenGrads(size), stacked / size


def _combined(call: DivergenceCall, kept: Tensor, coeffs: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``[start, stop)`` of two kept tensors as one, in fp32 or wider."""
    first, second = (coeffs[DIFFERENTIABLE.index(name), start:stop, None] for name in call.differentiable)
    return kept[0, start:stop] * first + kept[1, start:stop] * second


def _d_groups(
    call: DivergenceCall, weight: SlabbedWeight, kept: Tensor, coeffs: Tensor | None
) -> Iterator[DGroup]:
    """The rows in groups with their D: the cached ones first, then chunk by chunk what is recomputed."""
    plan = call.policy.plan
    if plan.cached_rows and coeffs is None:
        yield DGroup(0, plan.cached_rows, kept)
    elif plan.cached_rows and coeffs is not None:
        yield from _combined_groups(call, kept, coeffs)
    if plan.cached_rows == plan.num_tokens:
        return
    chunks = _DivergenceChunks(call, weight)
    scratch = _empty_outputs(call, call.differentiable)
    for start, stop in plan.chunks():
        if start < plan.cached_rows:
            continue
        d = chunks.d_in_place(stop - start, 1)
        part = None if coeffs is None else coeffs[:, start:stop]
        rows = chunks.process(start, stop, _rows_of(scratch, start, stop), d_out=d, grad_coeffs=part)
        yield DGroup(start, stop, d[0], rows)


def _combined_groups(call: DivergenceCall, kept: Tensor, coeffs: Tensor) -> Iterator[DGroup]:
    """The cached rows, of which two D's were kept, in groups of one."""
    policy, plan = call.policy, call.policy.plan
    step = combined_rows(plan, policy.operand_dtype.itemsize)
    whole = empty_d(policy, min(step, plan.cached_rows))
    tile = tile_rows(plan, policy.logits_dtype, policy.hidden.device)
    for start in range(0, plan.cached_rows, step):
        stop = min(start + step, plan.cached_rows)
        for first in range(start, stop, tile):
            last = min(first + tile, stop)
            whole[first - start : last - start] = _combined(call, kept, coeffs, first, last)
        yield DGroup(start, stop, whole[: stop - start])


def tile_rows(plan: Plan, logits_dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a tile: what is made beside a chunk's logits, tile by tile, takes no more than they do."""
    row_bytes = plan.vocab_size * logits_dtype.itemsize
    rows = TILE_MIB.get(device.type, 32) * MIB // row_bytes
    return max(min(plan.chunk_rows // TEMPORARIES, rows), 1)


class _DivergenceChunks:
    """The workspaces that every chunk goes through, one for each head."""

    def __init__(self, call: DivergenceCall, weight: SlabbedWeight | None = None) -> None:
        self.call = call
        self.weight = call.policy.slabbed_weight() if weight is None else weight
        plan = call.policy.plan
        heads = (call.policy, *call.teachers)
        self._logits = [row_buffer(head, plan.chunk_rows, dtype=head.logits_dtype) for head in heads]
        self._teacher_weights = [teacher.slabbed_weight() for teacher in call.teachers]
        self._kernel: DivergenceKernel = load_divergence_kernel(call.backend)
        # Plain torch makes tensors of a tile's size; the other kernels nothing beside the logits.
        self._tile_rows = plan.chunk_rows
        if call.backend == "reference":
            self._tile_rows = tile_rows(plan, call.policy.logits_dtype, call.policy.hidden.device)

    def d_in_place(self, num_rows: int, count: int) -> tuple[Tensor, ...]:
        """The place of one D, or of two, in the operands' dtype: the front of each row of the policy's
        logits; of two that is the second one's, and the first one's is the front of the teacher's."""
        logits = self._logits[:count][::-1]
        return tuple(front_of_rows(whole, num_rows, self.call.policy) for whole in logits)

    def process(
        self,
        start: int,
        stop: int,
        outputs: DivergenceOutputs,
        *,
        d_out: tuple[Tensor, ...] = (),
        grad_coeffs: Tensor | None = None,
    ) -> Tensor:
        """Labelled rows ``[start, stop)`` through products and row maths; returns the rows of hidden.

        ``d_out``: where D goes; of two the second is that of the log-probabilities.
        """
        call = self.call
        rows = call.policy.rows(start, stop)
        logits, *teachers = (whole[: stop - start, : call.policy.plan.vocab_size] for whole in self._logits)
        logits_into(logits, rows, self.weight)
        for head, weight, out in zip(call.teachers, self._teacher_weights, teachers, strict=True):
            logits_into(out, head.rows(start, stop), weight)
        for first in range(0, stop - start, self._tile_rows):
            last = min(first + self._tile_rows, stop - start)
            tile = slice(start + first, start + last)
            d, logps_d = (*(out[first:last] for out in d_out), None, None)[:2]
            self._kernel(
                logits[first:last],
                tuple(out[first:last] for out in teachers),
                call.policy.labels[tile],
                tuple(head.transform for head in (call.policy, *call.teachers)),
                _rows_of(outputs, first, last),
                coefficients=None if call.coefficients is None else call.coefficients[:, tile].contiguous(),
                slopes=call.slopes,
                jsd_beta=call.jsd_beta,
                d_out=d,
                logps_d_out=logps_d,
                grad_coeffs=None if grad_coeffs is None else grad_coeffs[:, first:last].contiguous(),
            )
        return rows


def _empty_outputs(call: DivergenceCall, names: tuple[str, ...]) -> DivergenceOutputs:
    policy = call.policy
    dtype, size = accumulation_dtype(policy.compute_dtype), policy.plan.num_tokens
    return DivergenceOutputs(**{name: policy.hidden.new_empty(size, dtype=dtype) for name in names})


def _rows_of(outputs: DivergenceOutputs, start: int, stop: int) -> DivergenceOutputs:
    return DivergenceOutputs(*(None if out is None else out[start:stop] for out in outputs))
