"""``make gpu``: parts that end by themselves, files that can lie together, and no build that stops it all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, harness
from benchmarks.harness import environment
from benchmarks.results import ResultFile, read_result, write_results

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_COMMIT", "0" * 40)


def result(key: str) -> dict[str, Any]:
    return {"suite": "op", "key": key, "failed": {}, "not_run": {}, "contenders": {}}


def commands_of(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `gpu.main` would start, in place of starting it."""
    started: list[list[str]] = []

    def start(command: list[str], cwd: Path) -> Any:
        started.append(command)
        return SimpleNamespace(wait=lambda timeout: 0, kill=None)

    monkeypatch.setattr(
        gpu, "subprocess", SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)
    )
    return started


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def test_a_part_goes_on_in_its_own_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # as this process, by now, has them
    words = ["--device", "cpu", "--quick", "--results", str(tmp_path), "--part", "5"]
    brief = ["--tasks", "pairs", "--contenders", "fastdpo-cpu", "cpu"]
    (tmp_path / "notes.txt").write_text("kept")
    for expected in ("wrote", "5 of 5 cases are measured already"):
        assert gpu.main([*words, *brief]) == 0
        assert expected in capfd.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-part5") and len(read_result(path)["results"]) == 5


def test_every_part_has_its_time_and_only_the_options_that_its_suites_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = commands_of(monkeypatch)
    words = ["--device", "cpu", "--results", str(tmp_path)]
    assert gpu.main([*words, "--repeats", "3"]) == 0
    assert len(started) == len(gpu.PARTS) <= 8
    for part, command in zip(gpu.PARTS, started, strict=True):
        assert option(command, "--part") == str(part)
        limit = float(option(command, "--max_seconds") or "nan")
        assert 0 < limit <= gpu.PART_SECONDS - gpu.RESERVE
        is_timed = gpu.PARTS[part][0] in ("op", "row")
        assert option(command, "--repeats") == ("3" if is_timed else None)
        assert (option(command, "--seconds") is not None) == is_timed


def test_the_build_counts_towards_the_time_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = commands_of(monkeypatch)
    words = ["--device", "cpu", "--results", str(tmp_path), "--part", "1", "--begun"]
    assert gpu.main([*words, str(time.time() - 200)]) == 0
    assert float(option(started[0], "--max_seconds") or "nan") <= gpu.PART_SECONDS - gpu.RESERVE - 200
    assert gpu.main([*words, str(time.time() - gpu.PART_SECONDS)]) == 1
    assert len(started) == 1 and "call it again" in capsys.readouterr().err


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part not in gpu.QUICK])
def test_a_part_that_has_nothing_at_tiny_sizes_says_so(
    part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--quick", "--part", str(part), "--results", str(tmp_path / "none")]
    assert gpu.main(words) == 0
    assert f"part {part} has nothing of its own" in capsys.readouterr().out


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE", 8.0)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert gpu._wait(process, time.time()) == -9


def test_files_of_parts_can_lie_together(tmp_path: Path) -> None:
    """Made on machines that each began with an empty folder, on one day."""
    names = set()
    for folder, part in (("a", 1), ("b", 2), ("c", None)):
        path = ResultFile(tmp_path / folder, environment(CPU), {}, part=part).add(result("k"))
        names.add(path.name)
    later = {**environment(CPU), "date": "2026-01-01T10:00:01+00:00"}
    for second in ("10:00:01", "10:00:02"):
        info = {**later, "date": f"2026-01-01T{second}+00:00"}
        names.add(ResultFile(tmp_path / second, info, {}, part=1).add(result("k")).name)
    assert len(names) == 5


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ResultFile(tmp_path, environment(CPU), {})

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "link", killed)
        file.add(result("a"))
    assert not list(tmp_path.glob("*.json"))
    file.add(result("b"))
    (path,) = tmp_path.glob("*.json")
    assert {r["key"] for r in read_result(path)["results"]} == {"a", "b"}


def test_without_hard_links_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refused)
    payload = {"environment": environment(CPU), "results": [result("a")]}
    assert len({write_results(payload, tmp_path) for _ in range(3)}) == 3


def test_a_commit_that_is_not_known_is_never_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)  # a copy without .git
    monkeypatch.delenv("FASTDPO_COMMIT")
    info = environment(CPU)
    assert info["commit"] is None and info["has_uncommitted_changes"] is None and info["changes"] is None
    path = ResultFile(tmp_path, info, {}, part=1).add(result("a"))
    with pytest.raises(ValueError, match="the commit is not known.*FASTDPO_COMMIT"):
        ResultFile.resume(path, environment(CPU), {})
    assert gpu._newest(tmp_path, 1, CPU) is None
    monkeypatch.setenv("FASTDPO_COMMIT", "1" * 40)
    with pytest.raises(ValueError, match="commit was None, is 1111"):
        ResultFile.resume(path, environment(CPU), {})
    named = ResultFile(tmp_path, environment(CPU), {}, part=1).add(result("a"))
    assert gpu._newest(tmp_path, 1, CPU) == named.name
    assert gpu._newest(tmp_path, 2, CPU) is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_uncommitted_changes_are_told_from_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "a")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    clean = environment(CPU)
    assert clean["changes"] == "" and clean["has_uncommitted_changes"] is False
    assert clean["commit"] != "0" * 40  # git knows better
    changes = set()
    for text in ("2\n", "3\n"):
        (tmp_path / "a.py").write_text(text)
        info = environment(CPU)
        assert info["has_uncommitted_changes"] is True
        changes.add(info["changes"])
    assert len(changes) == 2 and "" not in changes
    path = ResultFile(tmp_path, {**info, "changes": "another"}, {}).add(result("a"))
    with pytest.raises(ValueError, match="changes was another"):
        ResultFile.resume(path, info, {})


# Stands in for a Python whose torch sees a GPU, and whose nvcc failed.
STUB = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  *unavailable_reason*) echo "nvcc failed";;
  *pytest*) exit 3;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_goes_on_loudly_without_the_cuda_kernels(tmp_path: Path) -> None:
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def make(*words: str) -> tuple[subprocess.CompletedProcess[str], str]:
        log.write_text("")
        command = ["make", "--no-print-directory", "gpu", f"PYTHON={stub}", *words]
        # Of a make above this one, whose options are not meant.
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            command, cwd=ROOT, env={**clean, "LOG": str(log)}, capture_output=True, text=True
        )
        return done, log.read_text()

    done, called = make("PART=3", "RESULTS=out")
    assert done.returncode == 0 and "WITHOUT THE CUDA BACKEND: nvcc failed" in done.stderr
    assert "-m benchmarks.gpu --results out --part 3 --begun " in called and "pytest" not in called
    done, called = make("PART=tests")
    assert done.returncode == 2 and "pytest" in called and "benchmarks.gpu" not in called
    done, called = make()
    assert done.returncode == 2 and "pytest" in called  # a test that fails fails the verb, after all is run
    assert "-m benchmarks.gpu --results benchmarks/results\n" in called
    done, called = make("PART=9")
    assert done.returncode == 2 and "wanted tests, or a number from 1 to 7" in done.stderr and not called
