"""TRL's other trainers with the patch and without it: the same losses, gradients and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from fastdpo import Execution, patch_trl
from fastdpo.integrations.trl_logprob import FusedLogProb
from tests.integrations import trl_runs as runs


def compare(make_trainer: Any, *, but: tuple[str, ...] = ()) -> tuple[runs.Run, runs.Run]:
    ours, theirs = runs.side_by_side(make_trainer, patch_trl)
    runs.assert_alike(ours, theirs, but=but)
    return ours, theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss_type": "apo_zero_unpaired"},
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_kto(changes: dict[str, Any], tmp_path: Path) -> None:
    def make_trainer() -> KTOTrainer:
        return KTOTrainer(
            runs.policy(),
            ref_model=runs.reference(),
            args=KTOConfig(**runs.settings(tmp_path, **changes)),
            train_dataset=runs.unpaired(),
            eval_dataset=runs.unpaired(),
            processing_class=runs.make_tokenizer(),
        )

    compare(make_trainer)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({}, "mixtral"),
        ({"loss_type": "dft"}, "gemma2"),
        ({"loss_type": "dft"}, "mixtral"),
        ({"completion_only_loss": False}, "llama"),
        ({"completion_only_loss": False}, "gemma2"),
    ],
    ids=str,
)
def test_sft(changes: dict[str, Any], family: str, tmp_path: Path) -> None:
    def make_trainer() -> SFTTrainer:
        return SFTTrainer(
            runs.policy(family, **({"output_router_logits": True} if family == "mixtral" else {})),
            args=SFTConfig(**runs.settings(tmp_path, **changes)),
            train_dataset=runs.completions(),
            eval_dataset=runs.completions(),
            processing_class=runs.make_tokenizer(),
        )

    compare(make_trainer)


def reward(completions: list[str], **_: Any) -> list[float]:
    """Any function of the text that tells two answers apart."""
    return [
        float(sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) % 17) for text in completions
    ]


def make_online(kind: Any, config: Any, folder: Path, **changes: Any) -> Any:
    changes = {"max_steps": 2, "num_generations": 2, "max_completion_length": 6, **changes}
    path = folder / "policy"  # where the trainers load their reference from
    runs.policy().save_pretrained(path)
    return kind(
        str(path),
        reward_funcs=reward,
        args=config(**runs.settings(folder, **changes)),
        train_dataset=runs.prompts(),
        processing_class=runs.make_tokenizer(),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.1},
        {"temperature": 0.7},
        {"entropy_coef": 0.05, "temperature": 0.7},
        {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 10.0},
        {"top_entropy_quantile": 0.5},
        {"cast_lm_head_to_fp32": True},
        {"num_iterations": 2, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_grpo(changes: dict[str, Any], tmp_path: Path) -> None:
    compare(lambda: make_online(GRPOTrainer, GRPOConfig, tmp_path, **changes))


def test_the_entropy_bonus_reaches_the_gradient(tmp_path: Path) -> None:
    """It would be silently off if the entropy came without a graph."""
    with patch_trl():
        without = runs.record(make_online(GRPOTrainer, GRPOConfig, tmp_path, max_steps=1))
        bonus = runs.record(make_online(GRPOTrainer, GRPOConfig, tmp_path, max_steps=1, entropy_coef=0.5))
    gaps = [(without.grads[n] - bonus.grads[n]).norm() / without.grads[n].norm() for n in without.grads]
    assert max(gaps) > 0.01


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1, "temperature": 0.7}], ids=str)
def test_rloo(changes: dict[str, Any], tmp_path: Path) -> None:
    compare(lambda: make_online(RLOOTrainer, RLOOConfig, tmp_path, **changes))


@pytest.mark.parametrize("kind", ["kto", "sft", "grpo", "rloo"])
def test_the_patched_function_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    apply = FusedLogProb.apply

    def counted(self: Any, *args: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return apply(self, *args)

    monkeypatch.setattr(FusedLogProb, "apply", counted)
    common = {"processing_class": runs.make_tokenizer()}
    options = runs.settings(tmp_path, max_steps=1)
    with patch_trl(execution=Execution(workspace_mib=8)):
        if kind == "kto":
            trainer: Any = KTOTrainer(
                runs.policy(),
                ref_model=runs.reference(),
                args=KTOConfig(**options),
                train_dataset=runs.unpaired(),
                **common,
            )
        elif kind == "sft":
            trainer = SFTTrainer(
                runs.policy(), args=SFTConfig(**options), train_dataset=runs.completions(), **common
            )
        else:
            classes = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
            trainer = make_online(*classes, tmp_path, max_steps=1)
        runs.record(trainer)
    assert True in calls
