"""K references through `fused_dpo_loss` and `dpo_loss_from_logps`: one is made of them, in every mode."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo import PackedLayout, TokenLayout, fused_dpo_loss
from fastdpo.functional.pairs import dpo_loss_from_logps, shift_labels
from fastdpo.losses import ReferenceCombination
from fastdpo.losses.reference_combination import COMBINATIONS
from fastdpo.types import LinearLogprobOutput
from tests.functional.batch_cases import dense_token_logps, make_batch
from tests.functional.pair_cases import (  # noqa: F401  (a fixture)
    IGNORED,
    LENGTHS,
    gradients,
    make_pairs,
    mode,
    tiny_budgets,
)

K, P = 3, len(LENGTHS)
COUNTS = torch.tensor(LENGTHS, dtype=torch.float64).t()  # (2, P)
WEIGHTS = (0.2, 0.5, 0.3)
WAYS: list[ReferenceCombination] = [
    ReferenceCombination("harmonic"),
    ReferenceCombination("harmonic", weights=WEIGHTS),
    ReferenceCombination("geometric", weights=WEIGHTS),
    ReferenceCombination("mrpo"),
    ReferenceCombination("mrpo", weights=WEIGHTS, eta=0.02),
    ReferenceCombination("mrpo", clip=False),
    ReferenceCombination("max_margin"),
    ReferenceCombination("max_margin", clip=False),
    ReferenceCombination("mean"),
    ReferenceCombination("mean", weights=WEIGHTS, clip=False),
]


def way_id(way: ReferenceCombination) -> str:
    options = {key: value for key, value in vars(way).items() if key != "name" and value is not None}
    return f"{way.name}-{'-'.join(options)}" if options else way.name


def references(seed: int = 5) -> Tensor:
    """``(K, 2P, T)`` log-probabilities per token, 0 where nothing is predicted."""
    targets = shift_labels(make_pairs().labels)
    generator = torch.Generator().manual_seed(seed)
    logps = -2 * torch.rand(K, *targets.shape, generator=generator, dtype=torch.float64)
    return logps * (targets != IGNORED)


def composed(way: ReferenceCombination, sums: list[list[list[float]]], counts: Any = COUNTS) -> Tensor:
    """``(2P,)`` from the papers, pair by pair, in probabilities; ``sums``: of reference, side and pair."""
    found: list[list[float]] = [[], []]
    for pair in range(len(sums[0][0])):
        sides = [torch.tensor([one[side][pair] for one in sums], dtype=torch.float64) for side in (0, 1)]
        weights = torch.full((len(sums),), 1 / len(sums), dtype=torch.float64)
        if way.weights is not None:
            weights = torch.as_tensor(way.weights, dtype=torch.float64)
        if way.name == "mrpo":
            gaps = (sides[0] - sides[1]).abs()
            if way.weights is None and gaps.sum() > 0:
                weights = gaps / gaps.sum()
            sizes = [side.mean().abs() for side in sides]
            eta = 0.1 if way.eta is None else way.eta
            if way.clip is not False and sum(sizes) > 0:
                shares = [eta * size / sum(sizes) for size in sizes]
                sides = [s.clamp((1 + e) * s[0], (1 - e) * s[0]) for s, e in zip(sides, shares, strict=True)]
        for side, sums_of_side in enumerate(sides):
            count = max(float(counts[side][pair]), 1.0)
            means = sums_of_side / count
            if way.name in ("max_margin", "mean") and way.clip is not False:
                means = means.clamp(min=means[0]) if side == 0 else means.clamp(max=means[0])
            if way.name in ("harmonic", "mrpo"):
                value = -(weights / sums_of_side.exp()).sum().log()
            elif way.name == "geometric":
                value = (weights * sums_of_side).sum()
            elif way.name == "mean":
                value = count * (weights * means).sum()
            else:
                value = count * means[(means.exp() - means[0].exp()).abs().argmax()]
            found[side].append(float(value))
    return torch.tensor(found[0] + found[1], dtype=torch.float64)


def lists(sums: Tensor) -> list[list[list[float]]]:
    found: list[list[list[float]]] = sums.view(len(sums), 2, -1).tolist()
    return found


@pytest.mark.usefixtures("tiny_budgets")
@pytest.mark.parametrize("way", WAYS, ids=way_id)
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_every_mode_sees_the_reference_composed_by_hand(way: ReferenceCombination, loss_type: str) -> None:
    pairs, per_token = make_pairs(torch.float64), references()
    sums = per_token.sum(-1)
    by_hand = composed(way, lists(sums))
    want_out, want = gradients(pairs, mode("cache"), loss_type=loss_type, ref_logps=by_hand)
    trained = sums.clone().requires_grad_()
    # One reference is made of them before a mode is chosen: each mode, and each way to give them.
    for name, given in (("cache", sums), ("recompute", trained), ("pairs", per_token), ("pairs", trained)):
        kwargs = {"ref_logps": given, "ref_combination": way, "loss_type": loss_type}
        out, got = gradients(pairs, mode(name), **kwargs)
        torch.testing.assert_close(out.loss, want_out.loss)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert out.ref_chosen_logps is not None and out.ref_rejected_logps is not None
        returned = torch.cat([out.ref_chosen_logps, out.ref_rejected_logps])
        torch.testing.assert_close(returned, by_hand)
        assert not returned.requires_grad
        torch.testing.assert_close(out.chosen_rewards, want_out.chosen_rewards)
    differs = gradients(pairs, mode("cache"), loss_type=loss_type, ref_logps=sums[0])[0]
    assert (differs.loss - want_out.loss).abs() > 1e-6


@pytest.mark.usefixtures("tiny_budgets")
@pytest.mark.parametrize("way", ["harmonic", "mrpo", "max_margin"])
def test_token_weights_hold_for_every_reference(way: str) -> None:
    """Weighted sums become one; the per-token means are over the number of tokens, as everywhere."""
    pairs, per_token = make_pairs(torch.float64), references()
    weights = torch.rand(pairs.labels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    aligned = torch.nn.functional.pad(weights[:, 1:], (0, 1))
    by_hand = composed(ReferenceCombination(way), lists((per_token * aligned).sum(-1)))
    for name in ("cache", "pairs"):
        out = gradients(pairs, mode(name), ref_logps=per_token, ref_combination=way, token_weights=weights)[0]
        returned = torch.cat([out.ref_chosen_logps, out.ref_rejected_logps])  # type: ignore[list-item]
        torch.testing.assert_close(returned, by_hand)


def test_every_layout() -> None:
    batch = make_batch(torch.float64)
    token, mask = dense_token_logps(batch.ref_hidden, batch.ref_weight, batch.labels)
    second, _ = dense_token_logps(batch.hidden, batch.ref_weight, batch.labels)
    aligned = torch.stack([torch.nn.functional.pad(one, (0, 1), value=9.0) for one in (token, second)])
    aligned[:, shift_labels(batch.labels) == IGNORED] = float("nan")  # must not be looked at
    sums = torch.stack([token.sum(1), second.sum(1)])
    want = fused_dpo_loss(batch.hidden, batch.weight, batch.labels, ref_logps=sums, ref_combination="mrpo")
    assert want.loss.isfinite()

    packed = torch.stack([batch.packed(one) for one in aligned])
    hidden, labels = batch.packed(batch.hidden), batch.packed(batch.labels)
    for ref_logps in (sums, packed):
        out = fused_dpo_loss(
            hidden, batch.weight, labels, ref_logps=ref_logps, ref_combination="mrpo", layout=batch.layout
        )
        torch.testing.assert_close(out.loss, want.loss)
    rows, columns = mask.nonzero(as_tuple=True)
    layout = TokenLayout(rows * batch.labels.shape[1] + columns, batch.labels[:, 1:][mask], rows)
    for ref_logps in (sums, aligned[:, rows, columns]):
        out = fused_dpo_loss(
            batch.hidden, batch.weight, None, ref_logps=ref_logps, ref_combination="mrpo", layout=layout
        )
        torch.testing.assert_close(out.loss, want.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_references_that_are_one_are_that_one(dtype: torch.dtype) -> None:
    """K equal references, and a weight of 1: the single reference's loss, to the last bit."""
    batch = make_batch(dtype)
    one = fused_dpo_loss(
        batch.hidden, batch.weight, batch.labels, ref_hidden=batch.ref_hidden, ref_lm_head=batch.ref_weight
    )
    assert one.ref_chosen_logps is not None and one.ref_rejected_logps is not None
    sums = torch.cat([one.ref_chosen_logps, one.ref_rejected_logps])
    other = sums - 3
    cases: list[tuple[Tensor, str | ReferenceCombination]] = [
        *((sums.expand(count, -1), name) for name in COMBINATIONS for count in (1, 4)),
        (torch.stack([other, sums]), ReferenceCombination("harmonic", weights=(0, 1))),
        (torch.stack([other, sums]), ReferenceCombination("geometric", weights=torch.tensor([0.0, 1.0]))),
        (torch.stack([sums, other]), ReferenceCombination("mrpo", eta=0.0)),
    ]
    for ref_logps, way in cases:
        out = fused_dpo_loss(
            batch.hidden, batch.weight, batch.labels, ref_logps=ref_logps, ref_combination=way
        )
        assert torch.equal(out.loss, one.loss), way
        assert torch.equal(out.ref_chosen_logps, one.ref_chosen_logps), way  # type: ignore[arg-type]


