"""The battery that every registered loss gets without a line of its own, and the registry itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import (
    LOSSES,
    Example,
    PairLogps,
    build_objective,
    find_loss,
    loss_options,
    losses_table,
    preference_loss,
)
from tests.losses.common import (
    ALL_LOSSES,
    COMPANIONS,
    PAIRED,
    example_batch,
    mean_loss,
    needed,
    random_pair,
    row_losses,
    variant_id,
    variants,
    with_ids,
)

PAIRED_VARIANTS = pytest.mark.parametrize(("name", "arguments"), with_ids(PAIRED), ids=variant_id)


@pytest.mark.promise(24)
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_example_worked_out_by_hand(name: str) -> None:
    spec = LOSSES[name]
    assert spec.example is not None and spec.paper != "none"  # those of others need neither
    got = mean_loss(name, example_batch(spec), **spec.example.options)
    assert got.item() == pytest.approx(spec.example.loss, abs=1e-6)


# These detach what depends on the same numbers: their gradients are held to the authors' in their own tests.
DETACHED = ("alpha_dpo",)


@pytest.mark.promise(24)
@pytest.mark.parametrize(
    ("name", "arguments"), with_ids([n for n in PAIRED if n not in DETACHED]), ids=variant_id
)
def test_gradcheck(name: str, arguments: dict[str, Any]) -> None:
    pair = random_pair(LOSSES[name])

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return row_losses(name, replace(pair, chosen=chosen, rejected=rejected), arguments)

    assert losses(pair.chosen, pair.rejected).shape == (5,)
    assert torch.autograd.gradcheck(losses, (pair.chosen, pair.rejected))


def one_pair(pair: PairLogps, i: int) -> PairLogps:
    return PairLogps(
        **{key: None if value is None else value[i : i + 1] for key, value in vars(pair).items()}
    )


@PAIRED_VARIANTS
def test_scope_says_whether_pairs_see_each_other(name: str, arguments: dict[str, Any]) -> None:
    """Scope token and pair: a pair alone gives what it gives in the batch, as micro-batches need it."""
    spec = LOSSES[name]
    pair = random_pair(spec)
    together = row_losses(name, pair, arguments)
    alone = [
        row_losses(
            name,
            one_pair(pair, i),
            {
                key: v[i : i + 1] if isinstance(v, Tensor) else v
                for key, v in (needed(name, 5) | arguments).items()
            },
        )
        for i in range(5)
    ]
    assert torch.equal(torch.cat(alone), together) == (spec.scope in ("token", "pair"))


@pytest.mark.parametrize("name", PAIRED)
def test_every_option_changes_something(name: str) -> None:
    """An option that is declared and then ignored would pass every other test."""
    pair = random_pair(LOSSES[name])
    for arguments in variants(LOSSES[name])[1:]:
        companions = next((COMPANIONS[key] for key in arguments if key in COMPANIONS), {})
        changed, unchanged = mean_loss(name, pair, **arguments), mean_loss(name, pair, **companions)
        assert not torch.allclose(changed, unchanged), arguments


@pytest.mark.parametrize("name", PAIRED)
def test_declared_reference_and_lengths_are_used(name: str) -> None:
    spec = LOSSES[name]
    pair = random_pair()

    def of(batch: PairLogps) -> Tensor:
        return row_losses(name, batch if spec.uses_reference else batch.without_reference(), {})

    losses = of(pair)
    if spec.uses_reference:
        moved = replace(pair, ref_chosen=pair.ref_chosen + torch.arange(5))  # type: ignore[operator]
        assert not torch.allclose(losses, of(moved))
    longer = replace(pair, chosen_tokens=2 * pair.chosen_tokens)
    assert torch.allclose(losses, of(longer)) != spec.length_normalized


@pytest.mark.promise(26)
@pytest.mark.parametrize("name", PAIRED)
def test_shift_invariance_as_claimed(name: str) -> None:
    """A constant per prompt added to both reference sums cancels, or the loss does not claim it."""
    spec = LOSSES[name]
    if not spec.uses_reference:
        assert not spec.shift_invariant
        return
    pair = random_pair()
    constant = torch.linspace(-20, 20, 5, dtype=torch.float64)
    moved = replace(pair, ref_chosen=pair.ref_chosen + constant, ref_rejected=pair.ref_rejected + constant)  # type: ignore[operator]
    first, second = (row_losses(name, batch, {}) for batch in (pair, moved))
    assert torch.allclose(first, second, rtol=1e-12) == spec.shift_invariant


@pytest.mark.parametrize("name", PAIRED)
def test_nan_reaches_the_loss(name: str) -> None:
    """A NaN log-probability must not turn into a plausible number."""
    pair = random_pair(LOSSES[name])
    broken = replace(pair, chosen=pair.chosen.detach().clone().index_fill(0, torch.tensor([2]), torch.nan))
    assert mean_loss(name, broken).isnan()


@pytest.mark.parametrize("name", PAIRED)
def test_padding_pairs_count_nowhere(name: str) -> None:
    pair = random_pair(LOSSES[name])
    zeros = torch.zeros(3, dtype=torch.float64)
    padded = PairLogps(
        **{key: None if value is None else torch.cat([value, zeros]) for key, value in vars(pair).items()}
    )
    own = needed(name, 5)
    more = {key: torch.cat([value, zeros]) for key, value in own.items()}
    torch.testing.assert_close(
        mean_loss(name, padded, **more), mean_loss(name, pair, **own), rtol=1e-15, atol=0
    )


def test_options_of_one_name_have_one_type() -> None:
    """They share one command-line flag."""
    for name, takers in loss_options().items():
        assert len({(option.type, option.choices) for option in takers.values()}) == 1, name


def test_table_has_a_row_per_loss() -> None:
    header, _, *rows = losses_table().splitlines()
    assert len(rows) == len(LOSSES)
    assert {row.split("`")[1] for row in rows} == set(LOSSES)
    for row in rows:
        assert row.count("|") == header.count("|")
        assert all(cell.strip() for cell in row.strip("|").split("|"))
    assert "`gamma=0.5`" in losses_table() and "`beta=2`" in losses_table()


def test_options_by_name() -> None:
    options = loss_options()
    assert {"sigmoid", "robust", "sigmoid_norm", "simpo", "exo_pair"} <= set(options["label_smoothing"])
    assert "hinge" not in options["label_smoothing"]
    assert options["nll_weight"]["slic"].default == 0.1 and "simpo" not in options["nll_weight"]
    assert "forward_kl" in options["f_divergence_type"]["sigmoid"].choices
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


def test_presets_are_other_defaults() -> None:
    pair = random_pair()
    spec = find_loss("exo_pair@authors")
    assert spec.name == "exo_pair" and spec.default_beta == 0.5
    assert {o.name: o.default for o in spec.options}["label_smoothing"] == pytest.approx(4.54e-5, rel=1e-3)
    same = {"beta": 0.5, "label_smoothing": math.exp(-10)}
    assert torch.equal(mean_loss("exo_pair@authors", pair), mean_loss("exo_pair", pair, **same))
    moved = mean_loss("exo_pair@authors", pair, label_smoothing=0.1)
    assert torch.equal(moved, mean_loss("exo_pair", pair, beta=0.5, label_smoothing=0.1))
    for beta, given in ((2.0, {"beta": 2.0}), (0.5, {})):
        rewards = build_objective("exo_pair@authors", **given).rewards(pair)
        assert torch.equal(rewards[0], beta * pair.chosen_logratios.detach())
    for name, loss in LOSSES.items():
        names = {option.name for option in loss.options} | {"beta"}
        for preset, values in loss.presets.items():
            assert values.keys() <= names, f"{name}@{preset}"
            build_objective(f"{name}@{preset}", **values)  # in range
    with pytest.raises(ValueError, match="loss_type: got nca@mine, wanted nca@authors"):
        find_loss("nca@mine")
    with pytest.raises(ValueError, match="loss_type: got hinge@authors, wanted hinge"):
        find_loss("hinge@authors")


EXAMPLE = Example(1.0, chosen=-1.0, rejected=-2.0)


@pytest.mark.usefixtures("own_losses")
def test_a_users_loss_is_a_loss() -> None:
    @preference_loss("mine", uses_reference=False, aliases=("my_own",))
    def mine(pair: PairLogps, *, power: float = 1.0, beta: float = 0.3) -> Tensor:
        """The gap to a power."""
        return beta * pair.delta**power

    pair = random_pair()
    assert mean_loss("my_own", pair, power=2.0).item() == pytest.approx(
        (0.3 * (pair.chosen - pair.rejected) ** 2).mean().item()
    )
    assert (
        "| `mine` (`my_own`) | The gap to a power. | paired | no | `beta=0.3`, `power=1.0` | none | none |"
        in losses_table()
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
