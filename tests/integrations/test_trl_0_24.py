"""`patch_trl` of TRL 0.24: what is wrapped and comes back, what goes on as it is, what is left behind.

TRL 0.24 does not import with the libraries of the other tests: ``make test-llama-factory`` runs this file and
those of its trainers in an environment of its own; elsewhere they are skipped. `trl_0_24_runs` has to be
imported before TRL, whose classes are therefore taken from there.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdpo
from fastdpo import Execution, patch_model, patch_trl
from tests.integrations import trl_runs as runs
from tests.integrations.trl_0_24_runs import (  # noqa: F401  (a fixture)
    ROUNDED,
    make_cpo_or_orpo,
    make_dpo,
    make_kto,
    make_sft,
    policy,
    unpatched,
)

pytestmark = pytest.mark.usefixtures("unpatched")

DPO = "trl.trainer.dpo_trainer:DPOTrainer.compute_loss"
CPO = "trl.trainer.cpo_trainer:CPOTrainer.compute_loss"


def objects() -> list[Any]:
    """What stands at every place that is patched, looked up without the code under test."""
    found = []
    for module, name in (
        ("dpo", "DPOTrainer.compute_loss"),
        ("dpo", "DPOTrainer.compute_ref_log_probs"),
        ("kto", "KTOTrainer.get_batch_loss_metrics"),
        ("kto", "KTOTrainer.compute_reference_log_probs"),
        ("cpo", "CPOTrainer.compute_loss"),
        ("orpo", "ORPOTrainer.prediction_step"),
    ):
        kind, method = name.split(".")
        found.append(vars(getattr(import_module(f"trl.trainer.{module}_trainer"), kind))[method])
    return found


def test_the_very_methods_come_back() -> None:
    before = objects()
    with patch_trl() as done:
        assert done.is_new and {DPO, CPO} < set(done.replaced) and done.version == "0.24.0"
        assert all(now is not then for now, then in zip(objects(), before, strict=True))
        assert not patch_trl().is_new
        with pytest.raises(ValueError, match="unpatch_trl"):
            patch_trl(execution=Execution(workspace_mib=16))
    assert all(now is then for now, then in zip(objects(), before, strict=True))
    with patch_trl(experimental=False) as done:
        assert DPO in done.replaced and CPO not in done.replaced
        assert all(now is then for now, then in zip(objects()[4:], before[4:], strict=True))


def test_the_doctor_says_what_is_replaced_and_what_is_not(tmp_path: Path) -> None:
    lines = fastdpo.doctor().sections["TRL"]
    assert lines == [("patch_trl", "TRL 0.24.0 is not patched; fastdpo.patch_trl() would, with lazy logits")]
    trainer = make_dpo(tmp_path)
    sft = make_sft(tmp_path)

    with patch_trl():
        lines = fastdpo.doctor().sections["TRL"]
        assert {DPO, CPO} < {path for name, path in lines if name == "replaced"}
        report = fastdpo.doctor(trainer).sections
        assert "not fused" not in dict(report["Trainer DPOTrainer"])
        data = dict(report["Data"])
        rows = trainer.train_dataset
        sizes = sorted(len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows)
        assert data["largest batch"] == f"4 pairs, at most {sum(sizes[-4:])} labelled tokens"
        lines = dict(fastdpo.doctor(sft).sections["Trainer SFTTrainer"])
        assert "is not one that is replaced" in lines["not fused"]


def make_any(kind: str, folder: Path, **changes: Any) -> Any:
    make = {"dpo": make_dpo, "kto": make_kto}.get(kind)
    return make(folder, **changes) if make else make_cpo_or_orpo(kind, folder, **changes)


def assert_own(trainer: Any, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The loss of TRL's own code to the bit, and one line for each method that says why."""
    batch = next(iter(trainer.get_train_dataloader()))
    kept = type(trainer.model)
    theirs = trainer.compute_loss(trainer.model, batch)
    with patch_trl():
        for _ in range(2):
            assert torch.equal(trainer.compute_loss(trainer.model, batch), theirs)
    assert type(trainer.model) is kept
    said = [r.getMessage() for r in caplog.records if "runs its own code" in r.getMessage()]
    assert said and len(set(said)) == len(said) and all(reason in line for line in said)


@pytest.mark.parametrize("kind", ["dpo", "kto", "cpo", "orpo"])
def test_a_head_that_is_not_understood_goes_on_in_trl_s_own_way(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_any(kind, tmp_path)
    trainer.model.lm_head.register_forward_hook(lambda *_: None)
    assert_own(trainer, caplog, "forward hooks")


def test_a_model_that_is_patched_already_stays_so(tmp_path: Path) -> None:
    theirs = runs.record(make_dpo(tmp_path))
    with patch_trl():
        trainer = make_dpo(tmp_path, model=patch_model(policy()))
        ours = runs.record(trainer)
    assert hasattr(type(trainer.model), "_fastdpo_hook")
    runs.assert_alike(ours, theirs, but=ROUNDED)


def test_a_trainer_made_before_the_patch_is_patched(tmp_path: Path) -> None:
    theirs = runs.record(make_dpo(tmp_path))
    trainer = make_dpo(tmp_path)
    with patch_trl(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="logits")
        ours = runs.record(trainer)
    runs.assert_alike(ours, theirs, but=ROUNDED)
    assert type(trainer.model).__name__ == "LlamaForCausalLM" and trainer.model.__class__.__mro__[1:]