def test_sums_and_tokens_of_the_same_shape_are_told_apart_by_the_option() -> None:
    """With 2P = T, ``(2P, T)`` is per token without the option, and 2P references with it."""
    square = torch.rand(4, 4, dtype=torch.float64).neg()
    token = LinearLogprobOutput(torch.rand(4, 4, dtype=torch.float64).neg())
    mask = torch.ones(4, 4, dtype=torch.bool)
    per_token = dpo_loss_from_logps(token, mask, ref_logps=square)
    torch.testing.assert_close(per_token.ref_chosen_logps, square.sum(1)[:2])
    sums = dpo_loss_from_logps(token, mask, ref_logps=square, ref_combination="geometric")
    torch.testing.assert_close(sums.ref_chosen_logps, square.mean(0)[:2])


def test_weights_per_pair() -> None:
    sums = references().sum(-1)
    weights = torch.rand(K, P, dtype=torch.float64)
    weights = weights / weights.sum(0)
    pairs = make_pairs(torch.float64)
    way = ReferenceCombination("geometric", weights=weights)
    out = gradients(pairs, mode("cache"), ref_logps=sums, ref_combination=way)[0]
    torch.testing.assert_close(out.ref_chosen_logps, (weights * sums[:, :P]).sum(0))
    torch.testing.assert_close(out.ref_rejected_logps, (weights * sums[:, P:]).sum(0))


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_nothing_waits_for_the_device(name: str, device: str) -> None:
    """Fake tensors have no values; weights are a list, or on the device already."""
    with FakeTensorMode():
        logps = torch.randn(4, 6, device=device)
        mask = torch.ones(4, 6, dtype=torch.bool, device=device)
        given: list[Any] = [None]
        if name != "max_margin":
            given += [[0.25, 0.75], torch.ones(2, device=device), torch.ones(2, 2, device=device)]
        for weights in given:
            way = ReferenceCombination(name, weights=weights)
            for ref_logps in (logps.new_zeros(2, 4), logps.new_zeros(2, 4, 6)):
                out = dpo_loss_from_logps(
                    LinearLogprobOutput(logps), mask, ref_logps=ref_logps, ref_combination=way
                )
                assert out.loss.device.type == device


