"""The battery of test_registry for losses that are not of pairs, and what their objectives refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import (
    LOSSES,
    ListLogps,
    StepLogps,
    TokenDivergences,
    TokenLogps,
    UnpairedLogps,
    build_objective,
)
from fastdpo.losses.metrics import list_metrics
from tests.losses.common import mean_loss, random_pair, row_losses, variant_id, variants
from tests.losses.kinds import OTHER_KINDS, ROWS, leaf, one_row, padded, random_batch, with_leaf

ALL_VARIANTS = pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, variant) for name in OTHER_KINDS for variant in variants(LOSSES[name], ROWS)],
    ids=variant_id,
)
EACH = pytest.mark.parametrize("name", OTHER_KINDS)


# These detach what depends on the same numbers, which numerical differences would see: their gradients are
# held to the papers' in test_kind_oracles.
DETACHED = ("ddo_rm", "nash_md")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(n, variant) for n in OTHER_KINDS if n not in DETACHED for variant in variants(LOSSES[n], ROWS)],
    ids=variant_id,
)
def test_gradcheck(name: str, arguments: dict[str, Any]) -> None:
    batch = random_batch(LOSSES[name])
    values = leaf(batch).clone().requires_grad_()

    def losses(x: Tensor) -> Tensor:
        return row_losses(name, with_leaf(batch, x), arguments)

    assert losses(values).shape == (ROWS,)
    assert torch.autograd.gradcheck(losses, values)


@ALL_VARIANTS
def test_rows_do_not_see_each_other(name: str, arguments: dict[str, Any]) -> None:
    assert LOSSES[name].scope == "pair"
    batch = random_batch(LOSSES[name])
    together = row_losses(name, batch, arguments)
    for i in range(ROWS):
        own = {key: v[i : i + 1] if isinstance(v, Tensor) else v for key, v in arguments.items()}
        alone = row_losses(name, one_row(batch, i), own)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-13, atol=1e-14)


@EACH
def test_every_option_changes_something(name: str) -> None:
    batch = random_batch(LOSSES[name])
    for arguments in variants(LOSSES[name], ROWS)[1:]:
        if arguments == {"teacher_mode": "theorem1_adaptive"} or "jsd_beta" in arguments:
            continue  # in the divergences themselves: test_divergence_losses, test_distillation_losses
        changed, unchanged = mean_loss(name, batch, **arguments), mean_loss(name, batch)
        assert not torch.equal(changed, unchanged), arguments


@EACH
def test_declared_lengths_and_shift_invariance(name: str) -> None:
    spec = LOSSES[name]
    batch = random_batch(spec)
    value = mean_loss(name, batch)
    for field in ("tokens", "chosen_tokens"):
        if hasattr(batch, field):
            longer = replace(batch, **{field: 2 * getattr(batch, field)})
            assert torch.allclose(mean_loss(name, longer), value) != spec.length_normalized
    if isinstance(batch, ListLogps) and spec.uses_reference:
        assert batch.ref_logps is not None
        constant = torch.tensor([5.0, -7.0, 11.0, 3.0], dtype=torch.float64)[batch.group_ids]
        moved = replace(batch, ref_logps=batch.ref_logps + constant)
        assert torch.allclose(mean_loss(name, moved), value, rtol=1e-12) == spec.shift_invariant


@EACH
def test_rows_without_tokens_count_nowhere(name: str) -> None:
    batch = random_batch(LOSSES[name])
    torch.testing.assert_close(mean_loss(name, padded(batch)), mean_loss(name, batch), rtol=1e-13, atol=1e-15)


@EACH
def test_nan_reaches_the_loss(name: str) -> None:
    batch = random_batch(LOSSES[name])
    broken = leaf(batch).clone()
    broken[0] = torch.nan  # for lists: a candidate of some group
    if isinstance(batch, ListLogps):
        broken = torch.where(batch.group_ids == 2, torch.nan, leaf(batch))
    assert mean_loss(name, with_leaf(batch, broken)).isnan()


@EACH
def test_order_of_the_data_changes_nothing(name: str) -> None:
    """Groups may come in any order and mixed; answers in any order."""
    batch = random_batch(LOSSES[name])
    if not isinstance(batch, ListLogps):
        return
    rows = torch.argsort(batch.group_ids, stable=True, descending=True)
    moved = ListLogps(
        *(None if v is None else v[rows] for v in (batch.logps, batch.tokens, batch.group_ids)),  # type: ignore[arg-type]
        *(None if v is None else v[rows] for v in (batch.scores, batch.ref_logps)),
        num_groups=ROWS,
        max_candidates=7,
    )
    # wrpo alone wants its three candidates in their order and nothing behind them.
    moved = replace(moved, max_candidates=3) if name == "wrpo" else moved
    torch.testing.assert_close(mean_loss(name, moved), mean_loss(name, batch), rtol=1e-12, atol=1e-12)


@EACH
def test_counts_and_weights(name: str) -> None:
    batch = random_batch(LOSSES[name])
    losses = row_losses(name, batch, {})
    objective = build_objective(name, num_pairs=10)
    torch.testing.assert_close(objective.loss(batch), losses.sum() / 10)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    counted = LOSSES[name].counted
    count = ROWS if counted is None else counted(batch).sum()
    torch.testing.assert_close(mean_loss(name, batch, pair_weights=weights), (weights * losses).sum() / count)
    twice = build_objective([name, name], [1.0, 0.5])
    torch.testing.assert_close(twice.loss(batch), 1.5 * losses.sum() / count)


@EACH
def test_sound_batches_pass_and_others_do_not(name: str) -> None:
    spec = LOSSES[name]
    objective = build_objective(name)
    batch = random_batch(spec)
    objective.check(batch)
    with pytest.raises(ValueError, match=f"batch: got PairLogps, wanted {spec.inputs.__name__} for {name}"):
        objective.check(random_pair())
    with pytest.raises(ValueError, match=f"loss_type: got {name}, wanted losses of chosen and rejected"):
        objective.check_batch(4, torch.device("cpu"), has_reference=spec.uses_reference)
    if spec.uses_reference:
        with pytest.raises(ValueError, match="ref_logps: got no reference"):
            objective.check(batch.without_reference())
    elif hasattr(batch, "ref_logps"):
        with pytest.raises(ValueError, match=f"ref_logps: got a value that {name} does not use"):
            objective.check(replace(batch, ref_logps=batch.logps))
    for extra in batch.extras:
        if extra in spec.needs:
            with pytest.raises(ValueError, match=f"{extra}: got None, wanted a value for {name}"):
                objective.check(replace(batch, **{extra: None}))
        else:
            with pytest.raises(ValueError, match=f"{extra}: got a value, wanted None for {name}"):
                objective.check(replace(batch, **{extra: torch.tensor(0.0)}))
    with pytest.raises(ValueError, match=r"pair_weights: got shape \(3,\), wanted a number or \(4,\)"):
        build_objective(name, pair_weights=torch.ones(3)).check(batch)


def lists(**changes: Any) -> ListLogps:
    values: dict[str, Any] = dict(
        logps=torch.zeros(3),
        tokens=torch.ones(3),
        group_ids=torch.tensor([0, 0, 1]),
        scores=torch.zeros(3),
        ref_logps=torch.zeros(3),
    )
    return ListLogps(**(values | changes))


def answers(**changes: Any) -> UnpairedLogps:
    values: dict[str, Any] = dict(
        logps=torch.zeros(3),
        is_desirable=torch.ones(3, dtype=torch.bool),
        tokens=torch.ones(3),
        ref_logps=torch.zeros(3),
        kl=torch.tensor(0.1),
    )
    return UnpairedLogps(**(values | changes))


def sample(**changes: Any) -> TokenLogps:
    values: dict[str, Any] = dict(
        logps=torch.zeros(2, 3),
        mask=torch.ones(2, 3, dtype=torch.bool),
        ref_logps=torch.zeros(2, 3),
        win_rates=torch.zeros(2),
    )
    return TokenLogps(**(values | changes))


BAD_BATCHES: list[tuple[str, Any, str]] = [
    ("sdpo", lists(scores=torch.zeros(2)), r"ListLogps.scores: got shape \(2,\), wanted \(3,\)"),
    ("sdpo", lists(ref_logps=torch.zeros(4)), r"ListLogps.ref_logps: got shape \(4,\), wanted \(3,\)"),
    ("sdpo", lists(tokens=torch.ones(3).double()), "ListLogps.tokens: got torch.float64, wanted"),
    ("sdpo", lists(group_ids=torch.zeros(3)), "ListLogps.group_ids: got torch.float32, wanted torch.int64"),
    ("sdpo", lists(group_ids=torch.tensor([0, -1, 1])), "group_ids: got -1 to 1, wanted 0 to G - 1"),
    ("sdpo", lists(num_groups=1), "ListLogps.group_ids: got 0 to 1, wanted 0 to 1 - 1"),
    ("sdpo", lists(max_candidates=1), "ListLogps.max_candidates: got 1, wanted 2"),
    ("sdpo", lists(scores=torch.tensor([0, torch.nan, 0])), "ListLogps.scores: got nan among them"),
    ("rrhf", lists(ref_logps=None, scores=torch.full((3,), torch.inf)), "scores: got inf among them"),
    ("sdpo", lists(logps=torch.zeros(3, 1)), r"logps: got \(3, 1\), wanted a floating-point tensor"),
    ("sdpo", lists(logps=torch.zeros(3, dtype=torch.long)), "a floating-point tensor, one number per row"),
    ("kto", answers(is_desirable=torch.ones(3)), "is_desirable: got torch.float32, wanted torch.bool"),
    ("kto", answers(is_desirable=torch.ones(2).bool()), r"is_desirable: got shape \(2,\), wanted \(3,\)"),
    ("kto", answers(kl=torch.zeros(3)), r"UnpairedLogps.kl: got shape \(3,\), wanted a 0-d tensor"),
    ("kto", answers(kl=torch.tensor(-0.1)), r"UnpairedLogps.kl: got -0.1\d* among them"),
    ("bco", answers(kl=None, reward_shift=torch.tensor(torch.nan)), "UnpairedLogps.reward_shift: got nan"),
    ("kto", answers(tokens=-torch.ones(3)), "UnpairedLogps.tokens: got -1.0 among them"),
    ("sdpo", lists(tokens=torch.tensor([1.0, -2.0, 1.0])), "ListLogps.tokens: got -2.0 among them"),
    ("kto", answers(kl=0.1), "UnpairedLogps.kl: got 0.1, wanted a 0-d tensor"),
    ("nash_md", sample(mask=torch.ones(2, 4).bool()), r"mask: got shape \(2, 4\), wanted \(2, 3\)"),
    ("nash_md", sample(win_rates=torch.ones(3)), r"TokenLogps.win_rates: got shape \(3,\), wanted \(2,\)"),
    ("nash_md", sample(logps=torch.zeros(6)), r"of shape \(6,\), wanted floating-point \(B, T\)"),
    ("nash_md", sample(win_rates=torch.tensor([0.5, 1.5])), "win_rates: got 1.5 among them, wanted each"),
    ("nash_md", sample(win_rates=torch.tensor([torch.nan, 1])), "win_rates: got nan among them"),
    ("direct_advantage", StepLogps(*(torch.ones(n) for n in (2, 3, 2, 2))), "StepLogps.advantages"),
    (
        "direct_advantage",
        StepLogps(torch.ones(1), torch.tensor([torch.nan]), torch.ones(1), torch.ones(1)),
        "StepLogps.advantages: got nan among them, wanted each a finite number",
    ),
    (
        "aligndistil",
        TokenDivergences(torch.zeros(1, 2), torch.ones(1, 2).bool(), l1_distance=torch.tensor([[0.1, -0.1]])),
        "TokenDivergences.l1_distance: got -0.1",
    ),
    (
        "aligndistil",
        TokenDivergences(torch.zeros(2, 3), torch.ones(2, 3).bool(), l1_distance=torch.zeros(2)),
        r"TokenDivergences.l1_distance: got shape \(2,\), wanted \(2, 3\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "batch", "message"), BAD_BATCHES)
def test_bad_batches(name: str, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(name).check(batch)


def test_pairs_are_checked_alike() -> None:
    objective = build_objective("sigmoid")
    pair = random_pair()
    objective.check(pair)
    with pytest.raises(ValueError, match=r"PairLogps.rejected: got shape \(2,\), wanted \(5,\)"):
        objective.check(replace(pair, rejected=pair.rejected[:2]))
    with pytest.raises(ValueError, match="nll_sum and nll_tokens: got one of the two"):
        objective.check(replace(pair, nll_sum=pair.chosen))
    with pytest.raises(ValueError, match="ref_chosen and ref_rejected: got one of the two"):
        build_objective("cpo").check(replace(pair, ref_chosen=None))
    with pytest.raises(ValueError, match=r"beta: got shape \(4,\), wanted a number or \(5,\)"):
        build_objective("sigmoid", beta=torch.ones(4)).check(pair)
    rates = torch.tensor([0.5, 1.0, 0.0, 0.1, 2.0], dtype=pair.chosen.dtype)
    with pytest.raises(ValueError, match="PairLogps.rejected_win_rate: got 2.0 among them, wanted"):
        build_objective("sppo").check(replace(pair, chosen_win_rate=rates / 2, rejected_win_rate=rates))
    rated = replace(pair, chosen_win_rate=rates / 2, rejected_win_rate=rates / 2)
    build_objective(["sigmoid", "sppo"]).check(rated)
    with pytest.raises(ValueError, match="chosen_win_rate: got a value, wanted None for sigmoid"):
        build_objective("sigmoid").check(rated)


def test_kinds_do_not_mix() -> None:
    with pytest.raises(
        ValueError, match="loss_type: got kto of UnpairedLogps, sdpo of ListLogps, wanted losses"
    ):
        build_objective(["kto", "sdpo"])
    with pytest.raises(ValueError, match="loss_type: got sigmoid of PairLogps, tdpo1 of DivergencePairLogps"):
        build_objective(["sigmoid", "tdpo1"])


def test_missing_data_without_a_check() -> None:
    """The functions themselves refuse too, for who calls them directly."""
    for name, batch in (
        ("sdpo", lists(scores=None)),
        ("kto", answers(kl=None)),
        ("bco", answers()),
        ("tdpo1", random_pair()),
        ("aligndistil", TokenDivergences(torch.zeros(2, 3), torch.ones(2, 3).bool())),
        ("nash_md", sample(win_rates=None)),
    ):
        with pytest.raises(ValueError, match="got (None|none), wanted"):
            LOSSES[name].function(batch)


def test_empty_batches() -> None:
    empty = torch.zeros(0)
    nothing = ListLogps(empty, empty, empty.long(), empty, empty)
    assert mean_loss("sdpo", nothing).item() == 0
    assert nothing.index.shape == (0, 0)
    gap = lists(group_ids=torch.tensor([0, 0, 2]))  # nobody is of group 1
    assert gap.is_scored.tolist() == [True, False, True]
    for name in OTHER_KINDS:
        spec = LOSSES[name]
        if spec.inputs is ListLogps and name != "wrpo":
            scores = gap.scores if "scores" in spec.needs else None
            batch = replace(gap, scores=scores, ref_logps=gap.ref_logps if spec.uses_reference else None)
            assert mean_loss(name, batch).isfinite()


def test_rewards_of_answers() -> None:
    batch = random_batch(LOSSES["sdpo"])
    got = build_objective("sdpo", beta=0.3).answer_rewards(
        batch.__class__(**_fields(batch, requires_grad=True))
    )
    torch.testing.assert_close(got, 0.3 * (batch.logps - batch.ref_logps))
    assert not got.requires_grad
    betas = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    per_group = build_objective("sdpo", beta=betas).answer_rewards(batch)
    torch.testing.assert_close(per_group, betas[batch.group_ids] * (batch.logps - batch.ref_logps))
    free = random_batch(LOSSES["rrhf"])  # has no beta: 0.1
    torch.testing.assert_close(build_objective("rrhf").answer_rewards(free), 0.1 * free.logps / free.tokens)
    single = random_batch(LOSSES["bco"])
    torch.testing.assert_close(
        build_objective("bco").answer_rewards(single), 0.1 * (single.logps - single.ref_logps)
    )


def _fields(batch: ListLogps, *, requires_grad: bool) -> dict[str, Any]:
    names = ("logps", "tokens", "group_ids", "scores", "ref_logps")
    values = {name: getattr(batch, name) for name in names}
    values["logps"] = values["logps"].clone().requires_grad_(requires_grad)
    return values


def test_list_metrics_by_hand() -> None:
    batch = ListLogps(
        torch.zeros(6),
        torch.ones(6),
        torch.tensor([0, 0, 0, 1, 1, 2]),
        torch.tensor([0.0, 2.0, 2.0, 1.0, 0.0, 5.0]),
    )
    rewards = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.5, 9.0])
    got = list_metrics(batch, rewards)
    # Group 0: best 3, others 1.5; group 1: best 0.5, other 0.5, a tie is no success; group 2 has one.
    assert got == {
        "rewards/best": 1.75,
        "rewards/others": 1.0,
        "rewards/margins": 0.75,
        "rewards/accuracies": 0.5,
    }
    assert list_metrics(replace(batch, scores=None), rewards)["rewards/best"] == 0.75
