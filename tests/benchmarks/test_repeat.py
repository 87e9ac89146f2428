"""Two runs of one version: they agree within the noise that they state, or it is said that they do not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import repeat, run
from benchmarks.compare import agreement, compare_results, report, widening
from benchmarks.harness import environment
from benchmarks.results import ResultFile, read_results

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_COMMIT", "0" * 40)


def cell(median: float, noise: float = 0.01) -> dict[str, Any]:
    return {"median_ms": median, "noise": noise, "samples_ms": [median]}


def result(**medians: float) -> dict[str, Any]:
    cells = {"gemm": cell(10.0), "fastdpo-cpu": cell(11.0), "torch": cell(20.0)}
    cells |= {name: cell(median) for name, median in medians.items()}
    return {"suite": "op", "key": "a", "failed": {}, "not_run": {}, "contenders": cells}


def write(folder: Path, **medians: float) -> Path:
    return ResultFile(folder, environment(CPU), {"suites": ["op"]}).add(result(**medians))


def test_each_of_many_may_be_further_off() -> None:
    assert widening(1) == pytest.approx(1.16, abs=0.01)  # 95 % of one, of noises of some 90 %
    assert widening(60) == pytest.approx(1.98, abs=0.01)
    assert widening(0) == widening(1) < widening(2) < widening(1000) < 2.6


@pytest.mark.parametrize(
    ("medians", "said"),
    [
        ({}, "the two runs agree, 2 of 2"),
        ({"fastdpo-cpu": 11.2}, "the two runs agree, 2 of 2"),
        ({"fastdpo-cpu": 12.0}, "DISAGREE, 1 of 2"),
        ({"fastdpo-cpu": 10.0}, "DISAGREE, 1 of 2"),  # faster is no agreement either
        ({"torch": 30.0, "fastdpo-cpu": 10.0}, "DISAGREE, 0 of 2"),
    ],
)
def test_files_of_one_version_are_said_to_agree_or_not(
    medians: dict[str, float], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write(tmp_path), write(tmp_path, **medians)
    slower = medians.get("fastdpo-cpu", 0.0) > 11.5
    assert run.main(["--compare", str(old), "--with", str(new)]) == int(slower)
    assert f"of one version: {said}" in capsys.readouterr().out.replace("the two runs DISAGREE", "DISAGREE")


def test_files_of_two_versions_need_not_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"file": "a.json", "environment": environment(CPU), "results": [result()]}
    new = {**old, "environment": {**environment(CPU), "commit": "1" * 40}}
    assert report(compare_results(old, new)) == 0
    assert "of one version" not in capsys.readouterr().out
    del new["results"][0]["contenders"]["torch"]
    new["results"] = [{**result(), "contenders": {"gemm": cell(10.0), "fastdpo-cpu": cell(11.0)}}]
    said, agree = agreement(compare_results({**old, "results": [result()]}, new))
    assert not agree and "1 not timed in both" in said


class InThisProcess:
    """``subprocess.Popen`` of `benchmarks.run`, without the seconds that importing torch takes."""

    def __init__(self, command: list[str]) -> None:
        assert command[1:3] == ["-m", "benchmarks.run"]
        self._words = command[3:]

    def wait(self) -> int:
        return run.main(self._words)


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_suites_are_run_twice_and_compared(
    apart: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not apart:
        monkeypatch.setattr(repeat, "subprocess", SimpleNamespace(Popen=InThisProcess))
    words = ["row", "--device", "cpu", "--preset", "tiny", "--repeats", "5", "--results", str(tmp_path)]
    code = repeat.main([*words, "--contenders", "cpu", "reference"])
    shown = capfd.readouterr().out
    first, second = read_results(tmp_path)
    keys = [[r["key"] for r in payload["results"]] for payload in (first, second)]
    assert keys[0] == keys[1] and len(keys[0]) == 2
    # Whether they agree is this machine's business; that it is told, and told right, is ours.
    compared = compare_results(first, second)
    assert code == int(not agreement(compared)[1]) and agreement(compared)[0] in shown
    assert "of one version: the two runs" in shown and shown.count("wrote ") == 2

    # The second run alone; a first one of other code, or of no known kind, is not compared with.
    path = tmp_path / first["file"]
    assert repeat.main([*words, "--contenders", "cpu", "--first", str(path)]) in (0, 1)
    assert len(read_results(tmp_path)) == 3
    changed = json.loads(path.read_text())
    changed["environment"]["commit"] = "another"
    path.write_text(json.dumps(changed))
    assert repeat.main([*words, "--contenders", "cpu", "--first", str(path)]) == 2
    assert "is of another version: commit was another" in capfd.readouterr().err


def test_what_cannot_be_run_is_not_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert repeat.main(["row", "--device", "cpu", "--models", "tiny", "--results", str(tmp_path)]) == 2
    assert "run 1 ended with 2, so there is nothing to compare" in capfd.readouterr().out
    for words in (["--compare", "x.json"], ["--resume", "x.json"]):
        assert repeat.main(["row", *words, "--results", str(tmp_path)]) == 2
        assert "this command compares the two runs that it makes" in capfd.readouterr().err
    assert repeat.main(["row", "--first", str(tmp_path / "none.json"), "--results", str(tmp_path)]) == 2
    assert "none.json: cannot be read" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
