"""A tolerance is worth what it catches: planted bugs must be found, correct heads must pass."""

from __future__ import annotations

import pytest
import torch

from fastdpo.testing import (
    PLANTED_BUGS,
    assert_close_to_fp64,
    assert_logps_close,
    assert_results_close,
    emulated_results,
    make_case,
    same_sign_case,
)
from fastdpo.testing.accuracy import logps_bound

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_there_are_twelve_bugs():
    assert len(PLANTED_BUGS) == 12


@pytest.mark.promise(11)
@pytest.mark.parametrize("name", PLANTED_BUGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planted_bug_is_caught(name: str, dtype: torch.dtype):
    bug = PLANTED_BUGS[name]
    case = bug.make_case(seed=1, dtype=dtype)
    assert_results_close(emulated_results(case), case)
    with pytest.raises(AssertionError):
        assert_results_close(bug.results(case), case)


@pytest.mark.parametrize("name", PLANTED_BUGS)
def test_planted_bug_is_caught_by_its_weight_gradient_alone(name: str):
    """So that no bug is caught only by the stricter checks on logps and on ignored tokens."""
    bug = PLANTED_BUGS[name]
    case = bug.make_case(seed=2)
    right = emulated_results(case)
    with pytest.raises(AssertionError, match="dweight"):
        assert_results_close(right._replace(dweight=bug.results(case).dweight), case)


@pytest.mark.promise(11)
@pytest.mark.parametrize("recipe", [make_case, same_sign_case], ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize("seed", range(20))
def test_correct_head_raises_no_alarm(recipe, seed: int):
    case = recipe(seed=seed)
    assert_results_close(emulated_results(case), case)


@pytest.mark.parametrize("options", [{"logit_scale": -0.5}, {"softcap": 5.0}, {"temperature": 0.7}], ids=str)
def test_correct_head_with_options_raises_no_alarm(options: dict):
    case = make_case(seed=3, **options)
    assert_results_close(emulated_results(case), case)


def test_data_is_what_the_recipe_promises():
    case = make_case(seed=4)
    ignored = case.labels == case.ignore_index
    assert ignored.double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert ignored[0, 0] and ignored[-1, -1] and ignored.all(1).any() and not ignored.all()
    logits = case.hidden.float() @ case.weight.float().T
    assert 2.5 < logits.std().item() < 3.5
    best = (logits + case.bias.float()).argmax(-1)
    assert (best == case.labels).flatten()[::3][~ignored.flatten()[::3]].all()
    upstream = case.upstream[~ignored]
    assert (upstream < 0).any() and (upstream > 0).any() and (upstream == 0).any()
    again = make_case(seed=4)
    assert torch.equal(case.weight, again.weight) and torch.equal(case.labels, again.labels)


def _noisy(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A truth (256, 32) and its value rounded to bf16."""
    truth = torch.randn(256, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return truth, truth.bfloat16()


def test_one_wrong_entry_is_caught_by_the_largest_error():
    """Too small to move the norm of its block."""
    truth, eager = _noisy()
    ours = eager.clone()
    ours[5, 7] += 0.15
    with pytest.raises(AssertionError, match=r"largest error .* at \(5, 7\)"):
        assert_close_to_fp64(ours, truth, eager)


def test_one_entry_of_fp32_off_by_sixteen_roundings_is_caught():
    """Where eager is a single rounding, the least that it can be; a quarter of that passes."""
    truth, _ = _noisy()
    eager = truth.float()
    for roundings, is_wrong in ((16, True), (4, False)):
        ours = eager.clone()
        ours[5, 7] += roundings * torch.finfo(torch.float32).eps * truth.abs().max().float()
        if is_wrong:
            with pytest.raises(AssertionError, match=r"largest error .* at \(5, 7\)"):
                assert_close_to_fp64(ours, truth, eager)
        else:
            assert_close_to_fp64(ours, truth, eager)


def test_one_wrong_block_is_caught_by_its_norm():
    """Too small for the largest error, which the first block dominates."""
    truth, _ = _noisy()
    truth[:64] *= 1000
    eager = truth.bfloat16()
    ours = eager.clone()
    ours[128:192] *= 1.05
    with pytest.raises(AssertionError, match="rows 128:192"):
        assert_close_to_fp64(ours, truth, eager)


def test_rows_that_must_be_zero_must_be_exactly_zero():
    truth, _ = _noisy()
    truth[64:128] = 0.0
    eager = truth.bfloat16()
    assert_close_to_fp64(eager, truth, eager)
    ours = eager.clone()
    ours[100, 3] = 1e-20
    with pytest.raises(AssertionError, match="rows 64:128"):
        assert_close_to_fp64(ours, truth, eager)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_entries_must_stand_where_the_truth_has_them(value: float):
    truth, eager = _noisy()
    spoiled = eager.clone()
    spoiled[3, 4] = value
    with pytest.raises(AssertionError, match=r"first at \(3, 4\)"):
        assert_close_to_fp64(spoiled, truth, eager)
    truth[3, 4] = value
    assert_close_to_fp64(spoiled, truth, eager)
    with pytest.raises(AssertionError, match=r"first at \(3, 4\)"):
        assert_close_to_fp64(eager, truth, eager)


def test_eager_overflow_grants_nothing():
    truth, eager = _noisy()
    broken_eager = eager.clone()
    broken_eager[0, 0] = float("inf")
    with pytest.raises(AssertionError):
        assert_close_to_fp64(eager * 1.05, truth, broken_eager)


def test_one_dimensional_tensors_go_by_blocks_of_entries():
    truth, eager = (t.flatten()[:130] for t in _noisy())  # the last two entries join the second block
    ours = eager.clone()
    assert_close_to_fp64(ours, truth, eager)
    ours[64:] *= 1.05
    with pytest.raises(AssertionError, match="rows 64:130"):
        assert_close_to_fp64(ours, truth, eager)


def test_checker_refuses_what_it_cannot_compare():
    truth, eager = _noisy()
    with pytest.raises(ValueError, match="shapes"):
        assert_close_to_fp64(eager[1:], truth, eager)
    with pytest.raises(ValueError, match="dtypes"):
        assert_close_to_fp64(eager.float(), truth, eager)
    with pytest.raises(ValueError, match="float64"):
        assert_close_to_fp64(eager, truth.float(), eager)
    with pytest.raises(ValueError, match="float32"):
        assert_logps_close(eager, truth, torch.bfloat16)
    assert_close_to_fp64(eager[:0], truth[:0], eager[:0])


@pytest.mark.parametrize("hidden_size", [0, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logps_tolerance(dtype: torch.dtype, hidden_size: int):
    """1e-5 nats, and what sums over 2048 products add on a CPU."""
    tolerance = logps_bound(hidden_size, dtype)
    assert tolerance == pytest.approx(1e-5 if hidden_size == 0 else 5.3e-5, rel=0.01)
    truth = torch.tensor([-0.5, -20.0, float("-inf"), float("nan")], dtype=torch.float64)
    assert_logps_close((truth + 0.8 * tolerance).float(), truth, dtype, hidden_size=hidden_size)
    with pytest.raises(AssertionError, match=r"\(1,\)"):
        wrong = (truth + tolerance * torch.tensor([0.5, 1.5, 0, 0])).float()
        assert_logps_close(wrong, truth, dtype, hidden_size=hidden_size)
    with pytest.raises(AssertionError, match="NaN"):
        assert_logps_close(truth.nan_to_num(nan=0.0, neginf=float("-inf")).float(), truth, dtype)


@pytest.mark.promise(38)
def test_uninitialised_memory_is_poisoned():
    like = torch.zeros(2, dtype=torch.bfloat16)
    for tensor in (
        torch.empty(2),
        torch.empty_like(like),
        like.new_empty(2),
        torch.empty_strided((2,), (1,)),
    ):
        assert tensor.isnan().all()
    assert torch.empty(1, requires_grad=True).requires_grad
