"""Result files: written case by case, never overwritten, taken up again where a run stopped.

``{"schema": 2, "environment": ..., "settings": ..., "runs": [...], "results": [...]}``; every result carries
the ``key`` of its case, the ``settings`` it was measured with, and every raw sample. ``settings`` is what the
file was begun with, ``runs`` that and what it was gone on with. A run that stops, for whatever reason, leaves
the cases it measured.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCHEMA = 2
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What two parts of one result file must have in common: numbers made otherwise are of another run.
SAME = ("device", "driver", "cpu", "commit", "changes", "packages", "cuda", "threads")


class ResultFile:
    """One run's results; made with the first one."""

    def __init__(
        self, folder: Path, environment: dict[str, Any], settings: dict[str, Any], *, part: int | None = None
    ) -> None:
        """
        Args:
            part: of ``benchmarks.gpu``; its number and the time of day are in the file's name, so that parts
                made in folders of their own can lie together.

        Raises:
            ValueError: the folder cannot be written to. Better before the first measurement than after it.
        """
        self.folder = Path(folder)
        self.path: Path | None = None
        self.part = part
        self.payload: dict[str, Any] = {
            "schema": SCHEMA, "environment": environment, "settings": settings, "runs": [settings],
            **({} if part is None else {"part": part}), "results": [],
        }  # fmt: skip
        check_writable(self.folder)

    @classmethod
    def resume(cls, path: Path, environment: dict[str, Any], settings: dict[str, Any]) -> ResultFile:
        """Go on in a file of the same machine, commit, changes and packages.

        Raises:
            ValueError: no such file, another schema, or other circumstances; with what differs.
        """
        payload = read_result(path)
        if said := differing(payload["environment"], environment):
            raise ValueError(f"resume: {path} is of another run, begin a new file: {said}")
        file = cls(Path(path).parent, environment, settings)
        file.path = Path(path)
        runs = runs_of(payload)
        file.payload = {**payload, "runs": runs if settings in runs else [*runs, settings]}
        file.payload.pop("file")
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
        text = json.dumps(self.payload, indent=1) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".part", delete=False) as written:
            written.write(text)
        os.chmod(written.name, 0o644)  # a temporary file is its owner's alone
        if self.path is None:
            self.path = _put(Path(written.name), self.folder, self.payload["environment"], self.part)
        else:
            os.replace(written.name, self.path)
        return self.path


def differing(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Why two environments are not of one run: what differs, or a commit that nobody knows; else ""."""
    names = [name for name in SAME if old.get(name) != new.get(name)]
    said = [f"{name} was {old.get(name)}, is {new.get(name)}" for name in names]
    if new.get("commit") is None:
        said.append(
            "the commit is not known: there is no git here; FASTDPO_COMMIT in the environment names it"
        )
    return "; ".join(said)


def runs_of(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file was asked for, one after the other."""
    runs: list[dict[str, Any]] = payload.get("runs", [payload["settings"]])
    return runs


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


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    words = device.replace("NVIDIA", "").lower()
    return "-".join("".join(c if c.isalnum() else " " for c in words).split())


def _put(written: Path, folder: Path, environment: dict[str, Any], part: int | None) -> Path:
    """Give a written file a name that is free: it is there whole or not at all."""
    date = environment["date"]
    stem = f"{slug(environment['device'])}-{date[:10]}"
    if part is not None:
        stem += f"-{date[11:19].replace(':', '')}-part{part}"
    number = 1
    while True:
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            os.link(written, path)  # refuses a name that is taken, also where two runs start at once
        except FileExistsError:
            number += 1
            continue
        except OSError:  # a file system without hard links
            if path.exists():
                number += 1
                continue
            os.replace(written, path)
            return path
        written.unlink()
        return path


def read_result(path: Path) -> dict[str, Any]:
    """One result file, with its name as ``file``.

    Raises:
        ValueError: there is none, it is no JSON, of another schema, or lacks what a file has; by name.
    """
    path = Path(path)
    try:
        payload = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path.name}: is no result file: {error}") from error
    schema = payload.get("schema") if isinstance(payload, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path.name}: schema {schema!r}, this version reads {SCHEMA}")
    if lacking := _lacking(payload):
        raise ValueError(f"{path.name}: is no result file: {lacking}")
    return {**payload, "file": path.name}


def _lacking(payload: dict[str, Any]) -> str | None:
    """What a payload of this schema does not have, in words."""
    name: str
    kind: type
    for name, kind in (("environment", dict), ("settings", dict), ("results", list)):
        if not isinstance(payload.get(name), kind):
            return f"{name}: got {type(payload.get(name)).__name__}, wanted {kind.__name__}"
    for name, kind in (("date", str), ("device", str), ("packages", dict)):
        if not isinstance(payload["environment"].get(name), kind):
            return f"environment: got no {name}"
    for number, result in enumerate(payload["results"]):
        for name, kind in (
            ("suite", str), ("key", str), ("contenders", dict), ("failed", dict), ("not_run", dict)
        ):  # fmt: skip
            if not isinstance(result, dict) or not isinstance(result.get(name), kind):
                return f"result {number}: got no {name}"
    return None


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files of a folder, oldest first.

    Raises:
        ValueError: as ``read_result``.
    """
    found = [read_result(path) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(found, key=lambda payload: payload["environment"]["date"])


def newest_of_part(folder: Path, part: int, here: dict[str, Any]) -> str | None:
    """The name of the last file of a part of `benchmarks.gpu` that a run in these circumstances may go on in.

    Raises:
        ValueError: as ``read_result``.
    """
    alike = [
        payload["file"] for payload in read_results(folder)
        if payload.get("part") == part and not differing(payload["environment"], here)
    ]  # fmt: skip
    return alike[-1] if alike else None


def write_results(payload: dict[str, Any], folder: Path = RESULTS) -> Path:
    """A whole run at once, in a new file."""
    file = ResultFile(folder, payload["environment"], payload.get("settings", {}))
    for result in payload["results"]:
        file.add(result)
    assert file.path is not None, "no results"
    return file.path


def label(environment: dict[str, Any]) -> str:
    """A device as tables name it: numbers of two never share a table."""
    cpu = environment.get("cpu")
    return (
        environment["device"] if "nvidia_smi" in environment or not cpu else f"{environment['device']}, {cpu}"
    )


def is_gpu(payload: dict[str, Any]) -> bool:
    """Whether a file's numbers are of a GPU; those of a CPU never stand in a GPU's table."""
    return "nvidia_smi" in payload["environment"]


def newest(results: Sequence[dict[str, Any]], *, of_gpu: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Device -> case -> its newest result, with its file; of GPUs or of CPUs.

    What was measured stands until it is measured anew: a case skipped later does not take its place.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for payload in results:
        if is_gpu(payload) == of_gpu:
            cases = found.setdefault(label(payload["environment"]), {})
            for result in payload["results"]:
                where = {"file": payload["file"], "environment": payload["environment"]}
                if "skipped" not in result or "skipped" in cases.get(result["key"], result):
                    cases[result["key"]] = {**result, **where}
    return dict(sorted(found.items()))