def test_torch_compile_sees_one_graph() -> None:
    batch = make_batch()
    sums = -torch.rand(2, 6)
    way = ReferenceCombination("mrpo", weights=torch.tensor([0.25, 0.75]))

    def loss(hidden: Tensor, ref_logps: Tensor) -> Tensor:
        return fused_dpo_loss(
            hidden, batch.weight, batch.labels, ref_logps=ref_logps, ref_combination=way
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch.hidden, sums), loss(batch.hidden, sums))


def sums_of(*shape: int, **kwargs: Any) -> dict[str, Any]:
    return {"ref_logps": torch.zeros(shape), "ref_combination": "harmonic"} | kwargs


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        sums_of(3, 4, ref_combination=None),
        ValueError,
        "ref_logps: got shape (3, 4), wanted (4,) or (4, 6), or ref_combination to say how 3 references",
    ),
    (sums_of(3, 4, 6, ref_combination=None), ValueError, "or ref_combination to say how 3 references become"),
    (
        sums_of(1, 4, ref_combination=None),
        ValueError,
        "ref_combination to say how 1 references become one: harmonic",
    ),
    (
        sums_of(4),
        ValueError,
        "ref_logps, with ref_combination: got shape (4,), wanted (K, 4) or (K, 4, 6) of",
    ),
    (sums_of(0, 4), ValueError, "ref_logps, with ref_combination: got shape (0, 4), wanted (K, 4)"),
    (sums_of(2, 5), ValueError, "got shape (2, 5), wanted (K, 4) or (K, 4, 6) of K references"),
    (
        sums_of(2, 4, token_weights=torch.ones(4, 6)),
        ValueError,
        "ref_logps (with token_weights), with ref_combination: got shape (2, 4), wanted (K, 4, 6) of",
    ),
    (
        {"ref_logps": torch.zeros(2, 4).int(), "ref_combination": "mean"},
        ValueError,
        "ref_logps: got torch.int32, wanted torch.float32",
    ),
    (
        {"ref_logps": None, "ref_combination": "mean"},
        ValueError,
        "ref_combination: got a value without ref_logps, wanted ref_logps of K references",
    ),
    (
        {"ref_hidden": torch.zeros(4, 6, 8), "ref_combination": "mean"},
        ValueError,
        "ref_combination: got a value without ref_logps",
    ),
    (sums_of(2, 4, loss_type="simpo"), ValueError, "ref_logps: got a value that simpo does not use"),
    (
        sums_of(2, 4, ref_combination="vote"),
        ValueError,
        "ref_combination: got 'vote', wanted one of harmonic,",
    ),
    (sums_of(2, 4, ref_combination=2), TypeError, "ref_combination: got int, wanted a name"),
    (
        sums_of(3, 4, ref_combination=ReferenceCombination("mean", weights=(0.5, 0.5))),
        ValueError,
        "ref_combination.weights: got shape (2,), wanted (3,) or (3, 2): K references, P pairs",
    ),
    (
        sums_of(2, 4, ref_combination=ReferenceCombination("mean", weights=torch.tensor([0.5, 0.6]))),
        ValueError,
        "weights: got negative ones, or ones that do not add up to 1",
    ),
    (
        sums_of(2, 4, ref_combination=ReferenceCombination("mean", weights=torch.ones(2, device="meta"))),
        ValueError,
        "ref_combination.weights: got meta, wanted cpu, the device of the batch",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS)
