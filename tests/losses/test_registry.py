"""The battery that every registered loss gets without a line of its own, and the registry itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, Example, PairLogps, find_loss, loss_options, losses_table, preference_loss
from tests.losses.common import ALL_LOSSES, example_pair, mean_loss, random_pair, variant_id, with_ids

ALL_VARIANTS = pytest.mark.parametrize(("name", "arguments"), with_ids(ALL_LOSSES), ids=variant_id)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_example_worked_out_by_hand(name: str) -> None:
    spec = LOSSES[name]
    got = mean_loss(name, example_pair(spec, spec.example), **spec.example.options)
    assert got.item() == pytest.approx(spec.example.loss, abs=1e-6)


@ALL_VARIANTS
def test_gradcheck(name: str, arguments: dict[str, Any]) -> None:
    pair = random_pair(LOSSES[name])

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return LOSSES[name].function(replace(pair, chosen=chosen, rejected=rejected), **arguments)

    assert losses(pair.chosen, pair.rejected).shape == (5,)
    assert torch.autograd.gradcheck(losses, (pair.chosen, pair.rejected))


@ALL_VARIANTS
def test_finite_at_extremes(name: str, arguments: dict[str, Any]) -> None:
    """|logp| up to 1e4 of either sign, in fp32, on every combination of the four sums."""
    values = (-1e4, -30.0, 0.0, 1e4)
    grid = torch.tensor(list(itertools.product(values, repeat=4))).T  # (4, 256)
    pairs = grid.shape[1]
    chosen, rejected = (grid[i].clone().requires_grad_() for i in (0, 1))
    uses_reference = LOSSES[name].uses_reference
    pair = PairLogps(
        chosen,
        rejected,
        torch.ones(pairs),
        torch.full((pairs,), 7.0),
        grid[2] if uses_reference else None,
        grid[3] if uses_reference else None,
    )
    spread = {
        key: value.float()[torch.arange(pairs) % len(value)] if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    losses = LOSSES[name].function(pair, **spread)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    losses.sum().backward()
    assert chosen.grad is not None and chosen.grad.isfinite().all()
    assert rejected.grad is None or rejected.grad.isfinite().all()  # None: sft looks at chosen alone


@ALL_VARIANTS
def test_pairs_do_not_see_each_other(name: str, arguments: dict[str, Any]) -> None:
    """Scope token and pair: a pair alone gives what it gives in the batch, as micro-batches need it."""
    spec = LOSSES[name]
    assert spec.scope in ("token", "pair")
    pair = random_pair(spec)
    together = spec.function(pair, **arguments)
    for i in range(5):
        alone = PairLogps(
            **{key: None if value is None else value[i : i + 1] for key, value in vars(pair).items()}
        )
        own = {key: v[i : i + 1] if isinstance(v, Tensor) else v for key, v in arguments.items()}
        assert torch.equal(spec.function(alone, **own), together[i : i + 1])


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_every_option_changes_something(name: str) -> None:
    """An option that is declared and then ignored would pass every other test."""
    spec = LOSSES[name]
    pair = random_pair(spec)
    (_, defaults), *moved = with_ids([name])
    for _, arguments in moved:
        assert not torch.allclose(spec.function(pair, **arguments), spec.function(pair, **defaults))


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_declared_reference_and_lengths_are_used(name: str) -> None:
    spec = LOSSES[name]
    pair = random_pair()
    losses = spec.function(pair if spec.uses_reference else pair.without_reference())
    if spec.uses_reference:
        moved = replace(pair, ref_chosen=pair.ref_chosen + 1)  # type: ignore[operator]
        assert not torch.allclose(losses, spec.function(moved))
    longer = replace(pair, chosen_tokens=2 * pair.chosen_tokens)
    changed = not torch.allclose(
        losses, spec.function(longer if spec.uses_reference else longer.without_reference())
    )
    assert changed == spec.length_normalized


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_shift_invariance_as_claimed(name: str) -> None:
    """A constant per prompt added to both reference sums cancels, or the loss does not claim it."""
    spec = LOSSES[name]
    if not spec.uses_reference:
        assert not spec.shift_invariant
        return
    pair = random_pair()
    constant = torch.linspace(-20, 20, 5, dtype=torch.float64)
    moved = replace(pair, ref_chosen=pair.ref_chosen + constant, ref_rejected=pair.ref_rejected + constant)  # type: ignore[operator]
    assert torch.allclose(spec.function(pair), spec.function(moved), rtol=1e-12) == spec.shift_invariant


def test_table_has_a_row_per_loss() -> None:
    header, _, *rows = losses_table().splitlines()
    assert len(rows) == len(LOSSES)
    for name, row in zip(LOSSES, rows, strict=True):
        assert row.startswith(f"| `{name}`")
        assert row.count("|") == header.count("|")
        assert all(cell.strip() for cell in row.strip("|").split("|"))
    assert "`gamma=0.5`" in losses_table() and "`beta=2`" in losses_table()


def test_options_by_name() -> None:
    options = loss_options()
    assert set(options["label_smoothing"]) == {"sigmoid", "robust", "sigmoid_norm", "simpo"}
    assert options["gamma"]["simpo"].type is float and options["gamma"]["simpo"].default == 0.5
    assert options["length_normalize"]["ipo"].type is bool
    assert "beta" not in options and "margin" not in options


def test_find_loss_knows_aliases_and_near_misses() -> None:
    assert find_loss("dpo") is LOSSES["sigmoid"]
    with pytest.raises(
        ValueError, match=r"loss_type: got 'sigmod', wanted one of .*hinge.*did you mean 'sigmoid'"
    ):
        find_loss("sigmod")
    with pytest.raises(ValueError, match=r"loss_type: got 3, wanted one of"):
        find_loss(3)  # type: ignore[arg-type]


@pytest.fixture
def own_losses() -> Iterator[None]:
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


EXAMPLE = Example(1.0, chosen=-1.0, rejected=-2.0)


@pytest.mark.usefixtures("own_losses")
def test_a_users_loss_is_a_loss() -> None:
    @preference_loss("mine", paper="none", example=EXAMPLE, uses_reference=False, aliases=("my_own",))
    def mine(pair: PairLogps, *, power: float = 1.0, beta: float = 0.3) -> Tensor:
        """The gap to a power."""
        return beta * pair.delta**power

    pair = random_pair()
    assert mean_loss("my_own", pair, power=2.0).item() == pytest.approx(
        (0.3 * (pair.chosen - pair.rejected) ** 2).mean().item()
    )
    assert (
        "| `mine` (`my_own`) | The gap to a power. | no | `beta=0.3`, `power=1.0` | none |" in losses_table()
    )
    with pytest.raises(ValueError, match="power: got nan, wanted a finite number"):
        mean_loss("mine", pair, power=float("nan"))


@pytest.mark.usefixtures("own_losses")
def test_registration_refuses() -> None:
    def fine(pair: PairLogps) -> Tensor:
        return pair.delta

    def positional(pair: PairLogps, tau: float = 1.0) -> Tensor:
        return pair.delta

    def no_default(pair: PairLogps, *, tau: float) -> Tensor:
        return pair.delta

    def nothing(*, tau: float = 1.0) -> Tensor:
        return torch.zeros(1)

    for function, name, scope, message in (
        (fine, "sigmoid", "pair", "got 'sigmoid', which is registered already"),
        (fine, "dpo", "pair", "got 'dpo', which is registered already"),
        (fine, "new", "prompt", "got scope 'prompt', wanted one of"),
        (positional, "new", "pair", "got parameter tau: .*, wanted it keyword-only"),
        (no_default, "new", "pair", "wanted a default of type bool, int, float or str"),
        (nothing, "new", "pair", "wanted one for the PairLogps"),
    ):
        with pytest.raises(ValueError, match=message):
            preference_loss(name, paper="", example=EXAMPLE, scope=scope)(function)
    assert "new" not in LOSSES
