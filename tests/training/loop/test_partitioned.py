"""Models that ZeRO-3 has split as it loaded them, before an engine runs: DeepSpeed's part is played here.

With DeepSpeed itself: ``tests/distributed/test_loop_engines.py``, "by its path".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fastdpo.integrations.engines import copied
from fastdpo.integrations.partitioned import gathered_in_calls, whole_shape
from fastdpo.training.batches.layouts import layout_of
from fastdpo.training.loop.run_record import _what_is_trained
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference.cache import fingerprint_model
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, tiny_llama

Status = Enum("Status", "AVAILABLE NOT_AVAILABLE")


def split(model: Any) -> Any:
    """The model with its weights put away."""
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_shape = id(parameter), parameter.shape
        parameter.ds_tensor, parameter.ds_status = parameter.data.clone(), Status.NOT_AVAILABLE
        parameter.data = torch.empty(0)
    return model


class Gathering:
    """``GatheredParameters``, and how many weights were whole at once."""

    most, now = 0, 0

    def __init__(self, parameters: list[Any]) -> None:
        self.parameters = parameters

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.data, parameter.ds_status = parameter.ds_tensor.clone(), Status.AVAILABLE
        type(self).now += len(self.parameters)
        type(self).most = max(self.most, self.now)

    def __exit__(self, *_: Any) -> None:
        for parameter in self.parameters:
            parameter.data, parameter.ds_status = torch.empty(0), Status.NOT_AVAILABLE
        type(self).now -= len(self.parameters)


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    theirs = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathering))
    monkeypatch.setattr(
        "fastdpo.integrations.partitioned.sys", SimpleNamespace(modules={"deepspeed": theirs})
    )
    Gathering.most = 0
    yield
    assert Gathering.now == 0


def test_modules_are_whole_in_their_own_calls_alone() -> None:
    ids = torch.tensor([[5, 7, 9]])
    wanted = tiny_llama(1)(ids).logits
    model = split(tiny_llama(1))
    with torch.no_grad(), gathered_in_calls(model):
        assert torch.equal(model(ids).logits, wanted)
    assert Gathering.most == 1
    assert all(not parameter.numel() for parameter in model.parameters())
    with torch.no_grad(), gathered_in_calls(model), pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert all(not parameter.numel() for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_where_an_engine_gathers_nothing_else_does() -> None:
    model = split(tiny_llama(1))
    model.lm_head._parameters = type("ZeROOrderedDict", (dict,), {})(model.lm_head._parameters)
    with gathered_in_calls(model):
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_fingerprint_is_that_of_the_whole_weights() -> None:
    whole, other = tiny_llama(1), tiny_llama(2)
    assert fingerprint_model(split(tiny_llama(1))) == fingerprint_model(whole) != fingerprint_model(other)


def test_sizes_are_those_of_whole_weights() -> None:
    whole, model = tiny_llama(1), split(tiny_llama(1))
    assert [whole_shape(p) for p in model.parameters()] == [p.shape for p in whole.parameters()]
    assert _what_is_trained(model, False) == _what_is_trained(whole, False)


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
def test_layouts_are_tried_on_it(
    layout: str, make_args: Callable[..., PreferenceConfig], tokenizer: Any
) -> None:
    args = make_args(loss_type="simpo", batch_layout=layout)
    trainer = PreferenceTrainer(
        split(tiny_llama()), args, train_dataset=make_rows(4), processing_class=tokenizer
    )
    assert layout_of(trainer.data_collator) == layout


def test_a_layout_that_changes_it_is_refused(
    make_args: Callable[..., PreferenceConfig], tokenizer: Any
) -> None:
    model = split(tiny_llama())
    model.model.rotary_emb = _Positions()
    args = make_args(loss_type="simpo", batch_layout="shared_prompt")
    with pytest.raises(ValueError, match="batch_layout: got 'shared_prompt', which this model cannot be"):
        PreferenceTrainer(model, args, train_dataset=make_rows(4), processing_class=tokenizer)


class _Positions(nn.Module):
    """Counts a row's tokens, whatever their positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.own = tiny_llama().model.rotary_emb

    def forward(self, states: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.own(states, torch.arange(position_ids.shape[-1])[None], *args, **kwargs)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Linear(2, 2), "which is a Linear and no model of transformers"),
        (
            lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])),
            "which is a PeftModel and no model of transformers",
        ),
        # Made here as ever, and so not split: as a model would be whose config says less than it is.
        (tiny_llama, "whose lm_head.weight its config does not make"),
    ],
)
def test_what_cannot_be_copied_is_said(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"reference: got 'copy' .* {said}: wanted a ref_model"):
        copied(split(make()))
