"""An engine that would be ignored is refused, and what a model split by ZeRO-3 as it was loaded cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo.training.loop.engines import settle_engine
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.engines import check_engine
from tests.training.conftest import make_rows, tiny_llama


@pytest.mark.parametrize("said", [{"engine": "fsdp2"}, {"fsdp": True}])
def test_fsdp_where_accelerate_would_not_run_it(
    said: dict[str, Any], make_args: Callable[..., PreferenceConfig]
):
    args = make_args(**said)
    of_cpus: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=object()),
        distributed_type="DistributedType.MULTI_CPU",
        num_processes=2,
        device=torch.device("cpu"),
    )
    with pytest.raises(ValueError, match="fsdp: got FSDP2, .* here are 2 on cpu: wanted torchrun"):
        settle_engine(args, of_cpus)
    settle_engine(make_args(), of_cpus)


@pytest.mark.parametrize(
    ("settings", "variables", "named"),
    [
        ({"engine": "zero2"}, {}, "engine: got 'zero2'"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {}, "deepspeed: got its settings"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate launch: got DeepSpeed"),
        ({"sp_size": 2}, {"WORLD_SIZE": "2"}, "sp_size: got 2"),
    ],
    ids=["engine", "deepspeed", "launch", "sequences"],
)
def test_deepspeed_that_is_not_installed_is_named(
    settings: dict[str, Any],
    variables: dict[str, str],
    named: str,
    make_args: Callable[..., PreferenceConfig],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{named}, which needs DeepSpeed: pip install deepspeed"):
        make_args(**settings)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_largest_batch_is_not_tried_under_deepspeed(
    stage: int, make_args: Callable[..., PreferenceConfig]
):
    asked = make_args(longest_batch_first=True)
    with pytest.raises(ValueError, match=f"longest_batch_first: got True under ZeRO-{stage}"):
        check_engine(asked, f"ZeRO-{stage}")
    by_default = make_args()
    by_default.longest_batch_first = True  # as on a GPU
    by_default.given.pop("longest_batch_first", None)
    check_engine(by_default, f"ZeRO-{stage}")
    assert by_default.longest_batch_first is False


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"reference": "copy"},
            "reference: got 'copy' of a model that ZeRO-3.* a ref_model",
        ),
        (
            {"loss_type": "simpo", "batch_layout": "packed"},
            "batch_layout: got 'packed' with a model that ZeRO-3",
        ),
    ],
)
def test_a_partitioned_model_is_not_looked_into(
    settings: dict[str, Any], said: str, make_args: Callable[..., PreferenceConfig], tokenizer: Any
):
    model = _partitioned()
    with pytest.raises(ValueError, match=said):
        PreferenceTrainer(
            model, make_args(**settings), train_dataset=make_rows(4), processing_class=tokenizer
        )


def test_nothing_is_scored_with_a_partitioned_model(
    make_args: Callable[..., PreferenceConfig], tokenizer: Any, tmp_path: Path
):
    """Its weights are empty, so its fingerprint would be that of any other model's."""
    args = make_args(reference="precomputed", reference_cache_dir=str(tmp_path / "cache"))
    trainer = PreferenceTrainer(_partitioned(), args, train_dataset=make_rows(4), processing_class=tokenizer)
    with pytest.raises(ValueError, match="'precomputed' cannot score with a model that ZeRO-3 has split"):
        trainer.train()


def _partitioned() -> Any:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]
    return model