def test_bad_calls(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, labels = torch.zeros(4, 6, 8), torch.ones(4, 6, dtype=torch.int64)
    with pytest.raises(error) as raised:
        fused_dpo_loss(hidden, torch.zeros(11, 8), labels, **changed)
    assert re.search(re.escape(message), str(raised.value)), raised.value
    if changed.get("ref_hidden") is not None:
        return
    mask = torch.ones(4, 6, dtype=torch.bool)
    with pytest.raises(error) as raised:
        dpo_loss_from_logps(LinearLogprobOutput(torch.zeros(4, 6)), mask, **changed)
    assert re.search(re.escape(message), str(raised.value)), raised.value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "max_margin", "weights": (0.5, 0.5)},
            "weights: got a value with 'max_margin', wanted None",
        ),
        (
            {"name": "harmonic", "eta": 0.1},
            "eta: got a value with 'harmonic', wanted None: .* only mrpo has it",
        ),
        ({"name": "geometric", "clip": False}, "clip: got a value with 'geometric', wanted None"),
        ({"name": "mrpo", "eta": -0.1}, r"eta: got -0.1, wanted a number in \[0, 1\]"),
        ({"name": "mrpo", "eta": float("nan")}, "eta: got nan"),
        ({"name": "mrpo", "eta": True}, "eta: got True"),
        ({"name": "mrpo", "eta": 0.1, "clip": False}, "eta: got a value with clip=False"),
        ({"name": "mean", "clip": 1}, "clip: got 1, wanted True, False or None"),
        ({"name": "mean", "weights": (0.5, 0.6)}, r"weights: got \[0.5, 0.6\], wanted numbers of at least 0"),
        ({"name": "mean", "weights": (1.5, -0.5)}, "weights: got .* wanted numbers of at least 0"),
        ({"name": "mean", "weights": 1.0}, "weights: got 1.0, wanted numbers"),
        ({"name": "mean", "weights": ()}, r"weights: got \[\], wanted numbers"),
        ({"name": "mean", "weights": (float("nan"), 1)}, "weights: got .* wanted numbers"),
    ],
)
def test_bad_combinations(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ref_combination.{message}"):
        ReferenceCombination(**arguments)


def test_packed_layout_of_one_token_each_is_sums() -> None:
    """Where 2P tokens make both shapes one, it is read as sums, as one reference is."""
    token = LinearLogprobOutput(torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    layout = PackedLayout(torch.arange(5))
    sums = -torch.rand(3, 4)
    kwargs = {"mask": torch.ones(4, dtype=torch.bool), "layout": layout, "ref_combination": "geometric"}
    out = dpo_loss_from_logps(token, ref_logps=sums, **kwargs)  # type: ignore[arg-type]
    torch.testing.assert_close(out.ref_rejected_logps, sums.mean(0)[2:])
