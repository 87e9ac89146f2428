"""`patch_trl`: what it replaces, that it puts the very objects back, and which TRL it refuses, and why."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import fastdpo
from fastdpo import Execution, patch_trl, unpatch_trl
from fastdpo.integrations import trl as hook

PATHS = (hook.SEAM, hook.COMPACTION)
RECORD = (
    ("trl.trainer.utils", "_ChunkedLogProbFunction"),
    ("trl.trainer.utils", "_use_triton"),
    ("trl.experimental.cpo.cpo_trainer", "CPOTrainer.compute_loss"),
    ("trl.experimental.orpo.orpo_trainer", "ORPOTrainer.get_batch_loss_metrics"),
    ("trl.experimental.tpo.tpo_trainer", "TPOTrainer.prediction_step"),
)


def objects() -> list[Any]:
    """What stands at every place that is patched, looked up without the code under test."""
    found = []
    for module, path in RECORD:
        value = import_module(module)
        for name in path.split("."):
            value = vars(value)[name]
        found.append(value)
    return found


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = objects()
    yield
    monkeypatch.undo()  # a test's own replacements first
    unpatch_trl()
    assert all(now is then for now, then in zip(objects(), before, strict=True))


def with_version(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(hook, "_installed_version", lambda: version)


@pytest.mark.promise(50)
def test_the_very_objects_come_back() -> None:
    before = objects()
    done = patch_trl()
    assert done.replaced[:2] == PATHS
    assert {":".join(place) for place in RECORD} <= set(done.replaced)
    assert all(now is not then for now, then in zip(objects(), before, strict=True))
    for path in done.replaced:
        assert path in repr(done)
    unpatch_trl()
    assert all(now is then for now, then in zip(objects(), before, strict=True))
    unpatch_trl()  # nothing to do


def test_patching_again_changes_nothing() -> None:
    patch_trl()
    first = objects()
    again = patch_trl()
    assert not again.is_new
    assert all(now is then for now, then in zip(objects(), first, strict=True))
    with pytest.raises(ValueError, match="unpatch_trl"):
        patch_trl(execution=Execution(workspace_mib=16))
    with pytest.raises(ValueError, match="unpatch_trl"):
        patch_trl(experimental=False)


def test_as_a_context_manager() -> None:
    before = objects()
    with patch_trl() as done:
        assert done.is_new and objects()[0] is not before[0]
        with patch_trl():  # found it patched, so leaves it patched
            pass
        assert objects()[0] is not before[0]
    assert objects()[0] is before[0]
    with pytest.raises(KeyError), patch_trl():
        raise KeyError
    assert objects()[0] is before[0]


def test_without_the_experimental_trainers() -> None:
    before = objects()
    assert patch_trl(experimental=False).replaced == PATHS
    now = objects()
    assert all(a is not b for a, b in zip(now[:2], before[:2], strict=True))
    assert all(a is b for a, b in zip(now[2:], before[2:], strict=True))


def test_tokens_are_dropped_on_a_cpu_and_elsewhere_as_trl_does() -> None:
    utils = import_module("trl.trainer.utils")
    devices = [torch.device(kind) for kind in ("cpu", "cuda", "xpu", "mps", "meta")]
    own = {device.type: utils._use_triton(device) for device in devices}
    patch_trl()
    assert not own["cpu"]
    assert {d.type: utils._use_triton(d) for d in devices} == {**own, "cpu": True}


@pytest.mark.parametrize("version", ["0.9.6", "1.0.0", "1.14.1"])
def test_trainers_of_older_releases_get_lazy_logits(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The releases themselves run in environments of their own: test_trl_0_24, test_released_trainers."""
    with_version(monkeypatch, version)
    would = f"TRL {version} is not patched; fastdpo.patch_trl() would, with lazy logits"
    assert fastdpo.doctor().sections["TRL"] == [("patch_trl", would)]
    with patch_trl() as done:
        assert "trl.trainer.dpo_trainer:DPOTrainer.compute_loss" in done.replaced
        assert not set(PATHS) & set(done.replaced)


def test_a_version_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, "unknown")
    with pytest.raises(RuntimeError, match="'unknown', which cannot be compared"):
        patch_trl()


def test_no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, None)
    with pytest.raises(ModuleNotFoundError, match="no installed TRL, wanted trl"):
        patch_trl()
    assert fastdpo.doctor().sections["TRL"] == [("patch_trl", "TRL is not installed")]


@pytest.mark.parametrize("version", ["1.17.0", "1.99.0.dev0", "2.0.0"])
def test_a_newer_trl_runs_if_its_sources_are_those_tested(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_version(monkeypatch, version)
    assert patch_trl().version == version


@pytest.mark.promise(50)
def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Function:
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> None: ...

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Function)
    with pytest.raises(RuntimeError, match=r"takes \('ctx', 'hidden', 'weight', 'targets'\), wanted"):
        patch_trl()


def test_a_function_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, "3.0.0")
    monkeypatch.delattr("trl.trainer.utils._ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match=r"trl 3\.0\.0 has no trl\.trainer\.utils:_ChunkedLogProbFunction"):
        patch_trl()


def test_trl_1_15_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, "1.15.0")
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", None)
    with pytest.raises(RuntimeError, match=r"trl 1\.15\.0 found no Triton"):
        patch_trl()


@pytest.mark.promise(50)
def test_another_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same signature is not enough."""

    class Function:
        @staticmethod
        def forward(
            ctx: Any,
            hidden: Any,
            weight: Any,
            bias: Any,
            targets: Any,
            temperature: Any,
            chunk_size: Any,
            final_logit_softcapping: Any = None,
            logit_scale: Any = 1.0,
            outputs: Any = (),
        ) -> None: ...

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Function)
    with pytest.raises(RuntimeError, match=r"_ChunkedLogProbFunction has the sha256 \w{16}, wanted \w{16}"):
        patch_trl()


def another(*args: Any, **kwargs: Any) -> None:
    """Stands for code of a TRL that nobody tested."""


@pytest.mark.parametrize("path", [path for path in hook.SEAM_SOURCES if path != hook.SEAM])
def test_what_surrounds_the_function_is_held_to_its_source(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path.replace(":", "."), another)
    with pytest.raises(RuntimeError, match=f"the source of {path} has the sha256"):
        patch_trl(experimental=False)
    assert fastdpo.doctor().sections["TRL"][0][1].startswith("refused: ")


def test_a_later_patch_is_not_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_trl()
    ours = objects()
    with monkeypatch.context() as patch:
        patch.setattr("trl.trainer.utils._use_triton", another)
        with pytest.raises(RuntimeError, match="_use_triton is .* undo the later patch first"):
            unpatch_trl()
        assert objects()[0] is ours[0]
    unpatch_trl()


def test_the_doctor_says_what_is_patched() -> None:
    version = hook._installed_version()
    assert fastdpo.doctor().sections["TRL"] == [
        ("patch_trl", f"TRL {version} is not patched; fastdpo.patch_trl() would")
    ]
    with patch_trl() as done:
        lines = fastdpo.doctor().sections["TRL"]
    assert lines == [
        ("patch_trl", f"TRL {version} is patched"),
        *(("replaced", path) for path in done.replaced),
    ]


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_bad_options(value: Any) -> None:
    with pytest.raises(TypeError, match="experimental"):
        patch_trl(experimental=value)
    with pytest.raises(TypeError, match="execution"):
        patch_trl(execution="fast")  # type: ignore[arg-type]
