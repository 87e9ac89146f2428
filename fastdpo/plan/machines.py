"""What a GPU of many holds in a step under each engine, but for activations and the head: arithmetic.

What it sends is in `machine_traffic`; both are held to what ranks on CPUs count (`tests/distributed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# `tp`: tensors of every layer over `tp_size` ranks, and FSDP2 over the others.
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "tp")
REFERENCES = ("none", "copy", "adapter", "precomputed")
# DeepSpeed's defaults, in elements: smaller weights stay whole under ZeRO-3; a bucket of gradients; what is
# gathered at once under ZeRO-3.
PERSISTENT, BUCKET, LIVE = 10**5, 5 * 10**8, 10**9
_MOMENTS = 2  # Adam's
_NUMBER = 4  # bytes of fp32


class Weight(NamedTuple):
    """One parameter as a rank of tensor parallelism has it: all of it elsewhere.

    Args:
        shape: of which FSDP2 divides the first size.
        itemsize: bytes of an element as it is kept.
        unit: what FSDP2 gathers at once: ``embeddings``, ``head``, ``kept`` (the rest outside of the
            layers), or a layer's name. Tied embeddings are of the head.
        exchange: features a token of what its layer exchanges under tensor parallelism; 0 for nothing.
        is_summed_forward: whether its output is what is exchanged, or its input's gradient.
    """

    shape: tuple[int, ...]
    itemsize: int
    is_trained: bool
    unit: str
    exchange: int = 0
    is_summed_forward: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def part(self, ranks: int) -> int:
        """Elements of a rank's part under FSDP2: rows, as many on each, padded."""
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:]) if self.shape else 1


@dataclass(frozen=True)
class Step:
    """How a step runs.

    Args:
        num_gpus, tp_size: in all, and of those the ones that share the tensors of each layer.
        replicas: copies of a model that FSDP2 splits (HSDP), each over as many GPUs.
        compute_bytes: of an element of activations: 2 in bf16, 4 in fp32.
        tokens, labelled: of a micro-batch: positions of the backbone, and tokens of answers.
        hidden_size: H.
        is_mixed: whether weights are kept in another dtype than they compute in.
        is_checkpointed: whether layers run once more in the backward pass.
        persistent: elements from which on ZeRO-3 splits a weight for good.
    """

    engine: str
    num_gpus: int
    tp_size: int = 1
    replicas: int = 1
    compute_bytes: int = 2
    reference: str = "none"
    tokens: int = 0
    labelled: int = 0
    hidden_size: int = 1
    is_mixed: bool = True
    is_checkpointed: bool = False
    persistent: int = PERSISTENT

    @property
    def ranks(self) -> int:
        """Those with batches of their own."""
        return self.num_gpus // self.tp_size

    @property
    def shards(self) -> int:
        """Ranks that FSDP2 splits the model over."""
        return self.ranks // self.replicas

    @property
    def casts_units(self) -> bool:
        """Whether FSDP2 gathers in the dtype of activations and reduces in fp32; else as weights are kept.

        transformers, which splits a model under ``tp``, gives its units no dtypes.
        """
        return self.engine == "fsdp2" and self.is_mixed

    @property
    def is_zero(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def has_units(self) -> bool:
        return self.engine in ("fsdp2", "tp")


def held_bytes(weights: Sequence[Weight], step: Step, *, gathers_head: bool = True) -> dict[str, int]:
    """Bytes on one GPU of weights, gradients, the optimiser (Adam), a reference, and what engines add.

    Args:
        gathers_head: whether FSDP2's unit of the head is ever whole.
    """
    trained = [w for w in weights if w.is_trained]
    if step.is_zero:
        found = _held_by_zero(weights, trained, step)
    else:
        parts = step.shards if step.has_units else 1
        found = {"weights": sum(w.part(parts) * w.itemsize for w in weights)}
        found["gradients"] = sum(w.part(parts) * w.itemsize for w in trained)
        found["optimizer"] = _MOMENTS * found["gradients"]
        found["reference"] = sum(w.part(parts) * w.itemsize for w in copied(weights))
        if step.tp_size > 1 and parts == 1:  # of the embeddings' rows each rank has all gradients
            words = sum(w.size * w.itemsize for w in trained if w.unit == "embeddings" and w.exchange)
            found["gradients"] += (step.tp_size - 1) * words
    if step.reference != "copy":
        found["reference"] = 0
    gathered = [w for w in weights if gathers_head or w.unit != "head"]
    found["engine"] = _added_by_engine(gathered, trained, step)
    return found


def copied(weights: Sequence[Weight]) -> list[Weight]:
    """What a copy of the model as reference has: all but adapters."""
    frozen = [w for w in weights if not w.is_trained]
    return frozen or list(weights)


def _held_by_zero(weights: Sequence[Weight], trained: Sequence[Weight], step: Step) -> dict[str, int]:
    """fp32 copies of what is trained, and the moments, are split; gradients from 2, weights from 3 on."""
    ranks, size = step.ranks, step.compute_bytes
    own = {stage: step.engine == f"zero{stage}" for stage in (1, 2, 3)}
    parts = -(-sum(w.size for w in trained) // ranks)
    others = copied(weights)
    return {
        "weights": sum(-(-w.size // (ranks if own[3] else 1)) for w in weights) * size,
        "gradients": (sum(w.size for w in trained) if own[1] else parts) * size,
        "optimizer": parts * (1 + _MOMENTS) * _NUMBER,
        # A reference is no model of DeepSpeed's but under ZeRO-3, and stays as it was loaded.
        "reference": sum(-(-w.size // ranks) * size if own[3] else w.size * w.itemsize for w in others),
    }


def _added_by_engine(weights: Sequence[Weight], trained: Sequence[Weight], step: Step) -> int:
    """Whole weights and gradients for the moment, buckets, and autocast's copies in 16 bits."""
    if step.is_zero:
        bucket = min(BUCKET, sum(w.size for w in trained)) * step.compute_bytes
        if step.engine != "zero3":
            return bucket
        small = sum(w.size for w in weights if w.size < step.persistent)
        return bucket + (small + min(LIVE, sum(w.size for w in weights) - small)) * step.compute_bytes
    copies = sum(w.size for w in weights if w.itemsize > step.compute_bytes) * step.compute_bytes
    if step.engine == "ddp":  # gradients once more, in the buckets that are reduced
        buckets = sum(w.size * w.itemsize for w in trained) if step.ranks > 1 else 0
        return copies + buckets
    units = unit_bytes(weights, step.shards, step.compute_bytes if step.casts_units else None)
    others = sorted((size for name, size in units.items() if name not in ("head", "kept")), reverse=True)
    kept = sum(size for name, size in units.items() if name in ("head", "kept"))
    # One unit runs, and the next is on its way; gradients of one are made whole, and reduced in fp32.
    reduced = unit_bytes(trained, step.shards, _NUMBER if step.casts_units else None)
    gathered = kept + sum(others[:2]) + 2 * max(reduced.values(), default=0)
    return (gathered if step.shards > 1 else 0) + (copies if step.engine == "tp" else 0)


def unit_bytes(weights: Iterable[Weight], ranks: int, itemsize: int | None) -> dict[str, int]:
    """Bytes of whole units of FSDP2, padding included; ``itemsize`` None: as weights are kept."""
    found: dict[str, int] = {}
    for w in weights:
        size = w.part(ranks) * ranks * (w.itemsize if itemsize is None else itemsize)
        found[w.unit] = found.get(w.unit, 0) + size
    return found
