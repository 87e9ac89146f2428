"""What a GPU of many sends in a step, by collective: arithmetic on the sizes of weights and of a batch.

A step is one micro-batch's forward and backward pass and the optimiser's step. Bytes sent are those of the
ring: of a tensor that n ranks gather, or reduce and scatter, each sends (n - 1) / n; of one that they all
reduce, twice as much. What takes some bytes (norms, counts, losses) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastdpo.plan.machines import Step, Weight, copied, unit_bytes
from fastdpo.plan.traffic import HeadTraffic, head_traffic

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")


class Transfer(NamedTuple):
    """One kind of exchange in a step.

    Args:
        of: ``backbone`` or ``head``; tied embeddings are of the head.
        size: bytes of the whole tensors, of all calls.
        ranks: that have it among them.
    """

    of: str
    collective: str
    size: int
    ranks: int

    @property
    def sent(self) -> int:
        """Bytes that one rank sends."""
        turns = 2 if self.collective == "all-reduce" else 1
        return turns * self.size * (self.ranks - 1) // self.ranks


def step_transfers(weights: Sequence[Weight], step: Step) -> list[Transfer]:
    """All exchanges of a step that are of any size; none of one GPU."""
    of_batch = _of_tensors(weights, step) if step.tp_size > 1 else iter(())
    of_weights: Iterator[Transfer] = iter(())
    if step.ranks > 1:
        engines = {"ddp": _of_ddp, "zero1": _of_zero, "zero2": _of_zero, "zero3": _of_zero3}
        of_weights = engines.get(step.engine, _of_units)(weights, step)
    return [transfer for transfer in (*of_batch, *of_weights) if transfer.size and transfer.ranks > 1]


def head_choice(weights: Sequence[Weight], step: Step) -> HeadTraffic:
    """Both ways of a head in a unit of FSDP2's of its own."""
    (head,) = (w for w in weights if w.unit == "head" and len(w.shape) == 2)
    return head_traffic(
        *(step.labelled, head.shape[1], head.shape[0], step.shards),
        weight_bytes=step.compute_bytes if step.casts_units else head.itemsize,
        states_bytes=step.compute_bytes,
        grad_bytes=4 if step.casts_units else head.itemsize,
        needs_weight=head.is_trained,
    )


def moves_states(weights: Sequence[Weight], step: Step) -> bool:
    """Whether the loop leaves the head where it is, and moves the ranks' hidden states.

    It may where the head is alone in a unit of FSDP2's. accelerate joins the last norm to it, and tied
    embeddings, but of a model with an adapter not the norm.
    """
    is_alone = sum(w.unit == "head" for w in weights) == 1 and any(w.unit == "embeddings" for w in weights)
    has_adapter = not all(w.is_trained for w in weights)
    if step.engine != "fsdp2" or step.shards == 1 or not (is_alone and has_adapter):
        return False
    return head_choice(weights, step).choice == "states"


def _halves(weights: Sequence[Weight]) -> Iterator[tuple[str, list[Weight]]]:
    yield "backbone", [w for w in weights if w.unit != "head"]
    yield "head", [w for w in weights if w.unit == "head"]


def _of_ddp(weights: Sequence[Weight], step: Step) -> Iterator[Transfer]:
    for of, its in _halves(weights):
        size = sum(w.size * w.itemsize for w in its if w.is_trained)
        yield Transfer(of, "all-reduce", size, step.ranks)


def _of_zero(weights: Sequence[Weight], step: Step) -> Iterator[Transfer]:
    """DeepSpeed reduces gradients to all, and gathers what each rank has stepped."""
    for of, its in _halves(weights):
        size = sum(w.size for w in its if w.is_trained) * step.compute_bytes
        yield Transfer(of, "all-reduce", size, step.ranks)
        yield Transfer(of, "all-gather", size, step.ranks)


