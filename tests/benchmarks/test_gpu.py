"""``make gpu``: parts that end by themselves, files that can lie together, and no build that stops it all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_needs, harness
from benchmarks.harness import environment
from benchmarks.results import ResultFile, newest_of_part, read_result, write_results
from tests import ROOT

CPU = torch.device("cpu")


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
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(Popen=start))
    return started


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


@pytest.mark.slow  # processes that start processes: once with all that a part has, once to go on
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = commands_of(monkeypatch)
    words = ["--device", "cpu", "--results", str(tmp_path)]
    assert gpu.main([*words, "--repeats", "3"]) == 0
    said = capsys.readouterr().out
    for (name, part), command in zip(gpu.PARTS.items(), started, strict=True):
        assert f"part {name}, " in said and part.what in said
        assert f"  with Python {platform.python_version()}, torch {version('torch')}" in said
        if part.tests:
            assert command[2:4] == ["benchmarks.gpu_tests", name] and set(part.tests) < set(command)
            continue
        limit = float(option(command, "--max_seconds") or "nan")
        assert 0 < limit <= gpu.PART_SECONDS - gpu.RESERVE
        if part.suites:
            assert option(command, "--part") == name
            is_timed = part.suites[0] in ("op", "row")
            assert option(command, "--repeats") == ("3" if is_timed else None)
            assert (option(command, "--seconds") is not None) == is_timed


def test_parts_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = commands_of(monkeypatch)
    words = ["--device", "cpu", "--results", str(tmp_path)]
    assert gpu.main([*words, "--part", "tests"]) == 0
    assert [command[3] for command in started] == ["tests-op", "tests-kernels", "tests-others"]
    with pytest.raises(SystemExit):
        gpu.main([*words, "--part", "9"])


def test_what_is_missing_or_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gpu_needs.wanted_versions()
    assert {"torch", "triton", "transformers", "setuptools", "pybind11"} <= wanted.keys()
    here = {"torch": "2.11.0+cu130", "triton": "3.5.1", "pytest": "9.2.0"}
    monkeypatch.setattr(gpu_needs, "package_version", here.get)
    said = gpu_needs.versions_of(("torch", "triton", "pytest", "peft"))
    assert said.endswith(
        f", torch 2.11.0+cu130, triton 3.5.1: TOO OLD, wanted {wanted['triton']}, pytest 9.2.0, "
        "peft: not installed"
    )


def test_without_pytest_the_other_parts_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = commands_of(monkeypatch)
    known = harness.package_version
    monkeypatch.setattr(harness, "package_version", lambda name: None if name == "pytest" else known(name))
    assert gpu.main(["--device", "cpu", "--results", str(tmp_path)]) == 1
    assert "error: part tests-op: pytest is not installed" in capsys.readouterr().err
    assert [option(command, "--part") for command in started[1:]] == list("1234567")


def test_every_test_that_needs_a_gpu_is_in_a_part() -> None:
    """The mark stands in the text of three files without any of their tests having it."""
    marked = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text()
        and path.parent.name != "benchmarks" and path.name != "test_promises.py"
    }  # fmt: skip
    assert marked == set(gpu.everything()[0])


def test_without_a_gpu_nothing_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--part", "1"]) == 1
    said = capsys.readouterr()
    assert "sees no CUDA GPU; nothing was run" in said.err and not said.out


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part not in gpu.QUICK])
def test_a_part_that_has_nothing_at_tiny_sizes_says_so(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--quick", "--part", part, "--results", str(tmp_path / "none")]
    with pytest.raises(SystemExit) as ended:
        gpu.main(words)
    assert ended.value.code == 0
    assert f"part {part} has nothing of its own" in capsys.readouterr().err


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE", 8.0)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert gpu._wait(process, time.time()) == -9


@pytest.mark.parametrize("number", gpu.ENDINGS, ids=str)
def test_who_is_asked_to_end_lets_the_part_keep_what_it_has(number: signal.Signals) -> None:
    """By ^C, or by a limit on the whole: the process that measures is asked too, and waited for."""
    # A shell's background jobs, and what they start, are deaf to ^C.
    hears = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    kept = f"{hears}\ntry:\n print(flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    with subprocess.Popen([sys.executable, "-c", kept], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            gpu._wait(process, time.time() + 500)
        assert process.stdout.read() == "kept\n" and process.returncode == 0


TESTS = """
import os, signal, time
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_one(name, request):
    if name == "b" and os.environ["CUT_OFF"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "c":
        pytest.skip("needs more")
    assert name != os.environ["WRONG"]

def test_not_of_a_gpu():
    raise AssertionError
"""


WITHOUT_PEFT = """
import sys
from tests.conftest import pytest_make_collect_report

sys.modules["peft"] = None
"""


@pytest.mark.slow  # pytest three times, in processes of their own
def test_tests_that_were_cut_off_go_on_where_they_stopped(tmp_path: Path) -> None:
    """By SIGKILL, which leaves no word: outcomes are on disk by then, and who was under way is tried last."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "conftest.py").write_text(WITHOUT_PEFT)
    file, lacking = tmp_path / "test_it.py", tmp_path / "test_lacking.py"
    file.write_text(TESTS)
    lacking.write_text("import peft\n")

    def run(cut_off: str, wrong: str) -> tuple[int, list[dict[str, Any]], str]:
        command = [sys.executable, "-m", "benchmarks.gpu_tests", "tests-op", str(file), str(lacking)]
        command += ["-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini")]
        command += ["--results", str(tmp_path / "results")]
        environment = {**os.environ, "CUT_OFF": cut_off, "WRONG": wrong, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        (record,) = (tmp_path / "results").glob("*.jsonl")
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        return done.returncode, lines[1:], done.stdout

    code, lines, _ = run("1", "none")
    assert code == -9 and [line["test"][-2] for line in lines] == ["a", "a", "b"]
    code, lines, said = run("0", "d")
    assert "test_lacking.py is left out: needs peft, which is not installed" in said
    assert code == 1 and [line["test"][-2] for line in lines[3:]] == ["c", "c", "d", "d", "b", "b"]
    outcomes = {line["test"][-2]: line for line in lines if "outcome" in line}
    assert {name: line["outcome"] for name, line in outcomes.items()} == {
        "a": "passed", "b": "passed", "c": "skipped", "d": "failed"
    }  # fmt: skip
    assert "assert" in outcomes["d"]["why"] and "2 passed, 1 failed, 1 skipped, 0 not run" in said
    code, again, said = run("0", "d")  # a failure stands
    assert code == 1 and again == lines and "2 passed, 1 failed" in said


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
    assert newest_of_part(tmp_path, 1, environment(CPU)) is None
    monkeypatch.setenv("FASTDPO_COMMIT", "1" * 40)
    with pytest.raises(ValueError, match="commit was None, is 1111"):
        ResultFile.resume(path, environment(CPU), {})
    named = ResultFile(tmp_path, environment(CPU), {}, part=1).add(result("a"))
    assert newest_of_part(tmp_path, 1, environment(CPU)) == named.name
    assert newest_of_part(tmp_path, 2, environment(CPU)) is None


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


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ((), ""),
        (("PART=3", "RESULTS=out"), "--part 3 --results out"),
        (("PART=tests",), "--part tests"),
    ],
    ids=str,
)
def test_make_gpu_is_this_program(tmp_path: Path, words: tuple[str, ...], arguments: str) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    stub.chmod(0o755)
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={stub}", *words]
    # Of a make above this one, whose options are not meant.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == f"-m benchmarks.gpu {arguments}".strip() + "\n"
