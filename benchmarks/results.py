"""Result files: written case by case, never overwritten, taken up again where a run stopped.

``{"schema": 2, "environment": ..., "settings": ..., "results": [...]}``; every result carries the ``key``
of its case, and every raw sample. A run that stops, for whatever reason, leaves the cases it measured.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 2
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What two parts of one result file must have in common: numbers made otherwise are of another run.
SAME = ("device", "commit", "has_uncommitted_changes", "packages", "cuda", "threads")


class ResultFile:
    """One run's results; made with the first one."""

    def __init__(self, folder: Path, environment: dict[str, Any], settings: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the folder cannot be written to. Better before the first measurement than after it.
        """
        self.folder = Path(folder)
        self.path: Path | None = None
        self.payload: dict[str, Any] = {
            "schema": SCHEMA, "environment": environment, "settings": settings, "results": []
        }  # fmt: skip
        check_writable(self.folder)

    @classmethod
    def resume(cls, path: Path, environment: dict[str, Any], settings: dict[str, Any]) -> ResultFile:
        """Go on in a file of the same machine, commit and packages.

        Raises:
            ValueError: no such file, another schema, or other circumstances; with what differs.
        """
        payload = read_result(path)
        old = payload["environment"]
        differing = [name for name in SAME if old.get(name) != environment.get(name)]
        if differing:
            said = "; ".join(f"{name} was {old.get(name)}, is {environment.get(name)}" for name in differing)
            raise ValueError(f"resume: {path} is of another run, begin a new file: {said}")
        file = cls(Path(path).parent, environment, settings)
        file.path = Path(path)
        suites = {*payload["settings"].get("suites", ()), *settings.get("suites", ())}
        file.payload = {**payload, "settings": {**settings, "suites": sorted(suites)}}
        return file

    @property
    def results(self) -> list[dict[str, Any]]:
        return self.payload["results"]

    @property
    def done(self) -> set[str]:
        """Keys of the cases that need not be measured again: a skipped one may fit next time."""
        return {result["key"] for result in self.results if "skipped" not in result}

    def add(self, result: dict[str, Any]) -> Path:
        """Keep a result on disk, in one step: a reader never sees half a file."""
        self.payload["results"] = [r for r in self.results if r["key"] != result["key"]] + [result]
        if self.path is None:
            self.path = _new_path(self.folder, self.payload["environment"])
        text = json.dumps(self.payload, indent=1) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".part", delete=False) as part:
            part.write(text)
        os.replace(part.name, self.path)
        self.path.chmod(0o644)  # a temporary file is its owner's alone
        return self.path


def check_writable(folder: Path) -> None:
    """
    Raises:
        ValueError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"results: cannot write to {folder}: {error.strerror or error}") from error


def _new_path(folder: Path, environment: dict[str, Any]) -> Path:
    device = environment["device"].replace("NVIDIA", "").strip().lower()
    slug = "-".join("".join(c if c.isalnum() else " " for c in device).split())
    day = environment["date"][:10]
    number = 1
    while True:
        path = folder / (f"{slug}-{day}.json" if number == 1 else f"{slug}-{day}-{number}.json")
        try:
            path.open("x").close()  # ours from now on, also where two runs start at once
            return path
        except FileExistsError:
            number += 1


def read_result(path: Path) -> dict[str, Any]:
    """One result file, with its name as ``file``.

    Raises:
        ValueError: there is none, it is no JSON, or it is of another schema; by name.
    """
    path = Path(path)
    try:
        payload = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: is no result file: {error}") from error
    schema = payload.get("schema") if isinstance(payload, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path.name}: schema {schema!r}, this version reads {SCHEMA}")
    return {"file": path.name, **payload}


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files of a folder, oldest first.

    Raises:
        ValueError: as ``read_result``.
    """
    found = [read_result(path) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(found, key=lambda payload: payload["environment"]["date"])


def write_results(payload: dict[str, Any], folder: Path = RESULTS) -> Path:
    """A whole run at once, in a new file."""
    file = ResultFile(folder, payload["environment"], payload.get("settings", {}))
    for result in payload["results"]:
        file.add(result)
    assert file.path is not None, "no results"
    return file.path


def is_gpu(payload: dict[str, Any]) -> bool:
    """Whether a file's numbers are of a GPU; those of a CPU never stand in a GPU's table."""
    return "nvidia_smi" in payload["environment"]
