"""References in carried contexts: of the tokens that are scored alone, or of whole rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import CarriedContext, HeadStates, TeacherCombination, Teachers, patch_model
from fastdpo.integrations.fused_output import require_states
from tests.integrations.test_carried import make_rows
from tests.integrations.tiny import make_model

CONTEXT = CarriedContext(7)


def states_of(model: Any, rows: Any, *, carried: bool, labelled: bool) -> HeadStates:
    asked = {"row_batches": calls_of(rows, carried=carried)}
    if labelled:
        asked["token_layout"] = rows.tokens
    with torch.no_grad():
        return require_states(model(**asked, return_states=True))


def calls_of(rows: Any, *, carried: bool) -> list[dict[str, Any]]:
    return [{**call, "context": CONTEXT} if carried else call for call in rows.calls]


def test_carried_states_are_those_of_labelled_tokens() -> None:
    model, rows = patch_model(make_model()), make_rows()
    whole = states_of(model, rows, carried=False, labelled=False).hidden
    torch.testing.assert_close(states_of(model, rows, carried=False, labelled=True).hidden, whole)
    kept = rows.tokens.token_index.unique()
    assert len(kept) < len(whole)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        states_of(model, rows, carried=True, labelled=True).hidden, whole[kept], **near
    )
    torch.testing.assert_close(states_of(model, rows, carried=True, labelled=False).hidden, whole, **near)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", ["states", "teachers", "pair_loss", "teacher_hidden"])
def test_a_carried_step_takes_references_of_either_kind(kind: str, labelled: bool, carried: bool) -> None:
    model, rows = patch_model(make_model()), make_rows()
    first, second = (patch_model(make_model(seed=seed)) for seed in (1, 2))

    def step(context: bool, references: list[HeadStates]) -> tuple[Tensor, ...]:
        asked: dict[str, Any] = {}
        if kind == "states":
            asked = {"reference": references[0], "logps_outputs": ("forward_kl",)}
        elif kind == "teachers":
            made = Teachers(*references, TeacherCombination(0.5, 0.25, 0.25))
            asked = {"reference": made, "logps_outputs": ("reverse_kl",)}
        else:
            name, loss = {"pair_loss": ("ref", "sigmoid"), "teacher_hidden": ("teacher", "gkd")}[kind]
            its = {f"{name}_hidden": references[0].hidden, f"{name}_lm_head": references[0].lm_head}
            asked = {"pair_loss": {"loss_type": loss, **its}}
        out = model(
            row_batches=calls_of(rows, carried=context), token_layout=rows.tokens, return_logps=True, **asked
        )
        if out.pair_loss is None:
            loss_value = (out.logps + out[asked["logps_outputs"][0]]).sum()
        else:
            loss_value = out.pair_loss.loss
        return loss_value, *torch.autograd.grad(loss_value, list(model.parameters()))

    whole = [states_of(other, rows, carried=False, labelled=False) for other in (first, second)]
    given = [states_of(other, rows, carried=carried, labelled=labelled) for other in (first, second)]
    for found, wanted in zip(step(True, given), step(False, whole), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-3)


def test_states_of_other_rows_are_refused() -> None:
    model, rows = patch_model(make_model()), make_rows()
    with pytest.raises(ValueError, match="token_layout: got list, wanted a TokenLayout"):
        model(row_batches=calls_of(rows, carried=True), token_layout=[1], return_states=True)
    states = states_of(model, rows, carried=False, labelled=False)
    wrong = HeadStates(states.hidden[:-1], states.lm_head)
    with pytest.raises(ValueError, match="ref_hidden: got shape"):
        model(
            row_batches=calls_of(rows, carried=True), token_layout=rows.tokens, return_logps=True,
            reference=wrong, logps_outputs=("forward_kl",),
        )  # fmt: skip
