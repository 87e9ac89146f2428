"""Liger's and the hub's kernels for the backbone: where they go, and that the head stays ours.

On a CPU Liger's kernels cannot run; what is seen here is that they are in place.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdpo import doctor
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.command_line import parse_train
from tests.training.conftest import made_tokenizer, make_rows, quick_args, tiny_llama

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
    reason="liger-kernel is not installed",
)


@pytest.fixture
def unpatched() -> Any:
    """Liger replaces functions of transformers' module for good."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


def made(folder: Path, bpe: str, **settings: Any) -> PreferenceTrainer:
    args = quick_args(folder, **settings)
    return PreferenceTrainer(
        tiny_llama(), args, train_dataset=make_rows(8), processing_class=made_tokenizer(bpe)
    )


@needs_liger
def test_ligers_kernels_are_in_policy_and_reference_and_the_head_is_ours(
    tmp_path: Path, trained_bpe: str, unpatched: None
):
    from liger_kernel.ops.rope import LigerRopeFunction  # noqa: F401
    from transformers.models.llama import modeling_llama

    trainer = made(
        tmp_path / "run", trained_bpe, use_liger_kernel=True, liger_kernel_config={"swiglu": False}
    )
    for model in (trainer.model, trainer.reference.model):
        assert model is not None
        norm = model.model.norm  # type: ignore[union-attr]
        assert "liger" in norm.forward.__func__.__module__ and norm.forward.__self__ is norm
        mlp = model.model.layers[0].mlp  # type: ignore[union-attr]
        assert "liger" not in mlp.forward.__func__.__module__  # switched off by the config
        # The forward is our class's, not one of Liger's on the model.
        assert "forward" not in vars(model) and type(model).__dict__["_fastdpo_hook"] is not None
    assert "liger" in modeling_llama.apply_rotary_pos_emb.__module__
    assert trainer.args.liger_kernel_config == {
        "swiglu": False,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    lines = dict(doctor(trainer).sections["Trainer PreferenceTrainer"])
    assert lines["kernels of the backbone"] == "Liger's, but for cross_entropy and fused_linear_cross_entropy"
    assert "refused" not in dict(doctor(trainer).sections["Model LlamaForCausalLM"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"liger_kernel_config": {"rope": True}}, "without use_liger_kernel, wanted both"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "liger_kernel_config: got fused_linear_cross_entropy, wanted it off",
        ),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}},
            "liger_kernel_config: got cross_entropy, wanted it off",
        ),
    ],
)
def test_what_liger_must_not_do(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    with pytest.raises(ValueError, match=said):
        quick_args(tmp_path, **settings)


def test_what_is_not_installed_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(ValueError, match="use_liger_kernel: got True, which needs liger-kernel"):
        quick_args(tmp_path, use_liger_kernel=True)
    with pytest.raises(ValueError, match="use_kernels: got True, which needs kernels"):
        parse_train(["--model", "m", "--dataset", "d", "--use_cpu", "--use_kernels"])


def test_the_hubs_kernels_are_asked_for_as_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "kernels", sys)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    words = ["--model", str(tmp_path), "--dataset", "d", "--use_cpu"]
    assert parse_train([*words, "--use_kernels"]).loading_options()["use_kernels"] is True
    run = parse_train(words)
    assert "use_kernels" not in run.loading_options()
