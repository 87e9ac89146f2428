"""Mode ``pairs`` for losses of answers, lists, steps and tokens: three products, groups of whole rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import LOSSES, Execution, TokenLayout, fused_preference_loss, shift_labels
from fastdpo.functional.rows import Rows
from fastdpo.functional.tokens import RowOrder, RowTokens
from fastdpo.losses.objective import Objective
from fastdpo.plan import call as plan
from fastdpo.plan import schedule
from fastdpo.testing import assert_close_to_fp64
from fastdpo.types import PreferenceLossOutput
from tests.functional.test_rows import HIDDEN, IGNORED, NAMES, VOCAB, Answers, dense, run
from tests.ops.test_gemm_passes import count_passes

# Of a "MiB" of so many rows of logits, and of D: 7 answers' tokens are groups of two answers, of one list
# that is too long for that, and of several steps.
ROWS = 11
PAIRS_MODE = Execution(mode="pairs", workspace_mib=1, cache_mib=1)
CACHE_MODE = Execution(mode="cache", workspace_mib=1, cache_mib=1)


@pytest.fixture(autouse=True)
def _tiny_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, ROWS)


def set_budgets(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for module in (schedule, plan):
        monkeypatch.setattr(module, "MIB", rows * schedule.leading_dim(VOCAB) * 4)


def gradients(
    answers: Answers, name: str, execution: Execution | None, **kwargs: Any
) -> tuple[PreferenceLossOutput, list[Tensor]]:
    hidden, weight = answers.hidden.clone().requires_grad_(), answers.weight.clone().requires_grad_()
    out = run(answers, name, hidden, weight, execution=execution, **kwargs)
    return out, list(torch.autograd.grad(out.loss, (hidden, weight)))


def assert_same_report(out: PreferenceLossOutput, other: PreferenceLossOutput) -> None:
    for field in ("logps", "ref_logps", "rewards"):
        ours, theirs = getattr(out, field), getattr(other, field)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), field
    assert out.metrics.keys() == other.metrics.keys()
    for key, value in out.metrics.items():
        assert torch.equal(value, other.metrics[key]) or value.isnan(), key


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_fp64_and_the_cache(name: str, dtype: torch.dtype, packed: bool) -> None:
    """What is reported is that of `cache` to the last bit, gradients are right by the tolerance rule."""
    answers = Answers(dtype)
    cache, _ = gradients(answers, name, CACHE_MODE, packed=packed)
    out, got = gradients(answers, name, PAIRS_MODE, packed=packed)
    assert_same_report(out, cache)
    assert torch.equal(out.loss, cache.loss)
    (_, want), (_, eager) = (dense(answers, name, each) for each in (torch.float64, dtype))
    for ours, fp64, plain in zip(got, want, eager, strict=True):
        assert_close_to_fp64(*(value.reshape(-1, value.shape[-1]) for value in (ours, fp64, plain)))


@pytest.mark.parametrize("name", ["kto", "plackett_luce", "direct_advantage", "nash_md"])
def test_three_products_with_a_trained_head_and_two_with_a_frozen_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the passes: `cache` recomputes what its budget does not hold."""
    set_budgets(monkeypatch, 18)  # the longer list has so many tokens
    answers = Answers(torch.float32)
    hidden, weight = answers.hidden.clone().requires_grad_(), answers.weight.clone().requires_grad_()
    num_tokens = int((shift_labels(answers.labels) != IGNORED).sum())
    rows = 18 if name == "direct_advantage" else 6
    beside: dict[str, Any] = {"ref_logps": torch.zeros(answers.labels.shape if name == "nash_md" else rows)}
    beside = beside if LOSSES[name].uses_reference else {}

    def step(mode: str) -> None:
        execution = Execution(mode=mode, workspace_mib=1, cache_mib=1)
        run(answers, name, hidden, weight, execution=execution, **beside).loss.backward()

    sizes = (num_tokens, HIDDEN, VOCAB)
    assert count_passes(lambda: step("auto"), *sizes) == 3
    assert count_passes(lambda: step("cache"), *sizes) > 3.4
    weight.requires_grad_(False)
    assert count_passes(lambda: step("auto"), *sizes) == 2


