"""``fastdpo bench`` honours or refuses what is asked; what it compares, and goes on with, is of one kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.compare import compare_results, report
from benchmarks.harness import environment
from benchmarks.results import ResultFile, read_result
from benchmarks.suites import Case, Options, make_cases

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--preset", "tiny"]


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_COMMIT", "0" * 40)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["memory", "--models", "nope"], "--models: got 'nope', wanted some of tiny"),
        (["memory", "--tokens", "5"], "--tokens: got 5, wanted some of 512"),
        (["op", "--models", "tiny", "nope"], "--models: got 'nope', wanted some of tiny"),
        (["op", "--tokens", "256", "5"], "--tokens: got 5, wanted some of 256"),
        (
            ["row", "--models", "tiny"],
            "--models: got ['tiny'] for row, wanted a suite of op, accuracy, memory, step, context",
        ),
        (["row", "--tokens", "256"], "--tokens: got [256] for row"),
        (["row", "--tasks", "pairs"], "--tasks: got ['pairs'] for row"),
        (
            ["row", "--contenders", "nope"],
            "contender: got 'nope', wanted one of cpu, cuda, reference, triton",
        ),
        (["row", "--without", "nope"], "contender: got 'nope'"),
        (["row", "--contenders", "triton"], "row: no size of 'tiny' is left"),
        (["op", "row", "--contenders", "fastdpo-cpu"], "contender: got 'fastdpo-cpu', wanted of row some of"),
        (["memory", "--repeats", "3"], "--repeats: got 3 for memory, wanted a suite of op, row"),
        (["accuracy", "--seconds", "3"], "--seconds: got 3.0 for accuracy, wanted a suite of op, row"),
        (["op", "--data", "pairs.jsonl"], "--data: got pairs.jsonl for op, wanted a suite of step"),
    ],
)
def test_an_option_that_nothing_takes_notice_of_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*words, *TINY, "--results", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--contenders", "padded", "nope"], "contender: got 'nope', wanted one of"),
        (["--without", "nope"], "contender: got 'nope'"),
        (["--models", "tiny", "nope"], "--models: got 'nope', wanted some of tiny, tiny-lora"),
        (["--repeats", "3"], "--repeats: got 3 for step"),
        (["--seconds", "3"], "--seconds: got 3.0 for step"),
        (["--tokens", "3"], "--tokens: got [3] for step"),
        (["--tasks", "pairs"], "--tasks: got ['pairs'] for step"),
    ],
)
def test_steps_refuse_what_they_do_not_take(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["step", *words, *TINY, "--results", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("text", "said"), [(None, "no such file"), ("no json", "row 1: not valid JSON")])
def test_data_that_cannot_be_read_is_refused_before_anything_is_measured(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, results = tmp_path / "pairs.jsonl", tmp_path / "results"
    if text is not None:
        data.write_text(text)
    assert run.main(["step", *TINY, "--data", str(data), "--results", str(results)]) == 2
    assert said in capsys.readouterr().err and not results.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repeats", "0"], "--repeats: got 0, wanted 1 at least"),
        (["--repeats", "-1"], "--repeats: got -1, wanted 1 at least"),
        (["--seconds", "nan"], "--seconds: got nan, wanted a number of seconds above 0"),
        (["--seconds", "0"], "--seconds: got 0.0"),
        (["--max_seconds", "inf"], "--max_seconds: got inf"),
        (
            ["--compare", "a.json", "--with", "b.json", "--repeats", "3"],
            "--suites: got ['op'], but --with runs nothing",
        ),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.parse(["op", *words])
    assert said in capsys.readouterr().err


def test_memory_and_row_honour_what_they_take() -> None:
    cases = make_cases("memory", Options(CPU, "small", 3, 1.0, tokens=[512], tasks=["pairs"]))
    assert [case.key for case in cases] == ["memory/N/small/N=512/V=32000/T=128/float32/pairs"]
    with pytest.raises(ValueError, match="no size of 'small' is left"):
        make_cases("memory", Options(CPU, "small", 3, 1.0, models=["llama-3-8b"]))
    case = make_cases("row", Options(CPU, "tiny", 1, 1.0, contenders=["cpu"]))[0]
    assert set(case.run()["contenders"]) <= {"copy", "cpu"}


def cell(median: float) -> dict[str, Any]:
    return {"median_ms": median, "noise": 0.01, "samples_ms": [median]}


def result(key: str, **more: Any) -> dict[str, Any]:
    cells = {"gemm": cell(10.0), "fastdpo-cpu": cell(11.0), "torch": cell(20.0)}
    return {"suite": "op", "key": key, "failed": {}, "not_run": {}, "contenders": cells} | more


def payload(**more: Any) -> dict[str, Any]:
    info = {"device": "CPU test", "threads": 1, "cuda": None, "date": "2026-01-01"}
    return {"file": "x.json", "environment": info, "results": [result("a", **more)]}


def without(name: str) -> dict[str, Any]:
    return {other: value for other, value in result("a")["contenders"].items() if other != name}


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({}, 0),
        ({"contenders": {**without("torch"), "torch": cell(40.0)}}, 0),  # a peer that became slower
        ({"contenders": without("torch"), "failed": {"torch": "raised"}}, 0),
        ({"contenders": without("torch"), "not_run": {"torch": "not installed"}}, 0),
        ({"contenders": {**without("fastdpo-cpu"), "fastdpo-cpu": cell(22.0)}}, 1),
        ({"contenders": without("fastdpo-cpu"), "failed": {"fastdpo-cpu": "raised"}}, 1),
        ({"contenders": without("fastdpo-cpu"), "not_run": {"fastdpo-cpu": "the extension is not built"}}, 1),
        ({"contenders": without("fastdpo-cpu")}, 1),
        ({"contenders": without("fastdpo-cpu"), "not_run": {"fastdpo-cpu": "left out: not asked for"}}, 0),
        ({"contenders": {}, "skipped": "out of memory"}, 1),
        ({"contenders": {}, "failed": {"the whole case": "RuntimeError"}}, 1),
    ],
)  # fmt: skip
def test_ours_alone_decide_a_comparison(
    more: dict[str, Any], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(compare_results(payload(), payload(**more))) == code
    said = capsys.readouterr().out
    assert "0 slower beyond noise, 0 broken, 0 gone" in said or code == 1


def test_what_is_gone_on_another_machine_is_no_regression() -> None:
    elsewhere = payload(contenders=without("fastdpo-cpu"), not_run={"fastdpo-cpu": "needs AVX"})
    elsewhere["environment"]["device"] = "another"
    assert report(compare_results(payload(), elsewhere)) == 0


def test_settings_are_kept_with_each_result_and_not_rewritten(tmp_path: Path) -> None:
    words = ["op", *TINY, "--contenders", "fastdpo-reference", "torch", "--results", str(tmp_path)]
    assert run.main([*words, "--tasks", "score", "--repeats", "2"]) == 0
    (path,) = tmp_path.iterdir()
    first = read_result(path)
    again = ["op", *TINY, "--contenders", "torch", "--tasks", "score", "stash", "--repeats", "1"]
    assert run.main([*again, "--resume", str(path)]) == 0
    second = read_result(path)
    assert second["settings"] == first["settings"] and second["settings"]["tasks"] == ["score"]
    assert [settings["repeats"] for settings in second["runs"]] == [2, 1]
    score, stash = second["results"]
    assert score == first["results"][0] and score["settings"]["repeats"] == 2
    assert stash["settings"]["repeats"] == 1 and stash["settings"]["contenders"] == ["torch"]
    assert set(stash["contenders"]) == {"gemm", "torch"}


@pytest.mark.parametrize("name", ["device", "driver", "cpu", "commit", "changes", "threads"])
def test_a_file_of_other_circumstances_is_not_gone_on_with(name: str, tmp_path: Path) -> None:
    path = ResultFile(tmp_path, environment(CPU), {}).add(result("a"))
    ResultFile.resume(path, environment(CPU), {})
    with pytest.raises(ValueError, match=f"{name} was .*, is another"):
        ResultFile.resume(path, {**environment(CPU), name: "another"}, {})


def test_every_run_of_a_file_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in one file, the last of one model alone: --resume does the rest of both."""
    settings = {
        "preset": "tiny",
        "repeats": 2,
        "seconds": 1.0,
        "without": [],
        "suites": ["op"],
        "device": "cpu",
    }
    file = ResultFile(tmp_path, environment(CPU), settings)
    path = file.add(result("a", settings={**settings, "models": None}))
    second = {**settings, "models": ["tiny"], "repeats": 5}
    ResultFile.resume(path, environment(CPU), second).add(result("b", settings=second))

    asked: list[tuple[Any, int]] = []

    def cases(suite: str, options: Options) -> list[Case]:
        asked.append((options.models, options.repeats))
        keys = ["b", "d"] if options.models else ["a", "c"]
        return [Case(k, "op", lambda k=k: result(k), 1.0, settings=options.settings()) for k in keys]  # type: ignore[misc]

    monkeypatch.setattr(run, "make_cases", cases)
    assert run.main(["--resume", str(path)]) == 0
    assert asked == [(None, 2), (["tiny"], 5)]
    assert {r["key"] for r in read_result(path)["results"]} == {"a", "b", "c", "d"}

    # And compared, each is measured again as it was, whatever the last one was narrowed to.
    asked.clear()
    every = list("abcd")

    def all_cases(suite: str, options: Options) -> list[Case]:
        asked.append((options.models, options.repeats))
        return [Case(k, "op", lambda k=k: result(k), 1.0, settings=options.settings()) for k in every]  # type: ignore[misc]

    monkeypatch.setattr(run, "make_cases", all_cases)
    assert run.main(["--compare", str(path), "--results", str(tmp_path / "new")]) == 0
    assert sorted(asked) == [(None, 2), (None, 5)]
    (new,) = (tmp_path / "new").iterdir()
    repeats = {r["key"]: r["settings"]["repeats"] for r in read_result(new)["results"]}
    assert repeats == {"a": 2, "b": 5, "c": 2, "d": 5}


def test_an_older_file_whose_last_part_was_narrowed_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are those of its last part alone, as `make gpu` used to leave them."""
    settings = {
        "preset": "tiny",
        "repeats": 2,
        "seconds": 1.0,
        "models": ["other"],
        "suites": ["op"],
        "device": "cpu",
    }
    info = environment(CPU)
    path = tmp_path / "old.json"
    path.write_text(
        json.dumps({"schema": 2, "environment": info, "settings": settings, "results": [result("a")]})
    )

    def cases(suite: str, options: Options) -> list[Case]:
        if options.models is not None:
            raise ValueError("op: no size is left")
        return [Case("a", "op", lambda: result("a"), 1.0)]

    monkeypatch.setattr(run, "make_cases", cases)
    assert run.main(["--compare", str(path), "--results", str(tmp_path / "new")]) == 0


def test_a_file_without_results_is_nothing_to_compare_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"schema": 2, "environment": environment(CPU), "settings": {}, "results": []}))
    assert run.main(["--compare", str(path), "--results", str(tmp_path / "new")]) == 2
    assert "empty.json: got no results" in capsys.readouterr().err
