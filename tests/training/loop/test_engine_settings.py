"""An engine that would be ignored is refused."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo import cli
from fastdpo.training.loop.engines import settle_engine
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.engines import check_engine, told_engine
from tests.training.conftest import make_rows

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (make test-deepspeed)"
)


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
    ("said", "named"),
    [
        ({"engine": "fsdp2"}, "engine: got 'fsdp2'"),
        ({"fsdp": True}, "fsdp: got FSDP2"),
        pytest.param({"engine": "zero2"}, "engine: got 'zero2'", marks=needs_deepspeed),
        pytest.param({"engine": "zero3"}, "engine: got 'zero3'", marks=needs_deepspeed),
        pytest.param(
            {"deepspeed": {"zero_optimization": {"stage": 1}}}, "deepspeed: got ZeRO-1", marks=needs_deepspeed
        ),
    ],
)
def test_an_engine_in_one_process_is_refused_and_leaves_nothing_behind(
    said: dict[str, Any],
    named: str,
    make_args: Callable[..., PreferenceConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    def told() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}

    before = told()
    wanted = f"{named} in one process, wanted torchrun --nproc_per_node N or accelerate launch"
    with pytest.raises(ValueError, match=wanted):
        PreferenceTrainer("nowhere", make_args(**said), train_dataset=make_rows(4))
    words = [word for name, value in said.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
    files = ["--model", "nowhere", "--dataset", "nowhere.jsonl", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", *files, "--use_cpu", *words]) == 2
    assert capsys.readouterr().err == f"fastdpo: error: {wanted}\n"
    assert told() == before
    assert told_engine(make_args()) is None


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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_that_deepspeed_takes_are_not_left_out(stage: int, make_args: Callable[..., PreferenceConfig]):
    args = make_args(on_nonfinite_loss="skip")
    with pytest.raises(ValueError, match=f"on_nonfinite_loss: got 'skip' under ZeRO-{stage}.*wanted 'stop'"):
        check_engine(args, f"ZeRO-{stage}")
    check_engine(args, "FSDP2")