def test_a_reference_in_the_same_call_costs_one_product_more(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, 18)
    answers = Answers(torch.float32)
    num_tokens = int((shift_labels(answers.labels) != IGNORED).sum())
    passes = count_passes(lambda: gradients(answers, "kto", None), num_tokens, HIDDEN, VOCAB)
    assert passes == 3 + 1


@pytest.mark.parametrize("name", ["kto", "lipo_lambda", "adpo", "direct_advantage", "nash_md"])
def test_numbers_of_rows_are_cut_with_them(name: str) -> None:
    """Weights, a beta of each row, a count to divide by, weights of tokens."""
    answers, generator = Answers(torch.float64), torch.Generator().manual_seed(1)
    num_rows = {"adpo": 2, "lipo_lambda": 2, "direct_advantage": 18}.get(name, 6)
    numbers = torch.rand(2, num_rows, generator=generator, dtype=torch.float64) + 0.1
    given: dict[str, Any] = {"row_weights": numbers[0].clone()}
    given["row_weights"][0] = 0
    if name != "direct_advantage" and LOSSES[name].default_beta is not None:
        given["beta"] = numbers[1]
    given["token_weights"] = torch.rand(answers.labels.shape, generator=generator, dtype=torch.float64)
    for count in ({}, {"num_rows": 17}, {"num_rows": torch.tensor(17.0)}):
        want_out, want = gradients(answers, name, CACHE_MODE, **given, **count)
        out, got = gradients(answers, name, PAIRS_MODE, **given, **count)
        torch.testing.assert_close([out.loss, *got], [want_out.loss, *want])
        assert got[1].any()


def test_a_count_that_leaves_rows_out_is_of_the_whole_batch() -> None:
    """A list whose scores are all equal, where the loss is of those with levels alone."""
    answers = Answers(torch.float64)
    answers.scores = answers.scores.where(torch.arange(6) % 2 == 0, 1.0)
    answers.scores[torch.tensor([1, 4, 5])] = 2.0  # the second list's
    counted = [name for name in NAMES if LOSSES[name].counted is not None]
    assert counted
    for name in counted:
        want_out, want = gradients(answers, name, CACHE_MODE)
        out, got = gradients(answers, name, PAIRS_MODE)
        torch.testing.assert_close([out.loss, *got], [want_out.loss, *want])
        scaled, _ = gradients(answers, name, PAIRS_MODE, num_rows=2)
        torch.testing.assert_close(out.loss, 2 * scaled.loss)  # one list of the two counts


def shared_rows(answers: Answers) -> tuple[Tensor, TokenLayout]:
    """The same tokens one by one, in another order, their states' rows two to a token."""
    targets = shift_labels(answers.labels)
    sequence, position = (targets != IGNORED).nonzero(as_tuple=True)
    order = torch.randperm(len(sequence), generator=torch.Generator().manual_seed(0))
    order = order[sequence[order].argsort(stable=True)]
    sequence, position = sequence[order], position[order]
    lengths = tuple(sequence.bincount(minlength=len(targets)).tolist())
    index = sequence * targets.shape[1] + position
    return order, TokenLayout(index, targets[sequence, position], sequence, lengths)


@pytest.mark.parametrize("has_lengths", [False, True])
@pytest.mark.parametrize("execution", [PAIRS_MODE, CACHE_MODE], ids=["pairs", "cache"])
@pytest.mark.parametrize("name", ["kto", "plackett_luce", "direct_advantage", "nash_md"])
def test_token_layout(name: str, execution: Execution, has_lengths: bool) -> None:
    answers = Answers(torch.float64)
    want_out, want = gradients(answers, name, execution)
    _, layout = shared_rows(answers)
    given = answers.extras(name)
    if "segment_ids" in given:
        following = torch.nn.functional.pad(given["segment_ids"], (0, 1), value=-1)[:, 1:]
        given["segment_ids"] = following.reshape(-1)[layout.token_index]
    if not has_lengths:
        layout = TokenLayout(layout.token_index, layout.target_ids, layout.sequence_ids)
    if LOSSES[name].uses_reference:
        given["ref_hidden"] = answers.ref_hidden.view(-1, HIDDEN)
    hidden = answers.hidden.clone().requires_grad_()
    weight = answers.weight.clone().requires_grad_()
    out = fused_preference_loss(
        hidden.view(-1, HIDDEN), weight, None, loss_type=name, layout=layout, execution=execution, **given
    )
    got = torch.autograd.grad(out.loss, (hidden, weight))
    torch.testing.assert_close([out.loss, out.logps, *got], [want_out.loss, want_out.logps, *want])


