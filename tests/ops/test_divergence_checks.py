"""A caller's mistake with ``token_divergence`` names the argument, what was got and what is wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdpo import Execution, TeacherCombination, token_divergence
from tests.ops.divergence_cases import small

HIDDEN, WEIGHT, LABELS = torch.randn(2, 5, 8), torch.randn(11, 8), torch.zeros(2, 5).long()
SECOND = {"second_hidden": HIDDEN, "combination": TeacherCombination(1.0, 0.0)}
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"ref_lm_head": torch.randn(12, 8)}, r"ref_lm_head: got a vocabulary of 12, wanted 11"),
    ({"vocab_size": 12}, r"vocab_size: got 12, wanted at most 11, the rows of lm_head"),
    ({"vocab_size": 11, "ref_lm_head": torch.randn(10, 8)}, r"at most 10, the rows of ref_lm_head"),
    ({"vocab_size": 5.0}, r"vocab_size: got 5.0, wanted a whole number from 1"),
    ({"ref_hidden": torch.randn(2, 5, 9)}, r"ref_hidden: got shape \(2, 5, 9\)"),
    ({"ref_hidden": torch.randn(2, 4, 8)}, r"ref_hidden: got shape \(2, 4, 8\)"),
    ({"ref_hidden": HIDDEN.long()}, "ref_hidden: got torch.int64"),
    ({"ref_hidden": HIDDEN.to("meta")}, "ref_hidden: got meta"),
    ({"ref_hidden": HIDDEN.double(), "ref_lm_head": WEIGHT.double()}, "ref_hidden: got torch.float64 beside"),
    ({"hidden": torch.randn(2, 5, 9)}, r"hidden: got shape \(2, 5, 9\)"),
    ({"labels": LABELS[0]}, r"labels: got shape \(5,\)"),
    ({"outputs": ()}, r"outputs: got \(\), wanted at least one"),
    ({"outputs": "jsd"}, "outputs: got 'jsd', wanted a tuple"),
    ({"outputs": ("kl",)}, "outputs: got 'kl', wanted names"),
    ({"outputs": ("jsd", "l1_distance")}, "l1_distance.*two teachers"),
    ({"outputs": ("l1_distance",), **SECOND}, "wanted at least one"),
    ({"jsd_beta": 0.5}, "jsd_beta: got 0.5, wanted None"),
    ({"jsd_beta": 1.0, "outputs": ("jsd",)}, "jsd_beta: got 1.0, wanted a number between 0 and 1"),
    ({"second_hidden": HIDDEN}, "combination: got NoneType, wanted a TeacherCombination"),
    ({"combination": TeacherCombination(1.0, 0.0)}, "combination: got a value without second_hidden"),
    ({"second_lm_head": WEIGHT}, "second_lm_head: got a value without second_hidden"),
    (SECOND | {"second_lm_head": torch.randn(10, 8)}, "second_lm_head: got a vocabulary of 10"),
    (SECOND | {"combination": TeacherCombination(torch.ones(3), 0.0)}, r"combination.first: got .*\(3,\)"),
    (SECOND | {"combination": TeacherCombination(1.0, float("nan"))}, "combination.second: got nan"),
    (SECOND | {"combination": TeacherCombination(1.0, 0.0, LABELS)}, "combination.first_slope"),  # type: ignore[arg-type]
    ({"execution": Execution(mode="lean")}, "execution.mode: got 'lean'"),
    ({"execution": Execution(mode="pairs")}, "execution.mode: got 'pairs'"),
    ({"execution": Execution(backend="cuda")}, "execution.backend: got 'cuda'"),
    ({"execution": Execution(logits_dtype="bf16")}, "execution.logits_dtype: got 'bf16'"),
    ({"execution": Execution(mode="score"), "hidden": HIDDEN.clone().requires_grad_()}, "'score'"),
    (
        {
            "execution": Execution(mode="stash"),
            "hidden": HIDDEN.clone().requires_grad_(),
            "outputs": ("jsd", "forward_kl"),
        },
        "'stash' with several divergences",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), BAD_CALLS, ids=[message[:45] for _, message in BAD_CALLS])
def test_bad_calls(changed: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"hidden": HIDDEN, "lm_head": WEIGHT, "ref_hidden": HIDDEN, "labels": LABELS}
    token_divergence(**good)
    with pytest.raises(ValueError, match=message):
        token_divergence(**good | changed)


def test_a_workspace_without_room_for_a_row_of_each_head() -> None:
    with pytest.raises(ValueError, match="workspace_mib"):
        token_divergence(
            torch.randn(2, 4),
            torch.randn(150_000, 4),
            torch.randn(2, 4),
            torch.zeros(2).long(),
            execution=small(),
        )
