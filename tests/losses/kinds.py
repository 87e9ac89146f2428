"""Random batches of the kinds beside pairs, for the battery of test_kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.losses import (
    LOSSES,
    DivergencePairLogps,
    ListLogps,
    LossSpec,
    PairLogps,
    StepLogps,
    TokenDivergences,
    TokenLogps,
    UnpairedLogps,
)

OTHER_KINDS = sorted(name for name, spec in LOSSES.items() if spec.inputs is not PairLogps)
ROWS = 4
# The one differentiable tensor of each (a divergence pair has more: see its own tests).
LEAF = {
    ListLogps: "logps",
    UnpairedLogps: "logps",
    StepLogps: "logps",
    DivergencePairLogps: "chosen",
    TokenLogps: "logps",
    TokenDivergences: "divergences",
}
SIZES = (3, 1, 4, 2)  # candidates of each group, or tokens of each sequence


def random_batch(spec: LossSpec, *, seed: int = 0, scale: float = 8.0) -> Any:
    """Four rows in fp64; scores are distinct but for two equal ones in the third group."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, factor: float = scale, offset: float = 0.0) -> Tensor:
        return factor * torch.randn(size, generator=generator, dtype=torch.float64) + offset

    def counts(size: int) -> Tensor:
        return torch.randint(1, 20, (size,), generator=generator).double()

    if spec.inputs is ListLogps:
        sizes = (3,) * ROWS if spec.name == "wrpo" else SIZES
        ids = torch.arange(ROWS).repeat_interleave(torch.tensor(sizes))
        shuffled = torch.randperm(len(ids), generator=generator)
        ref = draw(len(ids), 10.0, -60.0)
        scores = draw(len(ids), 1.0)
        scores = scores.abs() if "scores" in spec.ranges else scores
        if spec.name == "trpa":
            # Three levels; the group of four has some of each, the group of one has one.
            scores = -torch.tensor([2, 1, 3, 1, 1, 3, 2, 2, 2, 3]).double()[shuffled]
        return ListLogps(
            (ref + draw(len(ids)))[shuffled],
            counts(len(ids)),
            ids[shuffled],
            scores if "scores" in spec.needs else None,
            ref[shuffled] if spec.uses_reference else None,
        )
    ref = draw(ROWS, 10.0, -60.0)
    logps = ref + draw(ROWS)
    if spec.inputs is UnpairedLogps:
        point = torch.tensor(0.4, dtype=torch.float64)
        extras = {name: point for name in spec.needs}
        desirable = torch.tensor([True, False, True, False])
        reference = ref if spec.uses_reference else None
        return UnpairedLogps(logps, desirable, counts(ROWS), reference, **extras)
    if spec.inputs is StepLogps:
        return StepLogps(logps, draw(ROWS, 0.1), counts(ROWS), ref)
    if spec.inputs is DivergencePairLogps:
        return DivergencePairLogps(
            logps, ref + draw(ROWS), counts(ROWS), counts(ROWS), ref, ref + draw(ROWS),
            chosen_kl=draw(ROWS).abs(), rejected_kl=draw(ROWS).abs(),
        )  # fmt: skip
    mask = torch.arange(5) < torch.tensor(SIZES)[:, None]
    tokens = -draw(20, 2.0).abs().view(4, 5)
    if spec.inputs is TokenLogps:
        win_rates = torch.tensor([0.9, 0.2, 0.5, 0.7], dtype=torch.float64)
        return TokenLogps(tokens, mask, None, tokens + draw(20, 1.0).view(4, 5), win_rates)
    assert spec.inputs is TokenDivergences
    distance = draw(20, 0.5).abs().view(4, 5) if spec.uses_reference else None
    logps = {name: -draw(20, 2.0).abs().view(4, 5) for name in spec.needs}
    return TokenDivergences(-tokens, mask, l1_distance=distance, **logps)


def with_leaf(batch: Any, values: Tensor) -> Any:
    return replace(batch, **{LEAF[type(batch)]: values})


def leaf(batch: Any) -> Tensor:
    value: Tensor = getattr(batch, LEAF[type(batch)])
    return value


def one_row(batch: Any, i: int) -> Any:
    """Row i alone."""
    if isinstance(batch, ListLogps):
        keep = batch.group_ids == i
        fields = {name: getattr(batch, name) for name in ("logps", "tokens", "scores", "ref_logps")}
        rows = {name: None if value is None else value[keep] for name, value in fields.items()}
        return ListLogps(group_ids=torch.zeros(int(keep.sum()), dtype=torch.int64), **rows)
    per_row = {
        name: value[i : i + 1]
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    return replace(batch, **per_row)


def padded(batch: Any) -> Any:
    """With two rows more that have no tokens."""
    if isinstance(batch, ListLogps):
        rows: dict[str, Any] = {
            name: None if value is None else torch.cat([value, torch.zeros(3, dtype=torch.float64)])
            for name, value in (
                ("logps", batch.logps),
                ("tokens", batch.tokens),
                ("scores", batch.scores),
                ("ref_logps", batch.ref_logps),
            )
        }
        ids = torch.cat([batch.group_ids, torch.full((3,), ROWS)])
        return ListLogps(group_ids=ids, num_groups=None, **rows)
    grown = {
        name: torch.cat([value, value.new_zeros(2, *value.shape[1:])])
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    return replace(batch, **grown)