def test_what_mode_pairs_refuses() -> None:
    answers = Answers(torch.float32)
    learned = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="mode: 'pairs' needs fused_dpo_loss or fused_preference_loss"):
        gradients(answers, "adpo", PAIRS_MODE, row_weights=learned)
    hidden, weight = answers.hidden, answers.weight.clone().requires_grad_()
    run(answers, "adpo", hidden, weight, row_weights=learned).loss.backward()
    assert learned.grad is not None  # `auto` took a mode that has it


@pytest.mark.parametrize("name", ["kto", "plackett_luce"])
def test_a_loss_of_the_whole_batch_stays_on_the_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, name, replace(LOSSES[name], scope="batch"))
    answers = Answers(torch.float32)
    with pytest.raises(ValueError, match="mode: 'pairs' needs .* losses of scope 'pair' or 'token'"):
        gradients(answers, name, PAIRS_MODE)
    num_tokens = int((shift_labels(answers.labels) != IGNORED).sum())

    def passes(execution: Execution) -> float:
        return count_passes(lambda: gradients(answers, name, execution), num_tokens, HIDDEN, VOCAB)

    assert passes(Execution(workspace_mib=1, cache_mib=1)) == passes(CACHE_MODE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group_ids": torch.tensor([0, 1, 0, -1, 1, 1])}, "group_ids: got -1 to 1, wanted 0 to"),
        ({"num_groups": 1}, "group_ids: got 0 to 1, wanted 0 to 1 - 1"),
        ({"max_candidates": 2}, "max_candidates: got 2, wanted 3"),
        (
            {"group_ids": torch.tensor([0, 1, 0, 0, 1, 1]).int()},
            "group_ids: got torch.int32, wanted torch.int64",
        ),
        ({"row_weights": torch.ones(3)}, "pair_weights: got shape (3,), wanted a number or (2,)"),
        ({"scores": torch.full((6,), torch.nan)}, "scores: got nan"),
        ({"ref_hidden": None}, "ref_logps: got no reference"),
        ({"segment_ids": torch.full((6, 9), 7), "num_segments": 6}, "segment_ids: got 7, wanted less than 6"),
    ],
)
def test_bad_numbers_are_refused_before_the_pass(
    changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are cut by them: a wrong one must not reach the op."""
    monkeypatch.setattr("fastdpo.functional.path.grouped_loss", None)
    with pytest.raises(ValueError) as caught:
        gradients(Answers(torch.float32), "adpo", PAIRS_MODE, **changed)
    assert message in str(caught.value)


def ends_a_list_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first list's last candidate goes to the second list's group."""
    right = RowTokens.loss_rows

    def wrong(self: RowTokens, order: RowOrder) -> tuple[Tensor, Tensor]:
        _, segments = right(self, order)
        segments = segments - torch.tensor([0, 1, 0])
        assert self.host_offsets is not None
        return self.host_offsets.index_select(0, segments), segments

    monkeypatch.setattr(RowTokens, "loss_rows", wrong)


def divides_by_its_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    total = Objective.total
    monkeypatch.setattr(Objective, "total", lambda self, batch, divisors=None: total(self, batch))


def forgets_token_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "weighted", lambda self, values: values)


@pytest.mark.parametrize("plant", [ends_a_list_early, divides_by_its_own_count, forgets_token_weights])
def test_planted_bugs_are_found(plant: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes another gradient of about the right size; without one, all agree."""
    answers = Answers(torch.float64)
    given = {"token_weights": torch.rand(answers.labels.shape, dtype=torch.float64)}
    _, want = gradients(answers, "plackett_luce", CACHE_MODE, **given)
    torch.testing.assert_close(gradients(answers, "plackett_luce", PAIRS_MODE, **given)[1], want)
    plant(monkeypatch)
    _, got = gradients(answers, "plackett_luce", PAIRS_MODE, **given)
    for ours, theirs in zip(got, want, strict=True):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(ours, theirs)
