"""`patch_trl` of TRL 0.24: its KTO, CPO and ORPO trainers with the patch and without, by every option."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo import patch_trl
from tests.integrations import trl_runs as runs
from tests.integrations.trl_0_24_runs import (  # noqa: F401  (a fixture)
    STEPS,
    KTOTrainer,
    compare,
    make_cpo_or_orpo,
    make_kto,
    policy,
    unpatched,
)

# Sums of thousands of logits of both signs, of which next to nothing is left.
SUMS = ("logits/chosen", "logits/rejected")

pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": STEPS},
        {"loss_type": "apo_zero_unpaired", "max_steps": STEPS},
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"precompute_ref_log_probs": True},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"family": "gemma2"},
        {"eval_dataset": True},
    ],
    ids=str,
)
def test_kto(changes: dict[str, Any], tmp_path: Path) -> None:
    if changes.get("eval_dataset"):
        changes = {"eval_dataset": runs.unpaired()}
    ours, _ = compare(lambda: make_kto(tmp_path, **changes), but=(*SUMS, "eval_loss"))
    assert {"kl", "rewards/margins", "logps/chosen"} <= {name for entry in ours.logs for name in entry}


def test_kto_with_an_adapter(tmp_path: Path) -> None:
    import peft

    def make() -> KTOTrainer:
        torch.manual_seed(1)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        return make_kto(tmp_path, peft_config=lora)

    compare(make, but=SUMS)


def test_the_auxiliary_loss_of_kto(tmp_path: Path) -> None:
    def make() -> KTOTrainer:
        model = policy("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
        return make_kto(tmp_path, family="mixtral", model=model)

    compare(make, but=SUMS)


def test_the_sums_of_logits_that_kto_logs(tmp_path: Path) -> None:
    trainer = make_kto(tmp_path, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs, ours = trainer.get_batch_loss_metrics(trainer.model, batch)[1], None
    with patch_trl(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="logits")
        ours = trainer.get_batch_loss_metrics(trainer.model, batch)[1]
    for name in ("logits/chosen_sum", "logits/rejected_sum"):
        # The same sums of some thousand logits of about 3, in another order.
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-2)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("cpo", {"max_steps": STEPS}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 1.0, "max_steps": STEPS}),
        ("cpo", {"loss_type": "hinge"}),
        ("cpo", {"loss_type": "ipo", "cpo_alpha": 0.0}),
        ("cpo", {"label_smoothing": 0.1, "gradient_checkpointing": True}),
        ("cpo", {"family": "mixtral"}),
        ("orpo", {"max_steps": STEPS}),
        ("orpo", {"beta": 0.5, "family": "gemma2"}),
        ("orpo", {"family": "mixtral"}),
    ],
    ids=str,
)
def test_cpo_and_orpo(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    compare(lambda: make_cpo_or_orpo(kind, tmp_path, **changes))
