"""Lazy logits as trainers meet them beside the loss: what they log, and calls of a step without gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import patch_model
from fastdpo.integrations.lazy import LazyLogits, MadeLogits
from tests.integrations.lazy_losses import LARGE, Rows, dpo_repository
from tests.integrations.tiny import make_model


def lazy_model(model: Any, **options: Any) -> Any:
    return patch_model(copy.deepcopy(model), logits="lazy", **{"on_materialize": "error", **options})


METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda logits: logits.mean(),
    "mean of rows": lambda logits: logits[LARGE.labels != -100].mean(-1),
    "sum": lambda logits: logits.sum(),
    "sum of rows": lambda logits: logits.sum(-1),
    "nansum": lambda logits: logits[:2].nansum(),
    "nansum of none": lambda logits: logits[[]].nansum(),
    "sum in fp64": lambda logits: logits.sum(dtype=torch.float64),
    "of a list": lambda logits: logits[[1, 3]].sum(-1),
    "of log-probabilities": lambda logits: logits.log_softmax(-1).sum(),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_sums_and_means_of_logits(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a gradient; without a cap no row is projected for those of logits."""
    model = make_model(family).train().double()
    patched, has_cap = lazy_model(model), family == "gemma2"
    for context in (torch.no_grad,) if has_cap else (torch.no_grad, torch.enable_grad):
        ours, theirs = patched(**LARGE.inputs).logits, model(**LARGE.inputs).logits
        rows = Rows(monkeypatch)
        with context():
            found, wanted = METRICS[name](ours) + 0, METRICS[name](theirs)
        assert type(found) is Tensor and found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
        if not has_cap and name != "of log-probabilities":
            assert rows.count == 0


def test_a_nan_among_the_logits_is_left_out_as_torch_does() -> None:
    model = make_model().train()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    ours = lazy_model(model, on_materialize="warn")(**LARGE.inputs).logits.detach()
    with pytest.warns(UserWarning, match="nansum"):
        found = ours.nansum()
    assert torch.allclose(found, model(**LARGE.inputs).logits.nansum(), rtol=1e-5)


def test_a_step_scores_without_gradients_too() -> None:
    """A reference that is the policy without its adapter is in training mode, and has no gradients."""
    model = make_model().train()
    patched = lazy_model(model)
    with torch.no_grad():
        logits = patched(**LARGE.inputs).logits
        assert isinstance(logits, LazyLogits)
        wanted = dpo_repository(model(**LARGE.inputs).logits, LARGE.labels)
        assert torch.allclose(dpo_repository(logits, LARGE.labels), wanted, atol=1e-4)
        assert type(patched.eval()(**LARGE.inputs).logits) is Tensor


def test_generation_in_training_mode_has_real_logits() -> None:
    model = make_model().train()
    patched = lazy_model(model)
    for use_cache in (True, False):
        arguments = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
        inputs = {name: value[:1, :5] for name, value in LARGE.inputs.items()}
        assert torch.equal(patched.generate(**inputs, **arguments), model.generate(**inputs, **arguments))


@pytest.mark.parametrize("keep", [7, torch.tensor([3, 5, 6])], ids=["last", "chosen"])
def test_logits_to_keep_of_answers(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().train()
    rows = Rows(monkeypatch)
    chosen = slice(-keep, None) if isinstance(keep, int) else keep
    labels = LARGE.labels[:, chosen]
    found, wanted = (
        dpo_repository(each(**LARGE.inputs, logits_to_keep=keep).logits, labels)
        for each in (lazy_model(model), model)
    )
    assert torch.allclose(found, wanted, atol=1e-4)
    assert rows.count == int((labels[:, 1:] != -100).sum())


def test_one_position_to_keep_is_the_next_token() -> None:
    patched = lazy_model(make_model().train())
    assert type(patched(**LARGE.inputs, logits_to_keep=1).logits) is Tensor
    with pytest.raises(MadeLogits, match="topk"):
        patched(**LARGE.inputs, logits_to_keep=2).logits.topk(3)
