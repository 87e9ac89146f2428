"""`patch_trl` of TRL 0.24: what is replaced and comes back, what is refused, and what is left behind.

TRL 0.24 does not import with the libraries of the other tests: ``make test-llama-factory`` runs this file and
those of its trainers in an environment of its own; elsewhere they are skipped. `trl_0_24_runs` has to be
imported before TRL, whose classes are therefore taken from there.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdpo
from fastdpo import Execution, patch_model, patch_trl
from fastdpo.integrations import trl as hook
from fastdpo.integrations import trl_0_24
from tests.integrations import trl_runs as runs
from tests.integrations.trl_0_24_runs import (  # noqa: F401  (a fixture)
    ROUNDED,
    DPOTrainer,
    make_cpo_or_orpo,
    make_dpo,
    make_kto,
    make_sft,
    policy,
    unpatched,
)

pytestmark = pytest.mark.usefixtures("unpatched")

PATHS = (
    trl_0_24.DPO,
    trl_0_24.KTO,
    trl_0_24.KTO_REFERENCE,
    trl_0_24.KTO_KL,
    trl_0_24.CPO,
    trl_0_24.ORPO,
)


def objects() -> list[Any]:
    """What stands at every place that is patched, looked up without the code under test."""
    found = []
    for module, name in (
        ("dpo", "DPOTrainer.concatenated_forward"),
        ("kto", "KTOTrainer.forward"),
        ("kto", "KTOTrainer.compute_reference_log_probs"),
        ("kto", "KTOTrainer._compute_kl_logps"),
        ("cpo", "CPOTrainer.concatenated_forward"),
        ("orpo", "ORPOTrainer.concatenated_forward"),
    ):
        kind, method = name.split(".")
        found.append(vars(getattr(import_module(f"trl.trainer.{module}_trainer"), kind))[method])
    return found


def test_the_very_methods_come_back() -> None:
    before = objects()
    with patch_trl() as done:
        assert done.is_new and done.replaced == PATHS and done.version == "0.24.0"
        assert all(now is not then for now, then in zip(objects(), before, strict=True))
        assert not patch_trl().is_new
        with pytest.raises(ValueError, match="unpatch_trl"):
            patch_trl(execution=Execution(workspace_mib=16))
    assert all(now is then for now, then in zip(objects(), before, strict=True))
    with patch_trl(experimental=False) as done:
        assert done.replaced == PATHS[:4]
        assert all(now is then for now, then in zip(objects()[4:], before[4:], strict=True))


def test_the_doctor_says_what_is_replaced_and_what_is_not(tmp_path: Path) -> None:
    lines = fastdpo.doctor().sections["TRL"]
    assert lines == [("patch_trl", "TRL 0.24.0 is not patched; fastdpo.patch_trl() would")]
    trainer = make_dpo(tmp_path)
    sft = make_sft(tmp_path)

    class Own(DPOTrainer):
        def concatenated_forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().concatenated_forward(*args, **kwargs)

    with patch_trl():
        lines = fastdpo.doctor().sections["TRL"]
        assert [path for name, path in lines if name == "replaced"] == list(PATHS)
        assert dict(lines)["not replaced"].startswith("SFT, GRPO, RLOO")
        report = fastdpo.doctor(trainer).sections
        assert "not fused" not in dict(report["Trainer DPOTrainer"])
        data = dict(report["Data"])
        rows = trainer.train_dataset
        sizes = sorted(len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows)
        assert data["largest batch"] == f"4 pairs, at most {sum(sizes[-4:])} labelled tokens"
        lines = dict(fastdpo.doctor(sft).sections["Trainer SFTTrainer"])
        assert "is not one that is replaced" in lines["not fused"]
        trainer.__class__ = Own
        lines = dict(fastdpo.doctor(trainer).sections["Trainer Own"])
        assert lines["not fused"] == "Own has a concatenated_forward of its own"


@pytest.mark.parametrize("path", [*trl_0_24.SOURCES, *trl_0_24.CPO_SOURCES])
def test_everything_is_held_to_its_source(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path.replace(":", "."), lambda *args: None)
    with pytest.raises(RuntimeError, match=f"the source of {path} has the sha256"):
        patch_trl()
    if path in trl_0_24.CPO_SOURCES:
        with patch_trl(experimental=False):
            pass
    else:
        with pytest.raises(RuntimeError, match=f"the source of {path} has the sha256"):
            patch_trl(experimental=False)


@pytest.mark.parametrize("other", ["0.23.1", "0.24.1", "0.25.0", "1.0.0"])
def test_only_this_release(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "_installed_version", lambda: other)
    with pytest.raises(RuntimeError, match=rf"trl {other} has no log-prob function .*1\.15, or 0\.24\.0"):
        patch_trl()


def test_a_look_at_a_trl_that_does_not_import_leaves_it_importable() -> None:
    """TRL 0.24 remembers what a first import found; LLaMA-Factory has to come before it."""
    source = """
import fastdpo
try:
    fastdpo.patch_trl()
except RuntimeError as error:
    assert "does not import with this transformers" in str(error)
else:
    raise AssertionError
assert "llamafactory.extras.packages first" in dict(fastdpo.doctor().sections["TRL"])["patch_trl"]
import llamafactory.extras.packages
from trl import DPOTrainer
with fastdpo.patch_trl():
    assert DPOTrainer.concatenated_forward.__module__ == "fastdpo.integrations.trl_0_24"
"""
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


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


def test_another_ignored_label_goes_on_in_trl_s_own_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """KTO's; CPO's and ORPO's own likelihood fails with any but -100."""
    trainer = make_kto(tmp_path, label_pad_token_id=-1)
    assert_own(trainer, caplog, "label_pad_token_id: got -1, wanted -100")


def test_an_unknown_truncation_mode(tmp_path: Path) -> None:
    trainer = make_dpo(tmp_path, max_length=4)
    trainer.truncation_mode = "keep_middle"
    with patch_trl(), pytest.raises(ValueError, match="truncation_mode: got 'keep_middle'"):
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))


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
    with patch_trl(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.dpo_trainer.selective_log_softmax", forbidden)
        ours = runs.record(trainer)
    runs.assert_alike(ours, theirs, but=ROUNDED)
    assert type(trainer.model).__name__ == "LlamaForCausalLM" and trainer.model.__class__.__mro__[1:]


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the logits of a batch were asked for")
