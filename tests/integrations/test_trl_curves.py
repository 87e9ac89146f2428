"""Thirty steps of every TRL trainer, with the patch and without: the same losses and metrics, on real data.

The other files run each option for two steps, where a drift would not show. Each test prints its largest
difference (``pytest -s``), in the measure of `trl_runs.METRIC_TOLERANCE`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from fastdpo import patch_trl
from tests.integrations import trl_runs as runs
from tests.integrations.test_trl_dpo import LOSSES
from tests.integrations.test_trl_trainers import make_online

pytestmark = pytest.mark.slow

STEPS = 30
LENGTH = 64  # the longest position that the tiny models have
# Words of a text. A reward is beta times a difference of sums over an answer: of 60 tokens these are about
# 580, known in fp32 to 3e-5, in TRL as here; of 15 tokens their difference stays below the tolerance.
PROMPT, ANSWER = 12, 12


@pytest.fixture(scope="module")
def texts() -> list[dict[str, str]]:
    from tests.conftest import _rows, _shared

    return [
        {"prompt": cut(row["prompt"], PROMPT)}
        | {name: " " + cut(row[name], ANSWER) for name in ("chosen", "rejected")}
        for row in _rows(_shared("preference_en.jsonl"))[:48]
    ]


@pytest.fixture(scope="module")
def tokenizer(texts: list[dict[str, str]]) -> Any:
    return runs.word_tokenizer([text for row in texts for text in row.values()])


def cut(messages: list[dict[str, str]], words: int) -> str:
    return " ".join(messages[-1]["content"].split()[:words])


@pytest.fixture
def thirty_steps(tokenizer: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., runs.Run]:
    """Both runs of a trainer; the same curves, and something in them to compare."""

    def run(
        trainer: Any, config: Any, rows: list[dict[str, Any]], *, but: tuple[str, ...] = (), **changes: Any
    ) -> runs.Run:
        reference = {"ref_model": True} if changes.pop("has_reference", False) else {}
        settings = runs.settings(tmp_path, max_steps=STEPS, **{"learning_rate": 1e-4, **changes})

        def make() -> Any:
            return trainer(
                model=runs.policy(),
                **{name: runs.reference() for name in reference},
                args=config(**settings),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )

        return check(request, make, but=but)

    return run


def check(request: Any, make: Callable[[], Any], *, but: tuple[str, ...] = ()) -> runs.Run:
    ours, theirs = runs.side_by_side(make, patch_trl)
    gap, what = runs.largest_difference(ours, theirs, but=but)
    print(f"\nlargest difference {gap:.1e} ({what})  {request.node.name}")
    runs.assert_alike(ours, theirs, but=but)
    curves = [[log[name] for log in ours.logs if name in log] for name in ("loss", "entropy")]
    assert len(ours.losses) >= STEPS and max(len({*curve}) for curve in curves) > STEPS // 2
    return ours


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_dpo(loss_type: str, thirty_steps: Any, texts: Any) -> None:
    options = {"loss_type": [loss_type], "max_length": LENGTH, **LOSSES[loss_type]}
    if loss_type == "sigmoid_norm":
        options["beta"] = 0.5  # of rewards, which are sums all the same
    # discopop's gradient is a sigmoid's of the log-ratio over 0.05: 20 times as sensitive to its rounding.
    but = ("grad_norm",) if loss_type == "discopop" else ()
    thirty_steps(DPOTrainer, DPOConfig, texts, has_reference=True, but=but, **options)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: str, thirty_steps: Any, texts: Any) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(texts)
    ]
    options = {"loss_type": loss_type, "max_length": LENGTH}
    thirty_steps(KTOTrainer, KTOConfig, rows, has_reference=True, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": "simpo", "cpo_alpha": 0.0},
        {"loss_type": "simpo", "cpo_alpha": 0.5},
        {"loss_type": "alphapo", "alpha": 0.3},
    ],
    ids=str,
)
def test_cpo(changes: dict[str, Any], thirty_steps: Any, texts: Any) -> None:
    thirty_steps(CPOTrainer, CPOConfig, texts, max_length=LENGTH, **changes)


def test_orpo(thirty_steps: Any, texts: Any) -> None:
    thirty_steps(ORPOTrainer, ORPOConfig, texts, max_length=LENGTH)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_tpo(loss_type: str, thirty_steps: Any, texts: Any) -> None:
    rows = [row | {"reference": row["chosen"], "chosen": row["chosen"] + " so"} for row in texts]
    thirty_steps(TPOTrainer, TPOConfig, rows, loss_type=loss_type)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft(loss_type: str, thirty_steps: Any, texts: Any) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in texts]
    thirty_steps(SFTTrainer, SFTConfig, rows, loss_type=loss_type, max_length=LENGTH)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("grpo", {}),
        ("grpo", {"beta": 0.1, "entropy_coef": 0.05, "temperature": 0.7}),
        ("rloo", {"beta": 0.1}),
    ],
    ids=str,
)
def test_online(kind: str, changes: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Where a rounding decides which token is sampled, runs part; these, of a fixed seed, do not."""
    classes = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
    options = {"max_steps": STEPS, "learning_rate": 1e-4, **changes}
    check(request, lambda: make_online(*classes, tmp_path, **options))
