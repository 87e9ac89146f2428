"""`fastdpo doctor` names the trainers that are installed, without importing one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastdpo
from fastdpo.doctor import trainers


def lines_with(monkeypatch: pytest.MonkeyPatch, **versions: str) -> dict[str, str]:
    monkeypatch.setattr(trainers, "installed_version", versions.get)
    return dict(fastdpo.doctor().sections["Trainers"])


def test_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_with(monkeypatch)
    assert list(lines) == ["any other loop"] and "patch_model(model)" in lines["any other loop"]


def test_each_is_named_with_what_switches_the_hook_on(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {
        "trl": "1.9.0",
        "llamafactory": "0.9.5",
        "axolotl": "0.19.0",
        "ms_swift": "4.6",
        "openrlhf": "0.11",
    }
    lines = lines_with(monkeypatch, **versions)
    assert [*lines][:-1] == [f"{name} {version}" for name, version in versions.items()]
    assert "patch_trl(): DPO, KTO" in lines["trl 1.9.0"]
    assert "patch_llama_factory()" in lines["llamafactory 0.9.5"]
    assert "fastdpo.integrations.axolotl.FastDPOPlugin" in lines["axolotl 0.19.0"]
    path = Path(lines["ms_swift 4.6"].split()[1].rstrip(":"))
    assert path.name == "ms_swift.py" and path.exists()


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0", "2.0.0"])
def test_the_fused_head_of_trl_is_said(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "asks for none since 1.15" in lines_with(monkeypatch, trl=version)[f"trl {version}"]


def test_none_is_imported() -> None:
    source = """
import sys
from fastdpo.doctor.trainers import trainer_lines
trainer_lines()
print("trl" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