def _of_zero3(weights: Sequence[Weight], step: Step) -> Iterator[Transfer]:
    """Each pass gathers its weights; small ones, which stay whole, once they have been stepped."""
    second = _of_reference(weights, step)
    for of, its in _halves(weights):
        gathered = 0
        for w in its:
            size = _padded(w, step.ranks)
            if w.size >= step.persistent:
                # Nothing of the embeddings is needed backward but where they are trained.
                gathered += size * (1 + (w.is_trained or w.unit != "embeddings") + (w in second))
            else:
                gathered += size * w.is_trained
        reduced = sum(_padded(w, step.ranks) for w in its if w.is_trained)
        yield Transfer(of, "all-gather", gathered * step.compute_bytes, step.ranks)
        yield Transfer(of, "reduce-scatter", reduced * step.compute_bytes, step.ranks)


def _of_reference(weights: Sequence[Weight], step: Step) -> list[Weight]:
    """What its forward pass takes: of a copy, or the policy's own with the adapter switched off."""
    return copied(weights) if step.reference in ("copy", "adapter") else []


def _padded(weight: Weight, ranks: int) -> int:
    return -(-weight.size // ranks) * ranks


def _of_units(weights: Sequence[Weight], step: Step) -> Iterator[Transfer]:
    """FSDP2: units are gathered for each pass; those that are kept for the backward pass once for both.

    Copies of the model reduce each rank's part of the gradients once more, among themselves.
    """
    ranks = step.shards
    moves = moves_states(weights, step)
    for of, its in _halves(weights):
        if of == "head" and moves:
            yield from _of_states(weights, step)
            continue
        itemsize = step.compute_bytes if step.casts_units else None
        sizes = unit_bytes(its, ranks, itemsize)
        gathered = sum(size * (1 if unit in ("head", "kept") else 2) for unit, size in sizes.items())
        # The reference's pass: of a copy's own units, or of the policy's, whose rest is there then.
        second = unit_bytes(copied(its) if step.reference == "copy" else its, ranks, itemsize)
        if step.reference == "adapter":
            second.pop("kept", None)
        gathered += sum(second.values()) if step.reference in ("copy", "adapter") else 0
        reduced = unit_bytes((w for w in its if w.is_trained), ranks, 4 if step.casts_units else None)
        yield Transfer(of, "all-gather", gathered, ranks)
        yield Transfer(of, "reduce-scatter", sum(reduced.values()), ranks)
        yield Transfer(of, "all-reduce", sum(reduced.values()) // ranks, step.replicas)


def _of_states(weights: Sequence[Weight], step: Step) -> Iterator[Transfer]:
    """The hidden states of all ranks' labelled tokens, their numbers, and their gradients back."""
    ranks, rows = step.shards, step.labelled * step.shards
    (head,) = (w for w in weights if w.unit == "head")
    states = rows * head.shape[1] * step.compute_bytes
    passes = 1 + (step.reference == "adapter")
    # Labels and places; of every part three numbers, and of the policy three more for the metrics of a loss;
    # gradients of three.
    numbers = rows * (passes * (16 + ranks * 12) + ranks * 12 + 12)
    yield Transfer("head", "all-gather", passes * states + numbers, ranks)
    yield Transfer("head", "reduce-scatter", states, ranks)
    if step.reference == "copy":  # its tail, with the norm, is gathered
        size = unit_bytes([head], ranks, step.compute_bytes if step.casts_units else None)["head"]
        yield Transfer("head", "all-gather", size, ranks)


def _of_tensors(weights: Sequence[Weight], step: Step) -> Iterator[Transfer]:
    """Of each layer outputs summed forward, and gradients of inputs backward; of the head three numbers."""
    has_reference = step.reference in ("copy", "adapter")
    size = 0
    for w in weights:
        if w.is_summed_forward:
            again = step.is_checkpointed and w.unit not in ("embeddings", "head")
            size += w.exchange * (1 + again + has_reference)
        else:
            size += w.exchange
    yield Transfer("backbone", "all-reduce", size * step.tokens * step.compute_bytes, step.tp_size)
    rows = step.labelled * (1 + has_reference)
    yield Transfer("head", "all-gather", rows * 12 * step.tp_size, step.tp_size)
    yield Transfer("head", "all-reduce", step.labelled * step.hidden_size * step.compute_bytes, step.tp_size)
